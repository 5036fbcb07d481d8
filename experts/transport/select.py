"""Which transport a router takes to a shard."""

from __future__ import annotations

import logging
import time

from experts.epoch import ShardAddress
from experts.transport import shm, tcp
from experts.transport.base import Connector, Link, LinkError
from experts.transport.host_id import host_id
from experts.transport.names import LANE_TRANSPORTS, LaneTransport

_LOG = logging.getLogger(__name__)


def connector(transport: LaneTransport) -> Connector:
    """Raises ValueError for a name that is none."""
    connectors: dict[LaneTransport, Connector] = {"auto": connect_auto, "shm": connect_shm, "tcp": tcp.connect}
    if transport not in connectors:
        raise ValueError(f"lane_transport must be one of {', '.join(LANE_TRANSPORTS)}, not {transport!r}")
    return connectors[transport]


def connect_auto(address: ShardAddress, *, lane_id: str, secret: bytes, timeout_s: float) -> Link:
    """shm where the shard sits on this host, else tcp; also, with a warning, where shm does not come about.

    Raises LinkError.
    """
    if address.host_id is None or address.host_id != host_id():
        return tcp.connect(address, lane_id=lane_id, secret=secret, timeout_s=timeout_s)
    started_at = time.monotonic()
    try:
        # Half of the time, so that the other half is left for tcp.
        return shm.connect(address, lane_id=lane_id, secret=secret, timeout_s=timeout_s / 2)
    except LinkError as error:
        _LOG.warning("shard %s is on this host but cannot be had by shm, tcp is tried: %s", address, error)
    left_s = max(0.0, timeout_s - (time.monotonic() - started_at))
    return tcp.connect(address, lane_id=lane_id, secret=secret, timeout_s=left_s)


def connect_shm(address: ShardAddress, *, lane_id: str, secret: bytes, timeout_s: float) -> Link:
    """Raises LinkError, also for a shard on another host."""
    if address.host_id is None or address.host_id != host_id():
        raise LinkError("phase connect: the shard is on another host, which lane_transport shm does not reach")
    return shm.connect(address, lane_id=lane_id, secret=secret, timeout_s=timeout_s)
