"""`python -m harness.regression.budget`."""

from harness.regression.budget.check import app

app(prog_name=f"python -m {__package__}")
