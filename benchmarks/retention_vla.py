"""What a small pi0_fast keeps of one robot task while it learns another: run it with `--help`."""

from vla.command import main

if __name__ == "__main__":
    main()
