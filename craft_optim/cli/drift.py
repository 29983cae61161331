"""craft-optim drift: how far checkpoints have moved from their teacher, in its logits, hidden states and actions."""

from craft_optim.cli.build_anchors import add_frames
from craft_optim.cli.options import AddCommand, add_json, layer, top_k, whole

__all__ = ["add"]

_EXAMPLES = """\
On a cache of craft-optim build-anchors; several checkpoints give a row each:

  craft-optim drift anchors/ --policy.path=outputs/train/checkpoints/last/pretrained_model --epsilon=0.05
  craft-optim drift anchors/ --policy.path outputs/train/checkpoints/0*/pretrained_model --plot=drift.png --json=d.json
  craft-optim drift anchors/ --model.path finetuned/checkpoint-100 finetuned/checkpoint-200 --epsilon=0.05
  craft-optim drift anchors/ --factory=my_script.py:finetuned

Against the teacher itself; then actions are compared, too, those that both would take on the same frames with the same
noise. With a dataset instead of a cache, the teacher's is built, in a temporary folder or in --cache=FOLDER:

  craft-optim drift anchors/ --teacher.path=lerobot/pi0fast-base --policy.path=outputs/.../pretrained_model
  craft-optim drift --teacher.path=lerobot/pi0fast-base --policy.path=outputs/.../pretrained_model \\
      --dataset.repo_id=you/old_task --count=256 --cache=anchors/

All models see what the teacher's preprocessor has made of the frames: a fine-tuned checkpoint's own has the statistics
of the data that it was fine-tuned on. Actions are in normalised units, as they leave the policies.

What the columns mean: "mean" is over all valid positions of all anchors together; it is what a training holds at
epsilon, and what drift() of the retention returns. "per anchor" counts every anchor once, and quantiles, "> epsilon"
(the share of anchors above it) and "worst" (places in the cache) are of the anchors' own means. A table by category
follows where the anchors have several, such as a policy's tasks or the column `category` of chats.
"""


def add(command: AddCommand) -> None:
    """The command and its options."""
    add = command("drift", "Measure how far checkpoints have moved from their teacher.", _EXAMPLES).add_argument
    add("cache", nargs="?", metavar="CACHE", help="folder of a cache; comes first")
    paths = "lerobot policies: folders or hub ids, several with spaces or commas between"
    add("--policy.path", dest="policies", nargs="+", metavar="PATH", help=paths)
    texts = "causal language models: folders, hub ids, adapters or .gguf files, several likewise"
    add("--model.path", dest="texts", nargs="+", metavar="PATH", help=texts)
    add(
        "--factory", dest="factories", nargs="+", metavar="FILE:FUNCTION", help="functions that return (model, batches)"
    )
    add("--teacher.path", dest="teacher", metavar="PATH", help="the policy before: its actions are compared, too")
    add("--device", default="auto", help="where models run (default: auto: CUDA if there is, else the CPU)")
    epsilon = "what is allowed: a number, or KIND=number for logits, hidden, actions and so on"
    add("--epsilon", nargs="+", metavar="[KIND=]X", help=epsilon)
    add("--worst", type=whole, default=5, metavar="N", help="name the N anchors that moved most (default: 5)")
    add("--no-actions", action="store_true", help="do not compare actions")
    add("--seed", type=int, default=0, help="of the noise that policies draw for actions (default: 0)")
    add_json(add)
    add("--plot", metavar="FILE", help="draw drift over checkpoints against epsilon; needs matplotlib")
    add_frames(add)
    add("--keep", choices=["logits", "tokens", "prefix", "actions"], help="of a dataset: what to compare")
    add("--layers", nargs="+", type=layer, metavar="L", help="of a dataset, with --keep=prefix: numbers or names")
    add("--top-k", type=top_k, metavar="K", help="of a dataset: compare the K likeliest classes, or `all`")
    add("--cache", dest="kept", metavar="FOLDER", help="of a dataset: keep the teacher's cache there")
