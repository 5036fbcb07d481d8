"""Which routers a replica starts and ends, for the versions that the controller wants. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionChange:
    """start: one at a time, None for none. stop: routers that nobody needs."""

    start: int | None
    stop: tuple[int, ...]


def version_change(
    *, wanted: Collection[int], ready: Collection[int], failed: Collection[int], starting: int | None
) -> VersionChange:
    """What a version failed at is not tried again. The last router of a replica stays until another one is ready."""
    missing = sorted(set(wanted) - {*ready, *failed})
    start = missing[0] if missing and starting is None else None
    stop = tuple(sorted(set(ready) - set(wanted))) if set(ready) & set(wanted) else ()
    return VersionChange(start=start, stop=stop)
