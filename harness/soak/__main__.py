"""`python -m harness.soak`."""

from harness.soak.run import app

if __name__ == "__main__":
    app()
