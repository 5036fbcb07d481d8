"""The controller's memory in Ray's key-value store, which outlives every actor."""

from __future__ import annotations

import asyncio

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from cluster.control.desired_state import DesiredState, decode_state, encode_state

NAMESPACE = b"arriero"


class KvStore:
    """One service's desired state. Every method is a call to Ray's GCS, so it runs in a thread."""

    def __init__(self, app_name: str) -> None:
        self._key = f"{app_name}:desired_state".encode()

    async def load(self) -> DesiredState | None:
        data = await asyncio.to_thread(_internal_kv_get, self._key, namespace=NAMESPACE)
        return None if data is None else decode_state(data)

    async def save(self, state: DesiredState) -> None:
        await asyncio.to_thread(_internal_kv_put, self._key, encode_state(state), namespace=NAMESPACE)

    async def delete(self) -> None:
        await asyncio.to_thread(_internal_kv_del, self._key, namespace=NAMESPACE)
