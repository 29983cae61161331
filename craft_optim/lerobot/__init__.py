"""What lerobot's policies need to be anchored; requires `pip install craft-optim[lerobot]` and Python 3.12."""

from craft_optim.lerobot import pi0_fast

__all__ = ["pi0_fast"]
