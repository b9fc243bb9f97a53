"""Errors that the user can mend, and the words that name what was wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A mistake that the user can mend: an option, a path, a database, a sweep. The message is one line."""


class SpecError(UserError):
    """A sweep file that cannot be run."""


def near_miss(name: str, valid: Iterable[str]) -> str:
    """`; did you mean X?` if something valid is close, else `; valid: ...`."""
    options = list(valid)
    close = difflib.get_close_matches(str(name), options, n=1)
    return f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(options)}"


def short(value: Any) -> str:
    """A value in an error message: as Python writes it, and no longer than 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
