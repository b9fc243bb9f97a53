"""`mocbench compare BASE HEAD`: did the code become slower?

Code (revisions, checkouts) is run side by side, see `harness.regression.compare.checkouts`; what is on disk
is compared as it is, see `harness.regression.compare.stored`. Verdicts: `harness.regression.compare.verdict`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harness.errors import UserError
from harness.regression.compare.checkouts import compare_checkouts
from harness.regression.compare.sides import checked_out, find_sides
from harness.regression.compare.stored import compare_stored
from harness.regression.compare.summary import Comparison, write


def compare(
    base: str,
    head: str,
    device: str,
    *,
    output: Path,
    inject: Mapping[str, float],
    runs: int,
    only: Sequence[str],
    say: Callable[[str], None],
) -> int:
    """Compare, write the summary into `output`, say what came out; the exit code.

    `device` is "cpu" or "cuda". `inject` makes head do that share more work in a benchmark, which tests the
    judge. Raises UserError for sides that cannot be compared.
    """
    first, second = find_sides(base, head)
    command = " ".join(["mocbench compare", base, head, *(f"--inject {n}={f:g}" for n, f in inject.items())])
    if first.is_code:
        with checked_out(first, second) as (base_path, head_path):
            outcomes, environment = compare_checkouts(
                base_path, head_path, device, inject=inject, runs=runs, only=only, say=say
            )
    elif inject or only or runs > 1:
        raise UserError("--inject, --runs and --only are for code, which is run; these sides are on disk")
    else:
        stored, environment = compare_stored(first, second)
        outcomes, device = [stored], environment["device"]
    comparison = Comparison(first.label, second.label, command, device, environment, outcomes)
    for path in write(comparison, output):
        say(f"wrote {path}")
    say(comparison.sentence())
    return comparison.exit_code


def parse_injections(texts: Sequence[str]) -> dict[str, float]:
    """`NAME=0.03` of the command line. Raises UserError for anything else."""
    found = {}
    for text in texts:
        name, equals, share = text.partition("=")
        try:
            found[name] = float(share)
        except ValueError:
            found[name] = -1.0
        if not equals or not found[name] > 0:
            raise UserError(f"--inject {text}: expected NAME=SHARE, such as ffn-step-dense=0.03")
    return found
