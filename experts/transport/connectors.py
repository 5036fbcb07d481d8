"""The transports that leave a process, by name: one place to add one and to choose from."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from experts.transport.base import Connector
from experts.transport.tcp import connect as connect_tcp

CONNECTORS: Mapping[str, Connector] = MappingProxyType({"tcp": connect_tcp})
