"""craft-optim with the small pi0_fast: `PYTHONPATH=examples python -m small_pi0_fast eval-mcq questions.jsonl ...`."""

import sys

from craft_optim.cli import main

if __name__ == "__main__":
    sys.exit(main())
