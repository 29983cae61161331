"""`python -m craft_optim.cli` is `craft-optim`, for launchers such as torchrun that want a module."""

import sys

from craft_optim.cli import main

if __name__ == "__main__":
    sys.exit(main())
