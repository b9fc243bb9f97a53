"""`python -m harness.regression.budget`."""

import sys

from harness.regression.budget.check import main

if __name__ == "__main__":
    sys.exit(main())
