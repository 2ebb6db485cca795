"""`python -m sparc_hf.cli`."""

import sys

from sparc_hf.cli import main

if __name__ == "__main__":
    sys.exit(main())
