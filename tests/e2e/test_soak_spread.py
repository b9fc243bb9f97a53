"""The commands that people type to spread a sweep: workers and a runner that only a database connects."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from harness.soak.postgres import NoPostgresError, PrivatePostgres

TINY = """\
version: 1
name: tiny
workload: ffn_train
axes: {preset: [1m], method: [dense, moc_reference], selection: ["nm:2:8"], seq_len: [32]}
fixed: {batch: 1, dtype: fp32}
measure: {timing: {rel_ci: 0.9, max_seconds: 0.05}}
"""


@pytest.fixture
def server() -> Iterator[PrivatePostgres]:
    """A PostgreSQL server of this test's own."""
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        Path(folder).chmod(0o755)  # the server is another user where tests run as root
        try:
            private = PrivatePostgres(Path(folder) / "server")
        except NoPostgresError as error:
            if "CI" in os.environ:  # there it is installed: a test that is skipped would hide that it is not
                raise
            pytest.skip(str(error))
        with private:
            yield private


def mocbench(host: Path, *arguments: str) -> str:
    """The command on a `host` that shares no files with others; what it prints."""
    host.mkdir(exist_ok=True)
    (host / "tiny.yaml").write_text(TINY)
    done = subprocess.run(
        [sys.executable, "-m", "harness", *arguments, "--device", "cpu", "--results", str(host / "results")],
        cwd=host,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_worker_measures_and_a_runner_elsewhere_has_the_tables(
    tmp_path: Path, server: PrivatePostgres
) -> None:
    """What a worker measured on one host comes out as tables and report on another, which measures nothing;
    a third run without the database finds it all in the folder."""
    mocbench(tmp_path / "worker", "worker", "tiny.yaml", "--storage", server.url)
    assert not (tmp_path / "worker/results/tiny/rows.jsonl").exists()
    runner = tmp_path / "runner"
    assert "2 points, 2 already measured" in mocbench(runner, "run", "tiny.yaml", "--storage", server.url)
    table = pd.read_csv(runner / "results/tiny/wide.csv")
    assert sorted(table["method"]) == ["dense", "moc_reference"]
    assert (table["step_ms"] > 0).all()
    results = runner / "results/tiny"
    for name in ("rows.jsonl", "samples.parquet", "environments.jsonl", "report.html"):
        assert (results / name).is_file()
    assert server.url not in (results / "command.txt").read_text()
    before = (results / "rows.jsonl").read_bytes()
    assert "2 points, 2 already measured" in mocbench(runner, "run", "tiny.yaml")
    assert (results / "rows.jsonl").read_bytes() == before
