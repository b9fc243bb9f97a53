"""Studies of grids: they show the rows in the dashboard and never delay a measurement."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from harness.search.storage import Storage, StorageError
from harness.search.study import GridStudy
from harness.store.files import RowStore
from harness.store.leases import Claims
from harness.store.rows import DevicePoint
from harness.sweep.model import Part, Sweep
from harness.sweep.point import Point


class Mirror:
    """The studies of a sweep's grids, updated from the rows that any worker writes.

    One process at a time updates a study, or two runners would both add a point. The first update restores a
    study that is lost.
    """

    def __init__(
        self,
        sweep: Sweep,
        parts: Iterable[tuple[Part, list[Point]]],
        store: RowStore,
        storage: Storage,
        claims: Claims,
        device: str,
    ) -> None:
        """`parts` are every part of the sweep with its grid points, `device` is cpu or cuda."""
        self._store = store
        self._claims = claims
        self._studies: list[tuple[GridStudy, dict[str, Point]]] = [
            (GridStudy(sweep, part, storage, device, points), {point.key: point for point in points})
            for part, points in parts
            if part.optimize is None
        ]
        self._shown: dict[DevicePoint, str] = {}

    def update(self) -> bool:
        """Add what has been begun and finished since the last update; False if the storage is away.

        Then the next update, here or in a later run, adds it: no row depends on a study.
        """
        try:
            for grid, points in self._studies:
                with self._claims.alone(f"study:{grid.study.name}"):
                    # First the leases, then the rows: a point is released after its rows are written.
                    held = self._claims.held()
                    status = {at: new for at, new in self._store.finished().items() if at[1] in points}
                    rows = self._news(status)
                    grid.sync(rows, [points[key] for key in points.keys() & (held | rows.keys())], held)
                    grid.study.fail_stale(lambda: held)  # noqa: B023 - called at once
                    self._shown |= status
        except (StorageError, OSError) as error:
            logging.getLogger(__name__).warning("the study could not be updated: %s", error)
            return False
        return True

    def _news(self, status: Mapping[DevicePoint, str]) -> dict[str, list[dict[str, Any]]]:
        """Rows by point key, of points whose outcome has not been shown before."""
        rows: dict[str, list[dict[str, Any]]] = {}
        for device_name in {device_name for device_name, _ in status}:
            fresh = [at for at, new in status.items() if self._shown.get(at) != new]
            rows |= self._store.current(device_name, [key for name, key in fresh if name == device_name])
        return rows
