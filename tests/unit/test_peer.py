"""How long a lane waits for a shard, look by look."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from experts.peer import LOOKS, Patience, Peer
from experts.placement import ShardId

PATIENCE = Patience(timeout_s=10.0, silence_s=1.0)
LOOK_S = PATIENCE.look_s


class Waiting:
    """A peer that was asked at 0 s, to be answered by timeout_s."""

    def __init__(self) -> None:
        self.link = SimpleNamespace(progress=0, sending=False)
        self.peer = Peer(shard_id=ShardId("shard-0"), link=self.link, dtype=torch.float32)  # type: ignore[arg-type]
        self.ask()

    def ask(self) -> None:
        self.peer.add(SimpleNamespace(deadline=PATIENCE.timeout_s))  # type: ignore[arg-type]

    def look(self, now: float, passed_s: float = LOOK_S) -> str | None:
        return self.peer.complaint(PATIENCE, now=now, passed_s=passed_s, waiting_since=0.0)


def test_a_link_that_stands_still_is_borne_for_the_silence_and_no_longer() -> None:
    waiting = Waiting()
    complaints = [waiting.look(number * LOOK_S) for number in range(LOOKS + 1)]
    assert complaints == [None] * LOOKS + ["no sign of work for 1 s"]


def test_any_progress_begins_the_silence_anew() -> None:
    waiting = Waiting()
    for number in range(5 * LOOKS):
        waiting.link.progress += number % LOOKS == 0
        assert waiting.look(number * LOOK_S) is None


def test_silence_before_a_request_does_not_count() -> None:
    waiting = Waiting()
    for number in range(LOOKS):
        assert waiting.look(number * LOOK_S) is None
    waiting.peer.requests.clear()
    waiting.ask()
    assert waiting.look(LOOKS * LOOK_S) is None


def test_only_the_time_that_counts_is_silence() -> None:
    """A router that was itself stopped for a minute says that two looks' time has passed."""
    waiting = Waiting()
    assert waiting.look(1.0) is None
    assert waiting.look(9.0, passed_s=2 * LOOK_S) is None


def test_one_at_work_at_its_deadline_gets_as_long_again_and_no_more() -> None:
    waiting = Waiting()
    waiting.look(9.0)
    assert waiting.look(10.1) == "no answer within 10 s"
    waiting.link.progress += 1
    assert waiting.look(10.1) is None
    waiting.link.progress += 1
    assert waiting.look(20.1) == "no answer within 10 s"


@pytest.mark.parametrize(("timeout_s", "silence_s", "named"), [(0.0, 1.0, "timeout_s"), (1.0, -1.0, "silence_s")])
def test_times_must_be_positive(timeout_s: float, silence_s: float, named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} must be positive"):
        Patience(timeout_s=timeout_s, silence_s=silence_s)
