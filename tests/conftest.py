"""For all tests: hypothesis judges results, not how fast a busy machine is; threads that wait let others work."""

import os

# Read when torch loads, here and in every process that a test starts. Several of them share the cores, and
# OpenMP's threads would otherwise wait for each other by spinning: tests/e2e/test_sweep.py takes 67 s, not 227.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from hypothesis import settings  # noqa: E402

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
