"""craft-optim train: lerobot-train with retention."""

from craft_optim.cli.options import AddCommand, completing
from craft_optim.cli.settings_help import settings, settings_in_words

__all__ = ["add"]

_EXAMPLES = """\
  craft-optim train --craft.anchors.repo_id=you/old_task \\
      --policy.path=lerobot/pi0fast-base --dataset.repo_id=you/new_task --output_dir=outputs/train/new_task
  craft-optim train --craft.config=craft.yaml --resume=true \\
      --config_path=outputs/train/new_task/checkpoints/last/pretrained_model/train_config.json
  accelerate launch --num_processes 4 -m craft_optim.cli train --craft.config=craft.yaml --policy.path=... ...

All flags but --craft.* are those of lerobot-train, and the same as

  lerobot-train --craft.discover_packages_path=craft_optim.lerobot --craft.epsilon=0.05 ...

What must be kept: --craft.anchors.repo_id or .root (a LeRobotDataset), .episodes, .count, .prompts, or .path (a cache
of craft-optim build-anchors). How much it may drift: --craft.epsilon. A file (YAML or JSON) can hold the same names:
--craft.config=FILE. A wrong name is answered with those that are close to it.
"""
_STOPPED = "; --resume=true --config_path=.../train_config.json goes on from its last checkpoint"


def add(command: AddCommand) -> None:
    """The command; its options are lerobot's."""
    made = command("train", "Run lerobot-train under the constraint that the policy does not drift.", _EXAMPLES)
    made.set_defaults(takes_rest=True, stopped=_STOPPED)
    made.more_help = lambda: f"\nsettings and their defaults:\n\n{settings_in_words()}\n"
    if completing():  # else they are among the rest, which lerobot's parser takes
        for flag, _, about in settings():
            made.add_argument(flag, help=about)
