"""craft-optim convert: a cache of an earlier CRaFT implementation, in this format."""

from craft_optim.cli.options import AddCommand, add_json, layer

__all__ = ["add"]

_EXAMPLES = "  craft-optim convert old_cache/ anchors/ --layers 4 8 -1\n"


def add(command: AddCommand) -> None:
    """The command and its options."""
    add = command("convert", "Import a cache of an earlier CRaFT implementation.", _EXAMPLES).add_argument
    add("old", metavar="OLD", help="folder with its .pt files")
    add("new", metavar="NEW", help="folder of the new cache")
    add("--layers", nargs="+", type=layer, metavar="L", help="its layers, where its files do not name them")
    add("--overwrite", action="store_true", help="start over, whatever the new folder holds")
    add_json(add)
