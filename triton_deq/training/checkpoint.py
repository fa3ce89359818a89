"""Checkpoints: written whole or not at all, read without running code, refused if they are of another run."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .errors import CheckpointError

VERSION = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state`; the file that is there stays until the new one is complete.

    Raises:
        CheckpointError: it could not be written, as on a full disk; the one before is as it was.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter where a write comes up short
        temporary.unlink(missing_ok=True)
        kept = f"the checkpoint {path} of before is intact" if path.exists() else "there is none of before"
        raise CheckpointError(
            f"the checkpoint of step {state['step']} could not be written to {path} ({error}): {kept}; free "
            "space there and resume"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, its tensors on the CPU.

    Raises:
        CheckpointError: no file, not a checkpoint, or one of another version.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path} to resume from: train without resume first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        version = state["version"]
    except Exception as error:  # what a damaged file makes torch.load raise is not documented
        raise CheckpointError(f"{path} is not a checkpoint that can be read ({error})") from error
    if version != VERSION:
        raise CheckpointError(
            f"{path} has version {version}, and this triton-deq reads {VERSION}: train anew"
        )
    return state


def check_same(held: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Both configurations are equal.

    Raises:
        CheckpointError: they are not; names the first field that differs.
    """
    theirs, ours = _flat(held), _flat(wanted)
    missing = "nothing"
    for name in (*ours, *theirs):
        before, now = theirs.get(name, missing), ours.get(name, missing)
        if before != now:
            raise CheckpointError(
                f"{path} was written with {name}={before}, and now it is {now}: give the same, or train into "
                "another folder"
            )


def _flat(held: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted names."""
    flat = {}
    for name, value in held.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of the generators that everyone shares: Python's, NumPy's, PyTorch's and the GPU's."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Put the generators where `random_states` found them."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
