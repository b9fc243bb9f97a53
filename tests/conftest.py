"""For all tests: hypothesis does not judge the speed of a busy machine; threads wait without spinning; what
is imported is no garbage."""

import gc
import os

# Read when torch loads, here and in every process that a test starts. Several of them share the cores, and
# OpenMP's threads would otherwise wait by spinning: tests/e2e/test_sweep.py then takes 227 s in place of 67.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Measurements collect garbage before they start: of what tests make, not of all the imported modules,
    which would take a fifth of a second each time."""
    gc.freeze()
