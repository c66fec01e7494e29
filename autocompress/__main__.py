"""``python -m autocompress``: the command line."""

import sys

from autocompress.cli import main

if __name__ == "__main__":
    sys.exit(main())
