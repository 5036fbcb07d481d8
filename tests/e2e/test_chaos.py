"""The short set of scenarios, one after the other against one service: no stream may notice more than a pause, and in
the end everything is back where it was. `make chaos` plays more of them, and longer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
from chaos.arena import Arena
from chaos.scenario import SHORT, Scenario
from chaos.target import Target
from conftest import RunApp
from holdings import Holdings

pytestmark = pytest.mark.cluster

NUM_STREAMS = 12
MAX_TOKENS = 100
SEED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    arena: Arena
    held: Mapping[str, Holdings]


@pytest.fixture(scope="module")
def begun(run_app: RunApp) -> Iterator[Begun]:
    """The undisturbed run has been there twice."""
    options = {"stream_interval_ms": 0, "max_num_batched_tokens": 64}
    with run_app("chaos", routers=2, shards=3, copies=2, **options) as service:
        target = Target(
            grpc_address=service.cluster.grpc_address,
            http_url=f"http://{service.cluster.http_address}/{service.app_name}",
            application=service.app_name,
            admin_token=service.admin_token,
        )
        arena = Arena(target, num_streams=NUM_STREAMS, max_tokens=MAX_TOKENS, seed=SEED, tell=print)
        arena.begin()
        yield Begun(arena=arena, held=arena.rest())
        target.close()


@pytest.mark.parametrize("scenario", SHORT, ids=lambda scenario: scenario.name)
def test_every_stream_ends_once_with_the_tokens_of_the_undisturbed_run(begun: Begun, scenario: Scenario) -> None:
    outcome = begun.arena.play(scenario)
    assert len(outcome.injuries) == scenario.times
    assert not outcome.violations


def test_blocks_slots_descriptors_and_memory_are_back_where_they_were(begun: Begun) -> None:
    begun.arena.check_given_back(begun.held)
