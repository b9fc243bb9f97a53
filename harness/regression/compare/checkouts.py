"""Two checkouts timed against each other: a process each, kept alive, that take turns.

A round is one block of samples of either side, moments apart; rounds come in pairs, ABBA, so a clock that
drifts favours neither, and the ratio is taken within rounds. Only one process works at a time. A benchmark
that looks slower is opened anew on both sides, elsewhere in memory, and measured a second time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.measure.clocks import Conditions
from harness.measure.stats import Verdict, median
from harness.measure.timing import PairedTimes, TimingSettings, run_rounds
from harness.regression.compare.verdict import RULES, Change, judge_rounds
from moc.config import near_miss

ROOT = Path(__file__).resolve().parents[3]
_LOG_LINES = 3


@dataclass(frozen=True)
class Compared:
    """What came out for one point. Without a verdict it could not be compared, and `note` says why."""

    name: str
    verdict: Verdict | None
    note: str = ""
    change: Change | None = None
    base_ms: float | None = None
    head_ms: float | None = None
    rounds: int = 0
    tokens: int | None = None  # of one unit of work
    failed: bool = False  # one of the sides raised an error
    looks: tuple[Verdict, ...] = ()

    @property
    def tokens_per_s(self) -> float | None:
        """Of head."""
        if self.tokens is None or self.head_ms is None:
            return None
        return self.tokens / self.head_ms * 1e3


class ChildFailed(RuntimeError):
    """A side could not do what it was asked; the message is the reason, in one line."""

    def __init__(self, side: str, reason: str) -> None:
        super().__init__(f"{side}: {reason}")


class Child:
    """The process of one side; see `harness.regression.compare.child`."""

    def __init__(self, side: str, checkout: Path, device: str, log: Path) -> None:
        self.side = side
        self._log = log
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if device == "cpu" else {}
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "harness.regression.compare.child", str(checkout), device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env={**os.environ, **one_thread, "PYTHONPATH": str(ROOT)},
                cwd=ROOT,
                text=True,
            )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """The answer to one request. Raises ChildFailed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self.listen()

    def listen(self) -> dict[str, Any]:
        """The next answer; the first comes unasked and says what the side has. Raises ChildFailed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ChildFailed(self.side, str(answer["error"]))
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _ended(self) -> ChildFailed:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = " | ".join(lines[-_LOG_LINES:]) or "without a word"
        return ChildFailed(self.side, f"its process ended: {said}")


class Pair:
    """Both sides of a comparison, and what is timed on them."""

    def __init__(self, base: Child, head: Child, device: str, inject: Mapping[str, float]) -> None:
        self._sides = {"base": base, "head": head}
        self._device = device
        self._inject = inject
        greetings = {name: child.listen() for name, child in self._sides.items()}
        self.environment: dict[str, Any] = greetings["head"]["environment"]
        first, second = (greetings[name]["benchmarks"] for name in ("base", "head"))
        self.names = [name for name in first if name in second]
        self.only_base = [name for name in first if name not in second]
        self.only_head = [name for name in second if name not in first]
        unknown = [name for name in inject if name not in self.names]
        if unknown:
            raise UserError(f"--inject {unknown[0]}: no such benchmark; {near_miss(unknown[0], self.names)}")
        self._opened: dict[str, dict[str, Any]] = {}
        self._attempts: Counter[str] = Counter()

    def measure(self, name: str, run: int) -> Compared:
        """One benchmark, looked at until it is known; `run` seeds the order of the sides.

        Each look is at other places in memory, so what these are worth does not decide.
        """
        rule = RULES[self._device]

        def take(look: int) -> PairedTimes:
            if look:
                self._opened.pop(name)
            return self._take(name, rule.timing(run))

        try:
            units = self._open(name)["units"]
            verdict, looks = judge_rounds(take, rule, seed=run, units=units)
            opening = self._opened[name]
        except ChildFailed as error:
            self._opened.pop(name, None)
            return Compared(name, None, str(error), failed=True)
        last = looks[-1]
        notes = [*opening["notes"], *_throttling(last.times)]
        if len(looks) > 1:
            notes.append(f"looks: {', then '.join(str(look.change) for look in looks)}")
        return Compared(
            name=name,
            verdict=verdict,
            note="; ".join(notes),
            change=last.change,
            base_ms=last.base_ms,
            head_ms=median(last.times.samples["head"]),
            rounds=len(last.times.samples["base"]),
            tokens=opening["tokens"],
            looks=tuple(look.verdict for look in looks),
        )

    def forget(self, name: str) -> None:
        """Give back what an opened benchmark holds."""
        if self._opened.pop(name, None) is not None:
            for child in self._sides.values():
                child.ask("close", name=name)

    def _open(self, name: str) -> dict[str, Any]:
        """What head answers when the benchmark is opened on both sides, unless it is open."""
        if name in self._opened:
            return self._opened[name]
        attempt = self._attempts[name]
        self._attempts[name] += 1
        inject = {"base": 0.0, "head": self._inject.get(name, 0.0)}
        # One after the other: what is opened is also timed once.
        opened = {
            side: child.ask("open", name=name, inject=inject[side], attempt=attempt)
            for side, child in self._sides.items()
        }
        if opened["base"]["mode"] != opened["head"]["mode"]:
            modes = ", ".join(f"{side} {answer['mode']}" for side, answer in opened.items())
            raise ChildFailed("both", f"launched in different ways: {modes}; {opened['head']['notes']}")
        self._opened[name] = opened["head"]
        return opened["head"]

    def _take(self, name: str, settings: TimingSettings) -> PairedTimes:
        mode = self._open(name)["mode"]

        def sample(side: str) -> float:
            return float(self._sides[side].ask("sample", name=name)["ms"])

        sides = list(self._sides)
        return run_rounds(sides, ["base"], sample, settings, mode=mode, read=self._conditions)

    def _conditions(self) -> Conditions | None:
        found = self._sides["base"].ask("conditions")["conditions"]
        if found is None:
            return None
        return Conditions(**{**found, "throttle_reasons": tuple(found["throttle_reasons"])})


def _throttling(times: PairedTimes) -> list[str]:
    reasons = {reason for block in times.conditions if block for reason in block.throttle_reasons}
    return [f"throttled: {', '.join(sorted(reasons))}"] if reasons else []


def compare_checkouts(
    base: Path,
    head: Path,
    device: str,
    *,
    inject: Mapping[str, float],
    runs: int,
    only: Sequence[str],
    say: Callable[[str], None],
) -> tuple[list[list[Compared]], dict[str, Any]]:
    """The outcomes of each run over all benchmarks, and the environment both sides share.

    Both processes live through all runs. Raises UserError if a side has no benchmarks to run, or a name of
    `only` or `inject` is none of them.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mocbench-compare-")))

        def start(side: str, checkout: Path) -> Child:
            child = Child(side, checkout, device, folder / f"{side}.log")
            stack.callback(child.close)
            return child

        first, second = start("base", base), start("head", head)
        try:
            pair = Pair(first, second, device, inject)
        except ChildFailed as error:
            raise UserError(f"cannot compare: {error}") from error
        names = _chosen(pair.names, only)
        outcomes = [list(_one_run(pair, names, run, keep_open=runs > 1, say=say)) for run in range(runs)]
        if not only:
            outcomes[0] += [Compared(name, None, "only base has it") for name in pair.only_base]
            outcomes[0] += [Compared(name, None, "only head has it") for name in pair.only_head]
        return outcomes, pair.environment


def _one_run(
    pair: Pair, names: Sequence[str], run: int, *, keep_open: bool, say: Callable[[str], None]
) -> Iterator[Compared]:
    for name in names:
        outcome = pair.measure(name, run)
        if not keep_open:
            pair.forget(name)
        say(f"{outcome.verdict or 'none':5} {name:24} {outcome.change or ''} {outcome.note}".rstrip())
        yield outcome


def _chosen(names: Sequence[str], only: Sequence[str]) -> list[str]:
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UserError(f"--only {unknown[0]}: no such benchmark; {near_miss(unknown[0], names)}")
    if not names:
        raise UserError("cannot compare: the two sides have no benchmark in common")
    return [name for name in names if not only or name in only]
