"""Every way by which a router may reach its shards, by the name under which tests ask for it."""

from __future__ import annotations

from functools import partial

from experts.epoch import ShardAddress
from experts.transport import shm, tcp
from experts.transport.base import Connector, Link
from experts.transport.select import connect_auto
from experts.transport.shm_port import Announcing


def connect_mixed(address: ShardAddress, *, lane_id: str, secret: bytes, timeout_s: float) -> Link:
    """Shards with even and odd numbers by different transports."""
    connect: Connector = shm.connect if int(address.shard_id[-1]) % 2 else tcp.connect
    return connect(address, lane_id=lane_id, secret=secret, timeout_s=timeout_s)


CONNECTORS: dict[str, Connector] = {
    "auto": connect_auto,
    "tcp": tcp.connect,
    "shm": shm.connect,
    # As on machines whose memory does not keep the order of stores.
    "shm-rung": partial(shm.connect, announcing=Announcing.SOCKET),
    "mixed": connect_mixed,
}
