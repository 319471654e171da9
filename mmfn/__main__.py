"""`python -m mmfn`."""

import sys

from mmfn.cli import entry

if __name__ == "__main__":
    sys.exit(entry())
