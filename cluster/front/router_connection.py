"""The way back on a router's token connection: the gateway tells it which requests nobody waits for any more."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict

from router.messages import Abort, encode
from router.token_opening import frame

logger = logging.getLogger(__name__)

# Tokens that were on their way when an abort was sent are no reason for another one.
NUM_REMEMBERED = 4096
# As many aborts as no router has requests: one that leaves them unread reads nothing.
MAX_UNREAD_BYTES = 1 << 20


class RouterConnection:
    """An open connection. All happens in the event loop; nothing waits."""

    def __init__(self, router_id: str, writer: asyncio.StreamWriter) -> None:
        self.router_id = router_id
        self._writer = writer
        self._aborted: OrderedDict[tuple[str, int], None] = OrderedDict()

    def abort(self, request_id: str, attempt: int) -> None:
        """Sent once for each attempt. Without effect on a connection that is lost: the router ends what it was for."""
        key = (request_id, attempt)
        if key in self._aborted or self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            logger.warning("%s does not read what it should abort: hanging up", self.router_id)
            self._writer.transport.abort()
            return
        self._aborted[key] = None
        if len(self._aborted) > NUM_REMEMBERED:
            self._aborted.popitem(last=False)
        self._writer.write(frame(encode(Abort(request_id=request_id, attempt=attempt))))
