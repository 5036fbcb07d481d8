"""Which routers a replica starts and ends while the service goes from one version to the next."""

from __future__ import annotations

from cluster.router_versions import VersionChange, version_change


def change(wanted: set[int], ready: set[int], *, failed: set[int] = frozenset(), starting: int | None = None):  # type: ignore[no-untyped-def, assignment]
    return version_change(wanted=wanted, ready=ready, failed=failed, starting=starting)


def test_a_missing_version_is_started_beside_the_other_one() -> None:
    assert change({1}, {1}) == VersionChange(start=None, stop=())
    assert change({1, 2}, {1}) == VersionChange(start=2, stop=())
    assert change({1, 2}, {2}) == VersionChange(start=1, stop=()), "streams of the old one may still need it"


def test_one_start_at_a_time_and_none_again_where_it_failed() -> None:
    assert change({1, 2}, {1}, starting=2).start is None
    assert change({1, 2}, {1}, failed={2}).start is None


def test_what_nobody_wants_ends_but_never_the_last_router() -> None:
    assert change({2}, {1, 2}) == VersionChange(start=None, stop=(1,))
    assert change({1}, {1, 2}) == VersionChange(start=None, stop=(2,))
    assert change({2}, {1}) == VersionChange(start=2, stop=())
