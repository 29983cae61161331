"""Ways to teach a robot policy of seven skills one more, and what each keeps of the others: see `--help`."""

import _paths  # noqa: F401  (puts examples/ and benchmarks/ on the path)
from skills.command import main

if __name__ == "__main__":
    main()
