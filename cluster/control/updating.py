"""The controller's part in updates of the weights: begins one, or says why not, and leads it through its states.

Every state is in the memory before anybody hears of it, so a controller that is reborn goes on with it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from cluster.control.desired_state import DesiredState, Memory, OtherWeights, WeightUpdate
from cluster.control.expert_tier import ExpertTier
from cluster.control.member_report import MemberReport
from cluster.control.membership import MemberId
from cluster.control.shard_fleet import ShardReport
from cluster.control.update_check import differences
from cluster.control.update_plan import Step, UpdateState, UpdateView, next_step, waits_for, wanted_versions
from cluster.control.update_room import Room
from cluster.control.version_book import Members, VersionBook
from cluster.control.weight_lines import WeightLine, lines_of, served_model, switch_changes
from cluster.service_model import resolve
from experts.expert_dtype import ExpertDtype
from experts.hub import resolve_model
from experts.placement import ShardId

logger = logging.getLogger("arriero.controller")


class UpdateRefusedError(ValueError):
    """It cannot begin; the message says why. rooms: where memory is what is missing."""

    def __init__(self, message: str, rooms: tuple[Room, ...] = ()) -> None:
        super().__init__(message)
        self.rooms = rooms


class Updating:
    """All methods belong to one event loop."""

    def __init__(
        self,
        *,
        tier: ExpertTier,
        memory: Memory,
        members: Members,
        num_cores: int,
        clock: Callable[[], float],
        all_known_at_s: float,
        on_news: Callable[[], None],
    ) -> None:
        """all_known_at_s: when everybody who lives has reported to this controller."""
        self._tier = tier
        self._memory = memory
        self._book = VersionBook(members)
        self._num_cores = num_cores
        self._clock = clock
        self._all_known_at_s = all_known_at_s
        self._on_news = on_news
        self._state_began_s = clock()
        self._num_steps = 0
        self._beginning = asyncio.Lock()

    def note(self, member_id: MemberId, report: MemberReport) -> None:
        self._book.note(member_id, report)

    def note_shard(self, shard_id: ShardId, report: ShardReport) -> None:
        self._book.note_shard(shard_id, report)

    def forget(self, member_id: MemberId) -> None:
        self._book.forget(member_id)

    def versions_told(self) -> dict[str, Any]:
        """What every member hears. served: the version that new requests get. wanted: those of which each replica
        should have a router, and a resumed request may be. order: grows with what is told."""
        state = self._memory.state
        other = None if state.other is None else state.other.weights_version
        update_state = None if state.update is None else UpdateState(state.update.state)
        wanted = wanted_versions(update_state, served=state.weights_version, other=other)
        order = [state.term, self._num_steps]
        return {"served": state.weights_version, "wanted": list(wanted), "order": order}

    def line_for_router(self, weights_version: int | None) -> WeightLine:
        """None: the served one. Raises ValueError for a version that no router should have."""
        state = self._memory.state
        version = state.weights_version if weights_version is None else weights_version
        if version not in self.versions_told()["wanted"]:
            raise ValueError(f"weights version {version} is not served")
        return lines_of(state)[version]

    def progress(self, update_id: str) -> dict[str, Any] | None:
        """Under the names of arriero.v1.GetUpdateResponse; of the last one for an empty id. None when it is unknown."""
        update = self._memory.state.update
        if update is None or update_id not in ("", update.update_id):
            return None
        waiting = waits_for(self._view(update))
        return {**msgspec.structs.asdict(update), "waits_for": list(waiting)}

    async def begin(self, model: str, *, dry_run: bool) -> dict[str, Any]:
        """update_id (empty with dry_run), the number of the new version, and what it takes in each memory. Raises
        UpdateRefusedError, and ValueError or OSError for a model that is none or does not fit."""
        async with self._beginning:
            found = await self._rooms(model)
            version = self._memory.state.last_version + 1
            answer = {"update_id": "", "weights_version": version, "rooms": [room.to_dict() for room in found]}
            lacking = tuple(room for room in found if room.missing_bytes)
            if lacking:
                raise UpdateRefusedError("; ".join(map(str, lacking)), lacking)
            return answer if dry_run else {**answer, "update_id": await self._begin(model, version)}

    async def act(self) -> None:
        """One round; not at the same time as the keeper's."""
        update = self._memory.state.update
        if update is None or UpdateState(update.state).is_over:
            return
        step = next_step(self._view(update))
        if step is not None:
            await self._take(update, step)

    async def _rooms(self, model: str) -> tuple[Room, ...]:
        state = self._memory.state
        if self._tier.keeper is None:
            raise UpdateRefusedError("this service has no shards, or they have not started yet")
        if state.update is not None and not UpdateState(state.update.state).is_over:
            raise UpdateRefusedError(f"{state.update.update_id} is under way, to {state.update.model}")
        await self._check_model(model)
        reason = self._tier.keeper.unrest()
        if reason is not None:
            raise UpdateRefusedError(f"not now: {reason}")
        started = await self._tier.started()
        config = self._tier.config
        dtype = ExpertDtype.chosen(resolve(config, started.model, self._num_cores).dtype, config.expert_dtype)
        slot_bytes = started.model.expert_shape.slot_bytes(dtype)
        try:
            return self._book.rooms(self._tier.epoch.placement.slots_by_shard, slot_bytes)
        except ValueError as error:
            raise UpdateRefusedError(f"not now: {error}") from None

    async def _check_model(self, model: str) -> None:
        wanted = await asyncio.to_thread(resolve_model, model)
        served = await asyncio.to_thread(resolve_model, served_model(self._memory.state))
        if wanted.resolve() == served.resolve():
            raise UpdateRefusedError(f"the service has the weights of {model} already")
        found = await asyncio.to_thread(differences, served, wanted)
        if found:
            raise ValueError(f"model {model} cannot take the place of {served}: {'; '.join(found)}")

    async def _begin(self, model: str, version: int) -> str:
        update = WeightUpdate(
            update_id=f"update-{secrets.token_hex(3)}",
            model=model,
            weights_version=version,
            state=UpdateState.LOADING,
        )
        other = OtherWeights(weights_version=version, model=model)
        await self._memory.change(update=update, other=other, last_version=version)
        self._state_began_s, self._num_steps = self._clock(), self._num_steps + 1
        logger.info("%s: weights version %d, of %s", update.update_id, version, model)
        self._on_news()
        return update.update_id

    async def _take(self, update: WeightUpdate, step: Step) -> None:
        after = msgspec.structs.replace(update, state=step.state, reason=step.reason or update.reason)
        await self._memory.update(lambda state: {**_other_changes(state, step.state), "update": after})
        self._state_began_s, self._num_steps = self._clock(), self._num_steps + 1
        log = logger.info if step.reason is None else logger.warning
        log("%s: %s%s", update.update_id, step.state, f": {step.reason}" if step.reason else "")
        self._on_news()

    def _view(self, update: WeightUpdate) -> UpdateView:
        state = self._memory.state
        update_state = UpdateState(update.state)
        lines = lines_of(state)
        new = update.weights_version
        old = next((version for version in lines if version != new), None)
        new_line = lines.get(new)
        view = UpdateView(
            state=update_state,
            is_loaded=new_line is not None and new_line.epoch is not None,
            old_routers={} if old is None else self._book.routers(old),
            new_routers=self._book.routers(new),
            gateways_behind=() if old is None else self._book.gateways_behind(old),
            all_known=self._clock() >= self._all_known_at_s,
        )
        return replace(view, failure=self._failure(view, new))

    def _failure(self, view: UpdateView, version: int) -> str | None:
        keeper = self._tier.keeper
        known = (None if keeper is None else keeper.failure_of(version)) or self._book.failure(version)
        if known is not None:
            return known
        timeout_s = self._tier.config.start_timeout_s
        if self._clock() - self._state_began_s <= timeout_s:
            return None
        waiting = ", ".join(waits_for(view)) or "the shards"
        return f"{view.state} has taken more than {timeout_s:g} s: {waiting}"


def _other_changes(state: DesiredState, reached: UpdateState) -> Mapping[str, Any]:
    """What becomes of the versions when an update reaches this state."""
    if reached is UpdateState.DRAINING:
        return switch_changes(state)
    return {"other": None} if reached.is_over else {}
