"""The documentation's pages: their Python runs, their messages exist, and nothing public is missing."""

import re
from pathlib import Path

import pytest

import triton_deq
from triton_deq import backend
from triton_deq.compat import torchdeq
from triton_deq.status import Status

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page, monkeypatch, capsys):
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    scope: dict[str, object] = {}
    try:
        for block in blocks:
            exec(compile(block, str(page), "exec"), scope)
    finally:
        torchdeq.uninstall()


def sources() -> str:
    """The package's source with the pieces of its split strings joined."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "triton_deq").rglob("*.py"))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_the_messages_of_troubleshooting_exist():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    by_message = page.split("## By message")[1]
    terms = re.findall(r"^(?!:)(`.+)\n: ", by_message, flags=re.MULTILINE)
    messages = [message for term in terms for message in re.findall(r"`(.+?)`(?:,|$)", term)]
    assert len(messages) > 25
    text = sources()
    for message in messages:
        parts = [message, message.replace("f(z) has shape", "{name} has shape")]
        assert any(part in text for part in parts), message


def test_every_status_has_an_entry():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    assert re.findall(r"^### ([A-Z_]+)$", page, flags=re.MULTILINE) == [status.name for status in Status]


def test_every_public_name_is_in_the_reference():
    reference = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"\.\. auto(?:function|class):: (\w+)", reference))
    assert set(triton_deq.__all__) <= documented


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in PAGES:
        for body in re.findall(r"```{toctree}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            names = [line for line in body.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / f"{name}.md").resolve() for name in names}
    assert {page.resolve() for page in PAGES} - {DOCS / "index.md"} == listed
