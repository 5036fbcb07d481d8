"""What an update does next, state by state, and what it waits for."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.control.membership import MemberId
from cluster.control.update_plan import Step, UpdateState, UpdateView, next_step, waits_for, wanted_versions

OLD = {MemberId("r1"): "a", MemberId("r2"): "b"}
NEW = {MemberId("r3"): "a", MemberId("r4"): "b"}
HALF = {MemberId("r3"): "a"}
G = (MemberId("g1"),)


def view(state: str, **values: Any) -> UpdateView:
    return UpdateView(state=UpdateState(state), **values)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (view("loading"), None),
        (view("loading", is_loaded=True), "starting_routers"),
        (view("starting_routers", old_routers=OLD), None),
        (view("starting_routers", old_routers=OLD, new_routers=HALF), None),
        (view("starting_routers", old_routers=OLD, new_routers=NEW), "draining"),
        (view("starting_routers", old_routers=OLD, new_routers=NEW, all_known=False), None),
        (view("starting_routers", new_routers=NEW), None),
        (view("draining", old_routers=OLD, new_routers=NEW, gateways_behind=G), None),
        (view("draining", old_routers=OLD, new_routers=NEW, all_known=False), None),
        (view("draining", old_routers=OLD, new_routers=NEW), "retiring"),
        (view("retiring", old_routers=OLD, new_routers=NEW), None),
        (view("retiring", new_routers=NEW), "done"),
        (view("withdrawing", old_routers=OLD, new_routers=HALF), None),
        (view("withdrawing", old_routers=OLD), "given_up"),
        (view("done", old_routers=OLD), None),
        (view("given_up", new_routers=NEW), None),
    ],
)
def test_each_state_ends_when_what_it_waits_for_has_come_about(before: UpdateView, after: str | None) -> None:
    assert next_step(before) == (None if after is None else Step(state=UpdateState(after)))


@pytest.mark.parametrize("state", list(UpdateState))
def test_a_failure_ends_an_update_before_the_new_version_answers_anybody_and_never_after(state: UpdateState) -> None:
    everything = {"is_loaded": True, "old_routers": OLD, "new_routers": NEW, "gateways_behind": G}
    step = next_step(view(state, failure="no room", **everything))
    if state in (UpdateState.LOADING, UpdateState.STARTING_ROUTERS):
        assert step == Step(state=UpdateState.WITHDRAWING, reason="no room")
    else:
        assert step is None


def test_what_is_waited_for_is_named() -> None:
    everybody = {"old_routers": OLD, "new_routers": HALF, "gateways_behind": G}
    assert waits_for(view("starting_routers", **everybody)) == ("r2",)
    assert waits_for(view("draining", **everybody)) == G
    assert waits_for(view("retiring", **everybody)) == ("r1", "r2")
    assert waits_for(view("withdrawing", **everybody)) == ("r3",)
    assert waits_for(view("done", **everybody)) == ()


def test_a_replica_has_routers_of_both_versions_only_while_both_may_be_needed() -> None:
    both = [state for state in UpdateState if wanted_versions(state, served=1, other=2) == (1, 2)]
    assert both == [UpdateState.STARTING_ROUTERS, UpdateState.DRAINING]
    assert wanted_versions(UpdateState.RETIRING, served=2, other=1) == (2,)
    assert wanted_versions(None, served=1, other=None) == (1,)
