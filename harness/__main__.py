"""`python -m harness` is the `mocbench` command."""

from harness.cli import main

if __name__ == "__main__":
    main()
