"""Where scenarios are played: one service, the same asks over and over, and what must come of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from conditions import wait_until
from cuttable_proxy import CuttableProxy
from holdings import Holdings, holdings, parent

from chaos import invariants
from chaos.load import Ask, Load, draw_asks, running_load
from chaos.record import Injury, StreamRecord
from chaos.scenario import Cut, Scenario
from chaos.strike import Strike
from chaos.target import Target
from chaos.view import View
from cluster.control.membership import MemberKind

SETTLED_S = 60.0

Tell = Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Of one scenario: filled while it is played."""

    scenario: Scenario
    injuries: list[Injury] = field(default_factory=list)
    num_streams: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def violations(self) -> list[str]:
        return [f"lost: {each}" for each in self.lost] + [f"wrong: {each}" for each in self.wrong]


class Arena:
    """Everything that is drawn is drawn from the seed. begin() first."""

    def __init__(self, target: Target, *, num_streams: int, max_tokens: int, seed: int, tell: Tell) -> None:
        self._target = target
        self._draw = random.Random(seed)
        self._asks: Sequence[Ask] = draw_asks(num_streams, max_tokens, self._draw)
        self._tell = tell
        self.outcomes: list[Outcome] = []
        self._reference: list[list[int]] = []
        self._whole: View = View(())

    def begin(self) -> None:
        """Plays the undisturbed run, twice. Raises AssertionError when one is not like the other."""
        self._whole = self._target.whole_view()
        first, second = self._undisturbed("first"), self._undisturbed("second")
        differences = invariants.not_reproducible(first, second)
        assert not differences, f"the undisturbed run cannot be had twice: {differences}"
        self._reference = first

    def play(self, scenario: Scenario) -> Outcome:
        """Raises AssertionError where a fault does not fire, finds no stream to hit, or does not heal; what happened to
        the streams is in the outcome, which is among the outcomes even then."""
        outcome = Outcome(scenario=scenario)
        self.outcomes.append(outcome)
        label = f"{scenario.name}-{len(self.outcomes)}"
        proxy = CuttableProxy(int(self._target.grpc_address.rpartition(":")[2]))
        address = f"127.0.0.1:{proxy.port}" if isinstance(scenario.fault, Cut) else self._target.grpc_address
        resume = scenario.clients_resume
        try:
            with running_load(address, self._target.application, self._asks, label=label, resume=resume) as load:
                load.wait_until_all_began()
                strike = Strike(self._target, load, proxy, whole=self._whole, draw=self._draw)
                try:
                    for _ in range(scenario.times):
                        outcome.injuries.append(strike.injure(scenario))
                        self._tell(outcome.injuries[-1].sentence)
                finally:
                    load.stop()
                    self._judge(outcome, load.finish())
        finally:
            proxy.close()
        return outcome

    def rest(self) -> Mapping[str, Holdings]:
        """Waits until every block and slot is where it was; returns what the processes hold then."""
        self._target.wait_until_idle()
        return holdings(self._pids(self._target.whole_view(self._whole)))

    def check_given_back(self, before: Mapping[str, Holdings]) -> None:
        """Waits until descriptors and memory are back, too. Raises AssertionError with what is not."""
        found: list[str] = []

        def is_back() -> bool:
            found[:] = invariants.not_given_back(before, self.rest())
            return not found

        try:
            wait_until(is_back, "descriptors and memory are back", SETTLED_S, every_s=1.0)
        except AssertionError as error:
            raise AssertionError(f"{error}: {found}") from None

    def _undisturbed(self, label: str) -> list[list[int]]:
        target = self._target
        load = Load(target.grpc_address, target.application, self._asks, label=f"undisturbed-{label}", num_rounds=1)
        try:
            records = load.finish()
        finally:
            load.close()
        assert not invariants.lost(records), invariants.lost(records)
        longest_s = max(invariants.longest_pause_s(each, 0.0, float("inf")) for each in records)
        self._tell(f"undisturbed, {label} run: {len(records)} streams, longest pause {longest_s:.2f} s")
        return [record.token_ids for record in records]

    def _judge(self, outcome: Outcome, records: Sequence[StreamRecord]) -> None:
        outcome.num_streams = len(records)
        outcome.lost = invariants.lost(records)
        outcome.wrong = invariants.wrong(records, self._reference)
        for violation in outcome.violations:
            self._tell(violation)

    def _pids(self, view: View) -> dict[str, int]:
        """A router's Serve replica, its engine's parent, is shown beside it."""
        routers = view.ready(MemberKind.ROUTER)
        return view.pids() | {f"{each.member_id} (replica)": parent(each.pid) for each in routers}
