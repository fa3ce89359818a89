"""What comes back from a solve or a model, as trees of tensors: so torch.export takes and saves it."""

from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree


def register(kind: type, *, constants: tuple[str, ...] = (), left_out: tuple[str, ...] = ()) -> None:
    """Let PyTorch see into a dataclass.

    constants: fields that are no tensors, or not always. left_out: fields that an exported program returns
    as None.
    """
    given = [each.name for each in fields(kind) if each.init]
    parts = [name for name in given if name not in (*constants, *left_out)]

    def named(value: Any) -> list[tuple[str, Any]]:
        moving = [name for name in constants if isinstance(getattr(value, name), Tensor)]
        return [(name, getattr(value, name)) for name in (*parts, *moving)]

    def fixed(value: Any) -> list[Any]:
        kept = [getattr(value, name) for name in constants]
        return [None if isinstance(each, Tensor) else each for each in kept]

    def flatten(value: Any) -> tuple[list[Any], list[Any]]:
        return [child for _, child in named(value)], fixed(value)

    def flatten_with_keys(value: Any) -> tuple[list[tuple[Any, Any]], list[Any]]:
        return [(_pytree.GetAttrKey(name), child) for name, child in named(value)], fixed(value)

    def unflatten(children: Any, context: list[Any]) -> Any:
        kept = dict(zip(constants, context, strict=True))
        moving = [name for name, each in kept.items() if each is None]
        known = {**kept, **dict(zip((*parts, *moving), children, strict=True))}
        return kind(**{name: known.get(name) for name in given})

    _pytree.register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"triton_deq.{kind.__name__}",
        to_dumpable_context=lambda context: context,
        from_dumpable_context=lambda context: context,
        flatten_with_keys_fn=flatten_with_keys,
    )


def register_namedtuple(kind: type) -> None:
    """PyTorch sees into it already; this gives it a name in a saved program."""
    _pytree._register_namedtuple(kind, serialized_type_name=f"triton_deq.{kind.__name__}")
