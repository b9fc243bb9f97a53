"""`python -m harness.soak`."""

import sys

from harness.soak.run import main

if __name__ == "__main__":
    sys.exit(main())
