"""Sweeps whose runners, workers and trials are killed at random: nothing is lost, doubled or left running.

The full counts are those of `make soak`; these are the same run, short enough for every day.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.soak.postgres import NoPostgresError, PrivatePostgres
from harness.soak.run import Verdict


def soak(*options: str) -> str:
    """What `make soak` prints; its exit code must be 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "harness.soak", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def killed(text: str) -> dict[str, int]:
    """How many kills a soak run counted, by role."""
    found = re.search(r"kill -9: (\d+) \((.*)\)", text)
    assert found is not None
    roles = {role: int(count) for role, count in re.findall(r"(\w+) (\d+)", found[2])}
    assert sum(roles.values()) == int(found[1])
    return roles


def test_a_results_folder_survives_random_kills() -> None:
    """A runner and a worker on a folder, five kills: of the runner, of the worker and of their trials."""
    text = soak("--points", "24", "--workers", "2", "--kills", "5", "--seed", "77")
    assert "24 points, 2 workers: rows lost 0, doubled 0, wrong 0, failed 0" in text
    assert killed(text) == {"run": 1, "trial": 3, "worker": 1}
    assert "processes left 0" in text


def test_a_database_survives_random_kills() -> None:
    """A runner and three workers on a PostgreSQL server; the runner, a worker and two trials are killed."""
    try:
        PrivatePostgres(Path("unused"))
    except NoPostgresError as error:
        if "CI" in os.environ:  # there it is installed, and a test that is skipped would hide that it is not
            raise
        pytest.skip(str(error))
    text = soak("--over", "postgres", "--points", "24", "--workers", "4", "--kills", "4", "--seed", "25")
    assert "24 points, 4 workers: rows lost 0, doubled 0, wrong 0, failed 0" in text
    assert killed(text) == {"run": 1, "trial": 2, "worker": 1}


def test_two_ray_nodes_survive_random_kills() -> None:
    """A worker on each of two nodes of a Ray cluster, one of them and three trials killed: Ray starts the
    worker again, and leases keep every point to one."""
    if "CI" not in os.environ and importlib.util.find_spec("ray") is None:
        pytest.skip("the extra `ray` is not installed")
    text = soak("--over", "ray", "--points", "24", "--workers", "2", "--kills", "4", "--seed", "66")
    assert "24 points, 2 workers: rows lost 0, doubled 0, wrong 0, failed 0" in text
    assert killed(text) == {"trial": 3, "worker": 1}


@pytest.mark.parametrize("flaw", ["lost", "doubled", "wrong", "failed", "left"])
def test_a_soak_run_with_any_flaw_is_not_good(flaw: str) -> None:
    """One row lost, doubled, wrong or failed, or one process left, and the command fails."""
    assert Verdict(points=1, workers=1).good
    verdict = Verdict(points=1, workers=1)
    setattr(verdict, flaw, 1)
    assert not verdict.good
