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


def killed(text: str) -> int:
    """How many kills a soak run counted."""
    found = re.search(r"kill -9: (\d+)", text)
    assert found is not None
    return int(found[1])


def test_a_results_folder_survives_random_kills() -> None:
    """One runner and two workers on a folder, all of them and their trials killed fifteen times."""
    text = soak("--points", "40", "--workers", "3", "--kills", "15", "--seed", "1")
    assert "rows lost 0, doubled 0, wrong 0, failed 0" in text
    assert killed(text) == 15
    assert "processes left 0" in text


def test_a_database_survives_random_kills() -> None:
    """A runner and seven workers on a real PostgreSQL server, killed ten times."""
    try:
        PrivatePostgres(Path("unused"))
    except NoPostgresError as error:
        if "CI" in os.environ:  # there it is installed, and a test that is skipped would hide that it is not
            raise
        pytest.skip(str(error))
    text = soak("--over", "postgres", "--points", "40", "--workers", "8", "--kills", "10", "--seed", "2")
    assert "40 points, 8 workers: rows lost 0, doubled 0, wrong 0, failed 0" in text
    assert killed(text) == 10


def test_two_ray_nodes_survive_random_kills() -> None:
    """Four workers on two nodes of a Ray cluster, they and their trials killed eight times: Ray starts them
    again, and leases keep every point to one."""
    if "CI" not in os.environ and importlib.util.find_spec("ray") is None:
        pytest.skip("the extra `ray` is not installed")
    text = soak("--over", "ray", "--points", "40", "--workers", "4", "--kills", "8", "--seed", "3")
    assert "40 points, 4 workers: rows lost 0, doubled 0, wrong 0, failed 0" in text
    assert killed(text) == 8
    assert re.search(r"worker [1-9]", text)


@pytest.mark.parametrize("flaw", ["lost", "doubled", "wrong", "failed", "left"])
def test_a_soak_run_with_any_flaw_is_not_good(flaw: str) -> None:
    """One row lost, doubled, wrong or failed, or one process left, and the command fails."""
    assert Verdict(points=1, workers=1).good
    verdict = Verdict(points=1, workers=1)
    setattr(verdict, flaw, 1)
    assert not verdict.good
