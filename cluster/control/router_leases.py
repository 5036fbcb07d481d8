"""Which epoch each router uses, by its own word, and until when that counts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster.control.epoch_view import LEASE_S, RouterView
from cluster.control.membership import MemberId
from experts.placement import ShardId


class RouterLeases:
    """A router's every report renews its lease."""

    def __init__(self) -> None:
        self._routers: dict[MemberId, RouterView] = {}

    def note(self, router_id: MemberId, lanes: Mapping[str, Any], now_s: float) -> bool:
        """lanes: as router.lane_state.LaneState.to_dict makes it. Whether it tells more than that the router lives."""
        told = RouterView(
            epoch=lanes["epoch"],
            lease_until_s=now_s + LEASE_S,
            prepared=lanes["prepared"],
            unreachable=frozenset(map(ShardId, lanes["unreachable"])),
            masked=frozenset(map(ShardId, lanes["lost"])),
            masked_s=now_s,
        )
        known = self._routers.get(router_id)
        if known is not None and (known.epoch, known.masked) == (told.epoch, told.masked):
            told = replace(told, masked_s=known.masked_s)
        self._routers[router_id] = told
        return known is None or replace(known, lease_until_s=told.lease_until_s) != told

    def forget(self, router_id: MemberId) -> None:
        """The router has ended."""
        self._routers.pop(router_id, None)

    def get(self, router_id: MemberId) -> RouterView | None:
        return self._routers.get(router_id)

    def views(self) -> dict[MemberId, RouterView]:
        return dict(self._routers)
