"""The directive `command-help`: what `craft-optim COMMAND --help` prints, from the parser itself."""

import argparse
import os
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

__all__ = ["CommandHelp", "setup"]


class CommandHelp(Directive):
    """`.. command-help:: drift` has the help of `craft-optim drift`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Returns the literal block."""
        from craft_optim.cli import _parser

        parser = _parser()
        (below,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        os.environ["COLUMNS"] = "100"  # else as wide as the terminal of whoever builds this
        text = below.choices[self.arguments[0]].format_help()
        block = nodes.literal_block(text, text, language="text")
        return [block]


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
