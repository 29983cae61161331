"""craft-optim demo: a fine-tuning that forgets, and the same under the constraint, within minutes and without data."""

from craft_optim.cli.options import AddCommand, positive, whole

__all__ = ["add"]

_EXAMPLES = """\
  craft-optim demo vision                # a classifier of handwritten digits learns new ones: seconds
  craft-optim demo chat                  # a small chat model, made on the spot, learns to write orders as JSON
  craft-optim demo chat --model.path=HuggingFaceTB/SmolLM2-135M-Instruct
                                         # the same with a real one: half an hour on a CPU
  craft-optim demo robot                 # in a clone: a robot policy of seven skills learns another; minutes

The table says what the model could do before, after the base optimizer, and after CraftOptimizer around the same one.
Anchors, the log of the constrained run and a page about it are in --out. The code of the first two is short, and meant
to be read: craft_optim/demo/vision.py, craft_optim/demo/chat.py.
"""


def add(command: AddCommand) -> None:
    """The command and its options."""
    add = command("demo", "See a fine-tuning that forgets, and the same under the constraint.", _EXAMPLES).add_argument
    add("what", choices=["vision", "chat", "robot"], help="the kind of model")
    add("--epsilon", type=positive, metavar="X", help="drift to allow, in nats (default: 0.05; of robot 0.1)")
    add("--steps", type=whole, metavar="N", help="steps of fine-tuning (default: as many as it takes)")
    add("--out", default="craft-demo", metavar="FOLDER", help="where results go (default: craft-demo)")
    add("--model.path", dest="model", metavar="PATH", help="of chat: a causal language model, folder or hub id")
