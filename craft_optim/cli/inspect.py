"""craft-optim inspect: what a cache holds, as text and as a page; and how far a model has moved from it."""

from craft_optim.cli.options import AddCommand, add_json, add_model, whole

__all__ = ["add"]

_EXAMPLES = """\
  craft-optim inspect anchors/                                    # what is in it
  craft-optim inspect anchors/ --verify --html=anchors.html       # checksums; a page to look at
  craft-optim inspect anchors/ --policy.path=outputs/checkpoints/last/pretrained_model --html=anchors.html
                                                                  # how far has this checkpoint moved?
"""


def add(command: AddCommand) -> None:
    """The command and its options."""
    add = command("inspect", "Say what a cache holds, show it, check a model on it.", _EXAMPLES).add_argument
    add("cache", metavar="CACHE", help="folder of the cache")
    add("--html", metavar="FILE", help="write a page with pictures, prompts and what the teacher says")
    add("--verify", action="store_true", help="compare all checksums: reads the whole cache")
    add("--count", type=whole, default=24, metavar="N", help="anchors to show (default: 24); of a model, the worst")
    add("--tokenizer", metavar="PATH", help="of token ids: folder or hub id (default: the teacher's, if it is here)")
    add_json(add)
    add_model(add)
