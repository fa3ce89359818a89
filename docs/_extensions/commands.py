"""The directive `commands`: what `triton-deq` and each of its commands print with --help."""

import argparse
import importlib
from collections.abc import Iterator

from docutils import nodes
from docutils.parsers.rst import Directive


class Commands(Directive):
    def run(self) -> list[nodes.Node]:
        from triton_deq.cli import COMMANDS

        found: list[nodes.Node] = []
        for name, (module, purpose) in COMMANDS.items():
            parser = argparse.ArgumentParser(
                prog=f"triton-deq {name}",
                description=purpose,
                formatter_class=lambda prog: argparse.HelpFormatter(prog, width=96),
            )
            importlib.import_module(module, "triton_deq").add_arguments(parser)
            for each in _with_subcommands(parser):
                each.formatter_class = parser.formatter_class
                section = nodes.section(ids=[nodes.make_id(each.prog)])
                section += nodes.title(each.prog, each.prog)
                section += nodes.literal_block(each.format_help(), each.format_help(), language="text")
                found.append(section)
        return found


def _with_subcommands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from _with_subcommands(each)


def setup(app):
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
