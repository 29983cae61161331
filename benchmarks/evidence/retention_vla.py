"""Ways to fine-tune a small pi0_fast on a second robot task, and what each keeps of the first: see `--help`."""

import _paths  # noqa: F401  (puts examples/ and benchmarks/ on the path)
from vla.command import main

if __name__ == "__main__":
    main()
