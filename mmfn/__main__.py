"""`python -m mmfn`."""

import sys

from mmfn.cli import main

if __name__ == "__main__":
    sys.exit(main())
