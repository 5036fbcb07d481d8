"""What an operator may say about how rows travel. Free of torch: the configuration needs it."""

from __future__ import annotations

from typing import Literal, get_args

# auto: shm between two ends on one host, tcp between others.
LaneTransport = Literal["auto", "shm", "tcp"]
LANE_TRANSPORTS: tuple[LaneTransport, ...] = get_args(LaneTransport)
