"""What to do next about a rebalance under way, decided from what is known. Pure; see epoch_plan.py for the rest."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from cluster.control.epoch_rest import is_same, unrest
from cluster.control.epoch_view import EpochView, Preparation
from cluster.control.movement import Movement
from experts.placement import ExpertPlacement


def watched(view: EpochView) -> Movement | None:
    """The view's movement, with another deadline where something has moved forward since it was watched last."""
    movement = _open_movement(view)
    return view.movement if movement is None else movement.watched(_progress(view), view.now_s)


def next_stage(view: EpochView) -> ExpertPlacement | None:
    """The placement that can be prepared now."""
    movement = _open_movement(view)
    if movement is None or reason_to_give_up(view) is not None or unrest(view) is not None:
        return None
    return movement.next_placement


def reason_to_give_up(view: EpochView) -> str | None:
    """Why the movement must not go on, its epoch in preparation included; None where it may, or there is none."""
    movement = _open_movement(view)
    if movement is None:
        return None
    if not is_same(view.target, movement.base):
        return "what the shards should hold has changed meanwhile"
    if view.now_s > movement.due_s:
        return f"nothing has moved forward for {movement.stall_s:g} s: {', '.join(_waited_for(view))}"
    return None


def has_come_about(view: EpochView) -> bool:
    """The last stage is in force, and what only the one before needed is dropped."""
    movement = _open_movement(view)
    return movement is not None and movement.next_placement is None and unrest(view) is None


def _open_movement(view: EpochView) -> Movement | None:
    return view.movement if view.movement is not None and view.movement.is_open else None


def _progress(view: EpochView) -> Hashable:
    """Anything that changes while a movement comes along."""
    ready = frozenset[str]() if view.preparing is None else view.preparing.ready
    loaded = tuple((shard_id, shard.num_loaded) for shard_id, shard in view.shards.items())
    routers = frozenset((router_id, router.epoch, router.prepared) for router_id, router in view.routers.items())
    return view.number, ready, loaded, routers


def _waited_for(view: EpochView) -> Iterator[str]:
    if view.preparing is None:
        yield unrest(view) or "not begun"
    else:
        yield from _not_prepared(view, view.preparing)


def _not_prepared(view: EpochView, preparing: Preparation) -> Iterator[str]:
    for shard_id in preparing.placement.slots_by_shard:
        if shard_id not in preparing.ready:
            yield f"{shard_id} has not loaded"
    for router_id, router in view.routers.items():
        if router in view.leased and preparing.number not in (router.prepared, router.epoch):
            yield f"{router_id} is not connected"
