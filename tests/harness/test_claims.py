"""Leases: two living runners never hold the same point, a dead one holds nothing."""

import json
import subprocess
import sys
from pathlib import Path

from harness.claims import Claims, process_start

HOLD = """
import sys; from pathlib import Path; from harness.claims import Claims
print(Claims(Path(sys.argv[1])).take(sys.argv[2:]), flush=True); sys.stdin.read()
"""


def holder(folder: Path, *keys: str) -> subprocess.Popen[str]:
    """Another process that has taken `keys` and lives until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *keys],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_a_living_holder_keeps_a_point_and_a_dead_one_does_not(tmp_path: Path) -> None:
    """While the other process lives its point is refused; once it is killed the point is free."""
    other = holder(tmp_path, "a", "b")
    try:
        mine = Claims(tmp_path)
        assert not mine.take(["b", "c"])
        assert mine.held() == {"a", "b"}
        assert mine.take(["c"])
    finally:
        other.kill()
        other.communicate()
    assert mine.take(["a", "b"])


def test_a_reused_process_id_is_not_the_holder(tmp_path: Path) -> None:
    """A lease whose process id now belongs to a younger process is stale."""
    claims = Claims(tmp_path)
    assert claims.take(["a"])
    path = tmp_path / "claims.json"
    leases = json.loads(path.read_text())
    leases["a"]["born"] = "another boot:1"
    path.write_text(json.dumps(leases))
    assert claims.held() == set()


def test_releasing_frees_just_the_named_points(tmp_path: Path) -> None:
    """Giving one lease back keeps the others."""
    claims = Claims(tmp_path)
    claims.take(["a", "b"])
    claims.release(["a", "unknown"])
    assert claims.held() == {"b"}


def test_a_finished_process_has_no_start() -> None:
    """The start time of a process that is gone is None."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert process_start(process.pid) is None
