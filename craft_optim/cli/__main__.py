"""`python -m craft_optim.cli` is `craft-optim`, for launchers such as torchrun that want a module."""

import sys

from craft_optim.cli import main

sys.exit(main())
