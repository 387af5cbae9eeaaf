"""The command line: ``python -m dfkt study|distill|teacher|show``."""

import sys

from dfkt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
