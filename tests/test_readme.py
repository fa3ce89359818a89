"""The README's Python runs as it stands there."""

import re
from pathlib import Path

from triton_deq.compat import torchdeq

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_examples_run(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as a reader runs them
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 6
    scope: dict[str, object] = {}
    try:
        for block in blocks:
            exec(block, scope)
    finally:
        torchdeq.uninstall()
    assert "32 of 32 CONVERGED" in capsys.readouterr().out


def test_the_commands_exist():
    from triton_deq.cli import COMMANDS

    named = set(re.findall(r"^triton-deq (\w+)(?: -| *#|$)", README, flags=re.MULTILINE))
    assert named
    assert named <= set(COMMANDS)
