"""What can be known exactly without a GPU, and whether it is what budget.json says.

    python -m harness.regression.budget             every deviation, one a line; exit code 3 if there is any
    python -m harness.regression.budget --update    write what is found to budget.json
    python -m harness.regression.budget methods     one part of it alone, or several

Nothing here is a time. A part is a module `harness.regression.budget.PART` whose `collect` gives facts by
section; each runs in a process of its own that sees no GPU and has an empty cache folder, so that the facts
are the same on every machine.
A section whose name ends in a version (of Triton, of Python) holds only there; those of other versions stay
as they are.

The file has one fact a line in a fixed order, so the diff of an update says what changed.
"""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ROOT = Path(__file__).resolve().parents[3]
BUDGET = ROOT / "budget.json"
UPDATE = "make bench-update"
EXIT_DEVIATES = 3

Fact = int | str
Facts = dict[str, dict[str, Fact]]  # section -> what -> value


class Part(enum.StrEnum):
    """A module of this folder that collects facts."""

    kernels = "kernels"
    methods = "methods"
    variants = "variants"
    rows = "rows"
    startup = "startup"


# What the process of a part needs in its environment. Kernels are compiled where they are not interpreted.
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "kernels": {"TRITON_INTERPRET": "0"},
    "methods": {"TRITON_INTERPRET": "1"},
    "variants": {"TRITON_INTERPRET": "0"},
}


@dataclass(frozen=True)
class Deviation:
    """One fact that is not what the budget says; None stands for a fact that is not there."""

    section: str
    what: str
    was: Fact | None
    now: Fact | None

    def line(self) -> str:
        """What, was, is, and how to accept it."""
        return f"{self.section}: {self.what}: {self._change()} (accept: {UPDATE})"

    def _change(self) -> str:
        if self.was is None:
            return f"new, is {self.now}"
        if self.now is None:
            return f"gone, was {self.was}"
        if isinstance(self.was, int) and isinstance(self.now, int):
            share = f" ({100 * (self.now / self.was - 1):+.1f} %)" if self.was else ""
            return f"was {self.was}, is {self.now}{share}"
        before, after = str(self.was).split(), str(self.now).split()
        changed = [f"-{word}" for word in before if word not in after]
        changed += [f"+{word}" for word in after if word not in before]
        return f"was {self.was!r}, is {self.now!r}: {' '.join(changed)}"


def collect(parts: Iterable[str], root: Path = ROOT) -> Facts:
    """The facts of the code below `root`, section by section; two parts are collected at a time.

    Raises RuntimeError with the end of its output if a part fails.
    """
    with ThreadPoolExecutor(2) as pool:
        found: Facts = {}
        for facts in pool.map(lambda part: _collect_part(part, root), parts):
            found.update(facts)
        return found


def _collect_part(part: str, root: Path) -> Facts:
    module = f"{__package__}.{part}"
    code = f"import json, {module} as part; print(json.dumps(part.collect()))"
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            **ENVIRONMENTS.get(part, {}),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "MOCBENCH_CACHE": cache,
            # Before anything else: another copy of the code may be installed.
            "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH")))),
        }
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} failed:\n{done.stderr[-2000:]}")
    facts: Facts = json.loads(done.stdout.splitlines()[-1])
    return facts


def deviations(budget: Mapping[str, Mapping[str, Fact]], found: Facts) -> list[Deviation]:
    """Where the sections that were found differ from the budget, in the order of what was found."""
    changed = []
    for section, facts in found.items():
        known = budget.get(section, {})
        names = [*facts, *(name for name in known if name not in facts)]
        changed += [
            Deviation(section, name, known.get(name), facts.get(name))
            for name in names
            if known.get(name) != facts.get(name)
        ]
    return changed


def unknown_sections(budget: Mapping[str, Mapping[str, Fact]], found: Facts) -> list[str]:
    """Sections of a version that the budget does not know, though it knows others of the same kind."""
    return [
        section
        for section in found
        if section not in budget and any(_kind(section) == _kind(other) for other in budget)
    ]


def _kind(section: str) -> str:
    return section.partition(" ")[0]


def dump(facts: Mapping[str, Mapping[str, Fact]]) -> str:
    """The text of budget.json: sections and facts in order, one fact a line."""
    ordered = {section: dict(sorted(facts[section].items())) for section in sorted(facts)}
    return json.dumps(ordered, indent=1, ensure_ascii=False) + "\n"


def check(parts: Sequence[str], update: bool) -> int:
    """Print what deviates from the budget, or accept it; the exit code."""
    budget = json.loads(BUDGET.read_text(encoding="utf-8")) if BUDGET.exists() else {}
    found = collect(parts)
    changed = deviations(budget, found)
    if update:
        BUDGET.write_text(dump({**budget, **found}), encoding="utf-8")
        print(f"{BUDGET.name}: {len(changed)} facts changed; git diff {BUDGET.name} says which")
        return 0
    # On a developer's machine another version of Triton or Python is no mistake. Where CI is set it is: there
    # versions change by a commit, and the budget has to change with them.
    strange = [] if os.environ.get("CI") else unknown_sections(budget, found)
    for section in strange:
        known = ", ".join(sorted(other for other in budget if _kind(other) == _kind(section)))
        print(f"not judged: {section}; {BUDGET.name} knows {known} ({UPDATE} adds this one)")
    judged = [deviation for deviation in changed if deviation.section not in strange]
    for deviation in judged:
        print(deviation.line())
    count = sum(len(facts) for section, facts in found.items() if section not in strange)
    print(f"{count} facts, {len(judged)} deviate from {BUDGET.name}")
    return EXIT_DEVIATES if judged else 0


@app.command(help=__doc__ and __doc__.partition("\n")[0])
def main(
    parts: Annotated[list[Part] | None, typer.Argument(help="which parts; all if none is named")] = None,
    update: Annotated[bool, typer.Option("--update", help=f"write {BUDGET.name}")] = False,
) -> None:
    """Check or update; exit code 3 if something deviates."""
    raise typer.Exit(check(parts or list(Part), update))
