"""Ways to fine-tune a real language model on something narrow, and what each keeps of it: see `--help`."""

import _paths  # noqa: F401  (puts examples/ and benchmarks/ on the path)
from llm.command import main

if __name__ == "__main__":
    main()
