"""``python -m benchmarks.zoo`` is ``colrow zoo``."""

import sys

from colrow.cli import main

if __name__ == "__main__":
    sys.exit(main(["zoo", *sys.argv[1:]]))
