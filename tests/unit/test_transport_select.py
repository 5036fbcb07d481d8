"""How a router decides by what rows travel. The shard is real, a thread of the test."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch

from experts.epoch import Epoch, ShardAddress
from experts.placement import ExpertPlacement, ShardId
from experts.server import ShardServer
from experts.shard import Shard
from experts.transport.base import LinkError
from experts.transport.host_id import host_id
from experts.transport.names import LANE_TRANSPORTS, LaneTransport
from experts.transport.select import connector

SECRET = b"secret"


@pytest.fixture
def address() -> Iterator[ShardAddress]:
    shard = Shard(shard_id=ShardId("s"), slots={}, hidden_size=8, dtype=torch.float32)
    server = ShardServer(shard, secret=SECRET)
    server.start()
    yield server.address("node")
    server.stop()
    assert server.wait_closed(10)


def transport_to(address: ShardAddress, name: LaneTransport) -> str:
    link = connector(name)(address, lane_id="lane", secret=SECRET, timeout_s=10)
    link.close()
    return link.transport


def elsewhere(address: ShardAddress) -> ShardAddress:
    return replace(address, host_id="another machine net:[1]")


@pytest.mark.parametrize(("name", "wanted"), [("auto", "shm"), ("shm", "shm"), ("tcp", "tcp")])
def test_a_shard_on_this_host_is_reached_as_it_is_said(address: ShardAddress, name: LaneTransport, wanted: str) -> None:
    assert transport_to(address, name) == wanted


def test_a_shard_elsewhere_is_reached_by_tcp(address: ShardAddress, caplog: pytest.LogCaptureFixture) -> None:
    # Its Unix socket could be reached, but that is not for the router to try.
    assert transport_to(elsewhere(address), "auto") == "tcp"
    assert transport_to(replace(address, host_id=None, unix_name=None), "auto") == "tcp"
    assert caplog.records == []


def test_a_shard_elsewhere_is_not_reached_by_memory_alone(address: ShardAddress) -> None:
    with pytest.raises(LinkError, match="phase connect: the shard is on another host"):
        transport_to(elsewhere(address), "shm")


def test_memory_that_cannot_be_had_is_told_and_tcp_taken(
    address: ShardAddress, caplog: pytest.LogCaptureFixture
) -> None:
    clone = replace(address, unix_name="a name that nobody has here")
    assert transport_to(clone, "auto") == "tcp"
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "shard s (127.0.0.1:" in record.message
    assert "Connection refused" in record.message
    with pytest.raises(LinkError, match=r"phase connect: .*Connection refused"):
        transport_to(clone, "shm")


def test_a_shard_that_is_reached_by_nothing_is_an_error(address: ShardAddress) -> None:
    with pytest.raises(LinkError, match="phase connect"):
        transport_to(replace(address, unix_name="nobody", port=1), "auto")


def test_every_name_has_a_connector_and_no_other() -> None:
    assert get_args(LaneTransport) == LANE_TRANSPORTS
    assert len({connector(name) for name in LANE_TRANSPORTS}) == 3
    with pytest.raises(ValueError, match="lane_transport must be one of auto, shm, tcp, not 'nccl'"):
        connector("nccl")  # type: ignore[arg-type]


def test_the_host_is_told_by_its_boot_and_its_network() -> None:
    found = host_id()
    assert found is not None
    boot_id, namespace = found.split()
    assert len(boot_id) == 36
    assert namespace.startswith("net:[")
    assert host_id() == found


def test_an_epoch_carries_where_its_shards_sit(address: ShardAddress) -> None:
    epoch = Epoch(
        number=1, weights_version=0, shards=(address,), placement=ExpertPlacement(slots_by_shard={address.shard_id: ()})
    )
    assert Epoch.from_dict(epoch.to_dict()) == epoch
    assert address.unix_name is not None
    assert address.host_id == host_id()
