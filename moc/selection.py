"""Selection rules: which channels of a token are kept, as a value, as text, and as a number of channels.

The text form is the one used in YAML, tables and code (`topk:0.1875`, `topk:384`, `topk_abs:0.25`, `nm:2:8`,
`threshold:0.5:0.25`). What a rule means exactly is `moc.reference.select_mask`.
"""

from __future__ import annotations

import functools
import re
import struct
from dataclasses import dataclass

from moc.config import near_miss

RULES = ("topk", "topk_abs", "nm", "threshold")
_FLOAT32_MAX = 3.4028234663852886e38  # thresholds are compared in float32
_FORMS = {
    "topk": "topk:FRACTION or topk:COUNT, such as topk:0.1875 or topk:384",
    "topk_abs": "topk_abs:FRACTION or topk_abs:COUNT, such as topk_abs:0.1875 or topk_abs:384",
    "nm": "nm:N:M with 1 <= N < M <= 64, such as nm:2:8",
    "threshold": "threshold:T:CAP with CAP a fraction or a count, such as threshold:0.5:0.25",
}


@dataclass(frozen=True)
class Selection:
    """One selection rule with its numbers; `parse_selection(str(s)) == s`.

    - `topk`: the K largest gates of the row (arXiv 2511.09323, section 3); K is `fraction` or `count`.
    - `topk_abs`: the K largest abs(silu(gate)), the paper's ablation.
    - `nm`: the `n` largest gates in each bank of `m` neighbouring channels.
    - `threshold`: gates above `threshold`; of a row with more than the cap (`fraction` or `count`) the cap
      largest, and what is left out is counted as overflow.

    Raises ValueError when a rule's numbers are missing, out of range, or belong to another rule.
    """

    rule: str
    fraction: float | None = None  # of d_ffn, 0 < fraction <= 1
    count: int | None = None  # channels; kept apart from `fraction`, since 1 and 1.0 mean different things
    n: int | None = None
    m: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"unknown selection rule {self.rule!r}; {near_miss(self.rule, RULES)}")
        if self.rule == "nm":
            self._require(self.fraction is None and self.count is None and self.threshold is None)
            n, m = self.n, self.m
            self._require(n is not None and m is not None and _is_int(n) and _is_int(m) and 1 <= n < m <= 64)
            return
        self._require(self.n is None and self.m is None)
        self._require((self.fraction is None) != (self.count is None))
        if self.fraction is not None:
            self._require(isinstance(self.fraction, float) and 0.0 < self.fraction <= 1.0)
        if self.count is not None:
            self._require(_is_int(self.count) and self.count >= 1)
        if self.rule == "threshold":
            self._require(isinstance(self.threshold, float) and abs(self.threshold) <= _FLOAT32_MAX)
        else:
            self._require(self.threshold is None)

    def _require(self, holds: bool) -> None:
        if not holds:
            given = ", ".join(
                f"{name}={getattr(self, name)!r}"
                for name in ("fraction", "count", "n", "m", "threshold")
                if getattr(self, name) is not None
            )
            raise ValueError(f"selection {self.rule} ({given or 'no numbers'}): expected {_FORMS[self.rule]}")

    def __str__(self) -> str:
        if self.rule == "nm":
            return f"nm:{self.n}:{self.m}"
        budget = str(self.count) if self.count is not None else repr(self.fraction)
        if self.rule == "threshold":
            return f"threshold:{self.threshold!r}:{budget}"
        return f"{self.rule}:{budget}"

    def k(self, d_ffn: int) -> int:
        """K, the number of channels stored per row of `d_ffn` channels.

        `topk`, `topk_abs` and `nm` keep exactly K; `threshold` keeps at most K (its cap). A fraction is
        rounded to the nearest whole number of channels, at least one; a tail bank of t < m channels keeps
        min(n, t).
        Raises ValueError if a count exceeds `d_ffn` or `d_ffn` is not positive.
        """
        if d_ffn < 1:
            raise ValueError(f"selection {self}: d_ffn={d_ffn} must be positive")
        if self.n is not None and self.m is not None:
            return (d_ffn // self.m) * self.n + min(self.n, d_ffn % self.m)
        if self.fraction is not None:
            return max(1, round(self.fraction * d_ffn))
        assert self.count is not None  # one of the two is set, see __post_init__
        if self.count > d_ffn:
            raise ValueError(f"selection {self}: K={self.count} exceeds d_ffn={d_ffn}")
        return self.count

    def k_frac(self, d_ffn: int) -> float:
        """K as a fraction of `d_ffn`, after rounding. Raises as `k` does."""
        return self.k(d_ffn) / d_ffn

    @property
    def two_of_four(self) -> bool:
        """Whether at most two of any four neighbours, counted from a multiple of four, are kept."""
        return self.n is not None and self.m is not None and self.n <= 2 and self.m % 4 == 0

    @property
    def threshold_f32(self) -> float:
        """The threshold rounded to float32: every implementation compares gates with this number."""
        if self.threshold is None:
            raise ValueError(f"selection {self} has no threshold")
        return float(struct.unpack("f", struct.pack("f", self.threshold))[0])


def n_words(d_ffn: int) -> int:
    """Number of 32-bit words of a token's bitmask of kept channels."""
    return (d_ffn + 31) // 32


def required(selection: Selection | None) -> Selection:
    """The selection, for a method that cannot do without. Raises ValueError if it is None."""
    if selection is None:
        raise ValueError("this method needs a selection, such as topk:0.1875")
    return selection


@functools.cache
def parse_selection(text: str) -> Selection:
    """The rule written as `text`; forms in the module's docstring.

    A number with a point or an exponent is a fraction of d_ffn, a bare integer a count of channels.
    Raises ValueError naming the text, what is wrong and what is accepted.
    """
    rule, *numbers = text.split(":")
    if rule not in RULES:
        raise ValueError(f"selection {text!r}: unknown rule {rule!r}; {near_miss(rule, RULES)}")
    problem = f"selection {text!r}: expected {_FORMS[rule]}"
    if len(numbers) != (1 if rule in ("topk", "topk_abs") else 2):
        cap = "; the cap bounds what a row may store" if rule == "threshold" else ""
        raise ValueError(problem + cap)
    try:
        if rule == "nm":
            return Selection("nm", n=_integer(numbers[0]), m=_integer(numbers[1]))
        # -0.0 and 0.0 are equal, so they must print alike
        threshold = float(numbers[0]) + 0.0 if rule == "threshold" else None
        budget = numbers[-1]
        if re.fullmatch(r"\d+", budget):
            return Selection(rule, count=int(budget), threshold=threshold)
        return Selection(rule, fraction=float(budget), threshold=threshold)
    except ValueError as error:
        raise ValueError(problem) from error


def _integer(text: str) -> int:
    if not re.fullmatch(r"\d+", text):  # int() alone would take " 2", "+2" and "1_0"
        raise ValueError(text)
    return int(text)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
