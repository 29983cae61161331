"""craft-optim train: lerobot-train with retention."""

import argparse
import sys
from collections.abc import Callable

from craft_optim.cli.options import AddCommand, UsageError

__all__ = ["add"]

_EXAMPLES = """\
  craft-optim train --craft.anchors.repo_id=you/old_task --craft.epsilon=0.05 \\
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
    made = command("train", _train, "Run lerobot-train under the constraint that the policy does not drift.", _EXAMPLES)
    made.set_defaults(takes_rest=True, stopped=_STOPPED)
    made.format_help = _with_settings(made.format_help)  # type: ignore[method-assign]


def _with_settings(format_help: Callable[[], str]) -> Callable[[], str]:
    """The help, and behind it what lerobot has to be imported for."""

    def whole() -> str:
        try:
            from craft_optim.lerobot.settings_help import settings_in_words
        except ImportError as error:
            return f"{format_help()}\nThe settings are listed where lerobot is installed ({error}).\n"
        return f"{format_help()}\nsettings and their defaults:\n\n{settings_in_words()}\n"

    return whole


def _train(args: argparse.Namespace) -> None:
    try:
        from lerobot.scripts import lerobot_train

        from craft_optim.lerobot.plugin import TRAIN_FLAG, install
    except ImportError as error:
        raise UsageError(f"train needs lerobot ({error}): pip install 'craft-optim[lerobot]'.") from error
    sys.argv = ["lerobot-train", TRAIN_FLAG, *args.rest]
    install(sys.argv[1:], debug=args.debug)  # the flag alone would not: the module is imported already
    try:
        lerobot_train.main()
    except Exception:
        # Of what has trained for hours the traceback is not to be had again
        args.debug = args.debug or lerobot_train.craft_run.retention is not None
        raise
