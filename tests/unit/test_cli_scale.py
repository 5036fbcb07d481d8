"""`arriero scale`: when it is done, and what it says when it cannot begin."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cluster.commands.scale import is_done
from cluster.v1 import admin_pb2


def view(states: Mapping[str, tuple[str, int]]) -> admin_pb2.GetViewResponse:
    """id -> (state, number of slots)"""
    return admin_pb2.GetViewResponse(
        shards=[
            admin_pb2.ShardMember(
                member=admin_pb2.Member(id=name, state=state), slots=[admin_pb2.Slot(layer=1)] * num_slots
            )
            for name, (state, num_slots) in states.items()
        ]
    )


@pytest.mark.parametrize(
    ("states", "done"),
    [
        ({"a": ("ready", 4), "b": ("ready", 4)}, True),
        ({"a": ("ready", 4), "b": ("ready", 4), "x": ("dead", 0)}, True),
        ({"a": ("ready", 4)}, False),
        ({"a": ("ready", 4), "b": ("starting", 0)}, False),
        ({"a": ("ready", 8), "b": ("ready", 0)}, False),
        ({"a": ("ready", 4), "b": ("ready", 4), "c": ("draining", 4)}, False),
        ({"a": ("ready", 4), "b": ("suspect", 4)}, False),
    ],
)
def test_scaling_is_done_when_the_wanted_shards_serve_and_no_other_is_alive(
    states: Mapping[str, tuple[str, int]], done: bool
) -> None:
    assert is_done(view(states), {"a", "b"}) is done
