"""The queue from which the worker threads of one process take their work."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
# Pause before work that another process holds is tried again.
WAIT_SECONDS = 1.0


class Work(Generic[Item]):
    """A queue whose items can be put back, and which ends for all threads when one of them fails.

    Iterating takes items until none is left, and waits for those that were put back with `wait`.
    """

    def __init__(self) -> None:
        self._left: deque[Item] = deque()
        self._waiting: deque[tuple[float, Item]] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def add(self, item: Item) -> None:
        """Append an item."""
        with self._changed:
            self._left.append(item)

    def put_back(self, item: Item, *, wait: bool) -> None:
        """Append an item that is not done; with `wait` it can be taken only after `WAIT_SECONDS`."""
        with self._changed:
            if wait:
                self._waiting.append((time.monotonic() + WAIT_SECONDS, item))
            else:
                self._left.append(item)
            self._changed.notify()

    def __iter__(self) -> Iterator[Item]:
        while (item := self._take()) is not None:
            yield item

    def _take(self) -> Item | None:
        with self._changed:
            while self._error is None and (self._left or self._waiting):
                if self._left:
                    return self._left.popleft()
                due, item = self._waiting[0]
                if due <= time.monotonic():
                    self._waiting.popleft()
                    return item
                self._changed.wait(due - time.monotonic())
        return None

    def fail(self, error: BaseException) -> None:
        """End the queue with an error: no thread takes another item."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def raise_error(self) -> None:
        """Raise the first error given to `fail`, if there is one."""
        if self._error is not None:
            raise self._error
