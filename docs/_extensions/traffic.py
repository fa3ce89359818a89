"""The directive `traffic`: a diagram of the bytes that kernels move, from the catalog that counts them.

    :::{traffic}
    :batch: 32
    :entries: 16384

    anderson_residual[fp32,m=6]
    anderson_advance[fp32,m=6]
    :::

Each bar is a kernel's traffic through memory, in passes over a state `[batch, entries]` of its dtype.
"""

from html import escape
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive, directives

BAR, GAP, LEFT, WIDTH = 22, 10, 250, 420


class Traffic(Directive):
    has_content = True
    option_spec: ClassVar = {"batch": directives.positive_int, "entries": directives.positive_int}

    def run(self) -> list[nodes.Node]:
        from triton_deq.kernels.catalog import ENTRIES

        catalog = {entry.name: entry for entry in ENTRIES}
        batch, entries = self.options.get("batch", 32), self.options.get("entries", 16384)
        names = [line.strip() for line in self.content if line.strip()]
        unknown = [name for name in names if name not in catalog]
        if unknown:
            near = [name for name in catalog if name.startswith(unknown[0].split("[")[0])]
            raise self.error(f"no kernel {unknown[0]!r} in the catalog: choose from {', '.join(near)}")
        moved = {name: catalog[name].traffic(catalog[name], batch, entries) for name in names}
        svg = _drawing({name: (count, count / _state(name, batch, entries)) for name, count in moved.items()})
        caption = (
            f"Bytes through memory for a state of {batch} × {entries}, and the passes over it that this is."
        )
        figure = nodes.figure()
        figure += nodes.raw("", svg, format="html")
        figure += nodes.caption(caption, caption)
        return [figure]


def _state(name: str, batch: int, entries: int) -> int:
    """Bytes of one state."""
    size = next(size for dtype, size in (("64", 8), ("32", 4), ("16", 2)) if dtype in name.split("[")[1])
    return batch * entries * size


def _drawing(bars: dict[str, tuple[int, float]]) -> str:
    most = max(count for count, _ in bars.values())
    height = len(bars) * (BAR + GAP)
    lines = [
        f'<svg viewBox="0 0 {LEFT + WIDTH + 190} {height}" role="img" style="max-width: 100%" '
        'font-family="sans-serif" font-size="13" fill="currentColor">'
    ]
    for index, (name, (count, passes)) in enumerate(bars.items()):
        top, width = index * (BAR + GAP), WIDTH * count / most
        middle = top + BAR - 6
        lines += [
            f'<text x="{LEFT - 10}" y="{middle}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{top}" width="{width:.1f}" height="{BAR}" fill="#4477aa"/>',
            f'<text x="{LEFT + width + 8:.1f}" y="{middle}">{count / 1e6:.3g} MB, {passes:.3g} passes</text>',
        ]
    return "\n".join([*lines, "</svg>"])


def setup(app):
    app.add_directive("traffic", Traffic)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
