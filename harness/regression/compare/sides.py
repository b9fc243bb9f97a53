"""What BASE and HEAD of a comparison name: code (a git revision or a checkout), a results folder, or the JSON
of `make bench`; and whether what was measured on two machines may be compared at all."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness.errors import UserError

Kind = Literal["revision", "checkout", "results", "benchmark"]
CHECKOUT_MARK = "moc/__init__.py"
# Of an environment record, what says nothing about the machine and its software: the code, and a hash of all.
_NOT_MACHINE = ("git_revision", "git_dirty", "env_id")


@dataclass(frozen=True)
class Side:
    """One side as it was named, and where it is; a revision's `path` is the repository it is in."""

    name: str
    kind: Kind
    path: Path
    commit: str | None = None

    @property
    def label(self) -> str:
        """For people: the name, and what a revision is when it is not named by its hash."""
        if self.commit is None or self.commit.startswith(self.name):
            return self.name
        return f"{self.name} ({self.commit[:10]})"

    @property
    def is_code(self) -> bool:
        """Whether it can be run."""
        return self.kind in ("revision", "checkout")


def find_side(name: str) -> Side:
    """What `name` stands for; a path that exists comes before a revision of the same name.

    Raises UserError if it is nothing that can be compared.
    """
    path = Path(name)
    if path.is_dir():
        if (path / CHECKOUT_MARK).exists():
            return Side(name, "checkout", path.resolve())
        if any((path / rows).exists() for rows in ("rows.jsonl", "rows.parquet")):
            return Side(name, "results", path)
    elif path.suffix == ".json" and path.is_file():
        return Side(name, "benchmark", path)
    commit = _git(Path.cwd(), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    top = _git(Path.cwd(), "rev-parse", "--show-toplevel")
    if commit is not None and top is not None:
        return Side(name, "revision", Path(top), commit)
    raise UserError(
        f"{name}: nothing to compare; valid: a git revision, a checkout (it has {CHECKOUT_MARK}), a results "
        "folder (it has rows.jsonl or rows.parquet), or a .json file of `make bench`"
    )


def find_sides(base: str, head: str) -> tuple[Side, Side]:
    """Both sides. Raises UserError if one is nothing, or if they are of kinds that cannot be compared."""
    first, second = find_side(base), find_side(head)
    if first.kind != second.kind and not (first.is_code and second.is_code):
        raise UserError(
            f"{base} is a {first.kind}, {head} a {second.kind}: compare code with code, results with results"
        )
    return first, second


@contextmanager
def checked_out(base: Side, head: Side) -> Iterator[tuple[Path, Path]]:
    """Both sides as folders; those of revisions are made in a temporary place and removed afterwards.

    Also after an error, and when the process is told to end (SIGTERM, which a cancelled CI job gets).
    """
    with ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
        stack.callback(signal.signal, signal.SIGTERM, before)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mocbench-checkouts-")))
        paths = []
        for place, side in (("base", base), ("head", head)):
            if side.kind == "checkout":
                paths.append(side.path)
                continue
            assert side.commit is not None
            path = folder / place
            # Also after an attempt that failed midway, which may have left its entry in the repository.
            stack.callback(_git, side.path, "worktree", "prune")
            stack.callback(_git, side.path, "worktree", "remove", "--force", str(path))
            command = ["git", "-C", str(side.path), "worktree", "add", "--detach", str(path), side.commit]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError(f"{side.name}: cannot be checked out: {done.stderr.strip()}")
            paths.append(path)
        yield paths[0], paths[1]


def refuse_other_machine(base: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    """Raise UserError, naming what differs, unless both environment records are of one machine and software.

    Times of two machines, or of two versions of PyTorch, differ for reasons that are not in the code.
    """
    names = [name for name in (*base, *(n for n in head if n not in base)) if name not in _NOT_MACHINE]
    differing = [name for name in names if base.get(name) != head.get(name)]
    if differing:
        listed = "; ".join(f"{name} {base.get(name)} against {head.get(name)}" for name in differing)
        raise UserError(f"measured on different machines or versions, which cannot be compared: {listed}")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
