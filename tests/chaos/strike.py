"""One fault: whom it meets and when, that it fires, and that the service is whole again afterwards."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from conditions import wait_until
from cuttable_proxy import CuttableProxy

from chaos import faults, invariants
from chaos.load import Load
from chaos.record import Injury, StreamRecord
from chaos.scenario import Cut, Fault, Kill, Scenario, Stop
from chaos.target import WHOLE_S, Target
from chaos.view import MemberView, View
from cluster.control.membership import MemberKind, MemberState

# A random moment: after up to so many more tokens of each stream.
MAX_TOKENS_BEFORE = 30
HAS_STREAMS_S = 60.0
NOTICED_S = 30.0
MOVED_ON_S = 150.0
NOTICED_WHEN_STOPPED = (MemberKind.SHARD, MemberKind.ROUTER)


class Strike:
    """Against the streams of one load. whole: the view that there must be before and after."""

    def __init__(self, target: Target, load: Load, proxy: CuttableProxy, *, whole: View, draw: random.Random) -> None:
        self._target = target
        self._load = load
        self._proxy = proxy
        self._whole = whole
        self._draw = draw

    def injure(self, scenario: Scenario) -> Injury:
        """Raises AssertionError where the fault does not fire, finds no stream to hit, or does not heal."""
        before = self._target.whole_view(self._whole)
        victims = self._choose(scenario.fault, before)
        self._load.wait_for_tokens(self._draw.randint(1, MAX_TOKENS_BEFORE * self._load.num_clients))
        streams, hit = self._streams_to_hit(victims)
        at_s = time.monotonic()
        self._inflict(scenario.fault, victims, hit)
        killed = victims if isinstance(scenario.fault, Kill) else []
        after = self._whole_without(killed)
        healed_s = time.monotonic()
        wait_until(lambda: all(each.moved_on_since(healed_s) for each in streams), "all streams go on", MOVED_ON_S)
        hurt = invariants.hurt_bystanders(before.pids(), after.pids(), {each.member_id for each in killed})
        assert not hurt, f"{scenario.name} of {[each.member_id for each in victims]}: {hurt}"
        return Injury(
            scenario=scenario.name,
            victims=tuple(each.member_id for each in victims),
            at_s=at_s,
            healed_s=healed_s,
            hit=tuple(each.request_id for each in hit),
            num_open=len(streams),
            longest_pause_s=max(invariants.longest_pause_s(each, at_s, healed_s) for each in streams),
        )

    def _choose(self, fault: Fault, view: View) -> list[MemberView]:
        match fault:
            case Kill(members=kinds):
                return [self._draw.choice(view.ready(kind)) for kind in kinds]
            case Stop(member=kind):
                return [self._draw.choice(view.ready(kind))]
            case Cut():
                return []

    def _streams_to_hit(self, victims: Sequence[MemberView]) -> tuple[list[StreamRecord], list[StreamRecord]]:
        """All that are open, and those of them that the victims work on: a router that has just come has none yet."""
        found: list[list[StreamRecord]] = [[], []]

        def are_some() -> bool:
            suffering = self._suffering(victims)
            found[0] = self._load.open_streams()
            found[1] = [each for each in found[0] if suffering is None or each.request_id in suffering]
            return bool(found[1])

        wait_until(are_some, f"{[each.member_id for each in victims]} have streams", HAS_STREAMS_S, every_s=0.2)
        return found[0], found[1]

    def _suffering(self, victims: Sequence[MemberView]) -> set[str] | None:
        """Request ids; None: all that are open, for every stream needs all shards, the gateway and its connection."""
        routers = [each for each in victims if each.kind is MemberKind.ROUTER]
        if not routers or len(routers) < len(victims):
            return None
        return set().union(*(self._target.requests_of(each.member_id) for each in routers))

    def _inflict(self, fault: Fault, victims: Sequence[MemberView], hit: Sequence[StreamRecord]) -> None:
        match fault:
            case Kill():
                faults.kill([each.pid for each in victims])
                self._wait_until_seen_dead(victims)
            case Stop(for_s=for_s):
                [victim] = victims
                with faults.stopped(victim.pid):
                    end_s = time.monotonic() + for_s
                    if victim.kind in NOTICED_WHEN_STOPPED:
                        self._wait_until_done_without(victim, hit)
                    wait_until(lambda: time.monotonic() >= end_s, "the time of the stop is over", for_s + 1)
            case Cut():
                faults.cut(self._proxy)

    def _wait_until_seen_dead(self, victims: Sequence[MemberView]) -> None:
        """By the controller, if it is not among them."""
        if any(each.kind is MemberKind.CONTROLLER for each in victims):
            return

        def is_seen() -> bool:
            view = self._target.view()
            return view is not None and not {each.member_id for each in victims} & view.pids().keys()

        wait_until(is_seen, f"{[each.member_id for each in victims]} are seen dead", NOTICED_S)

    def _wait_until_done_without(self, victim: MemberView, hit: Sequence[StreamRecord]) -> None:
        """It is seen to be silent, and every stream that it had to do with has gone on."""

        def is_suspect() -> bool:
            view = self._target.view()
            return view is not None and view.state_of(victim.member_id) is MemberState.SUSPECT

        wait_until(is_suspect, f"{victim.member_id} is a suspect", NOTICED_S)
        seen_s = time.monotonic()
        wait_until(
            lambda: all(each.moved_on_since(seen_s) for each in hit),
            f"all streams go on without {victim.member_id}",
            MOVED_ON_S,
        )

    def _whole_without(self, killed: Sequence[MemberView]) -> View:
        """Until whoever was killed has been replaced."""
        gone = {each.pid for each in killed}
        view: list[View] = []

        def is_whole() -> bool:
            view[:] = [self._target.whole_view(self._whole)]
            return not gone & set(view[0].pids().values())

        wait_until(is_whole, f"{[each.member_id for each in killed]} are replaced", WHOLE_S, every_s=0.2)
        return view[0]
