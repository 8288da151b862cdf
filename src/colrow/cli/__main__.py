"""``python -m colrow.cli``, the same as ``colrow``."""

import sys

from colrow.cli import main

if __name__ == "__main__":
    sys.exit(main())
