"""Points: one row of the grid, fully resolved, with the key that names it and the group it is timed in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from harness.sweep.catalog import FIELDS
from moc.selection import Selection, parse_selection

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Point:
    """Everything that defines one measurement; nothing that depends on the machine it runs on.

    `tokens` is the number of tokens in one step (`batch * seq_len`); `train_tokens` is the whole training
    budget of a `pretrain` point. `data_id` is the fingerprint of tokenised text, so that the same corpus at
    another path is the same point. Fields a workload does not use are None.
    """

    workload: str
    method: str
    selection: str | None  # canonical rule, e.g. "topk:0.1875"; None for dense methods
    preset: str | None
    d_model: int
    d_ffn: int
    n_layers: int
    batch: int
    seq_len: int
    dtype: str
    seed: int
    timing_mode: str = "auto"
    n_heads: int | None = None
    vocab_size: int | None = None
    train_tokens: int | None = None
    eval_tokens: int | None = None
    lr: float | None = None
    data_id: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens in one step."""
        return self.batch * self.seq_len

    @property
    def rule(self) -> Selection | None:
        """The parsed `selection`; None for dense methods. Raises ValueError for text that is no rule."""
        return None if self.selection is None else parse_selection(self.selection)  # which keeps a cache

    @property
    def k(self) -> int | None:
        """Channels kept per token, all for dense methods; None if the rule does not fit the width."""
        try:
            return self.d_ffn if self.rule is None else self.rule.k(self.d_ffn)
        except ValueError:
            return None

    @property
    def k_frac(self) -> float | None:
        """Share of the channels that is kept."""
        return None if self.k is None else self.k / self.d_ffn

    @property
    def columns(self) -> dict[str, Any]:
        """The value of each of `harness.sweep.catalog.FIELDS`."""
        return {field.name: getattr(self, field.name) for field in FIELDS}

    @property
    def key(self) -> str:
        """Content hash over every field that is set: 16 hexadecimal digits."""
        payload = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(payload.encode()).hexdigest()[:16]

    @property
    def group_key(self) -> tuple[Any, ...]:
        """What the methods of one comparison share: everything but method and selection."""
        values = dataclasses.asdict(self)
        return tuple(value for name, value in values.items() if name not in ("method", "selection"))

    @property
    def label(self) -> str:
        """Short text for people: `60m seq 256 moc_reference topk:0.1875`."""
        size = self.preset or f"{self.d_model}x{self.d_ffn}"
        rule = f" {self.selection}" if self.selection else ""
        return f"{self.workload} {size} {self.batch}x{self.seq_len} {self.method}{rule} seed {self.seed}"

    def to_dict(self) -> dict[str, Any]:
        """The set fields, for JSON; `from_dict` reads it back."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Point:
        """Inverse of `to_dict`. Raises ValueError on a field that is missing or unknown."""
        names = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        missing = sorted(required - set(values) - {"selection", "preset"})
        if unknown or missing:
            raise ValueError(f"not a point: unknown fields {unknown}, missing fields {missing}")
        return cls(**{"selection": None, "preset": None, **values})


def group_points(points: Iterable[Point]) -> list[list[Point]]:
    """Points that differ only in method and selection, together; order of first appearance is kept."""
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        groups.setdefault(point.group_key, []).append(point)
    return list(groups.values())
