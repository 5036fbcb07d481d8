"""SIGTERM to a process that others still need: it goes on, and says that it wants to go."""

from __future__ import annotations

import logging
import os
import signal
from types import FrameType

logger = logging.getLogger(__name__)


class LeavingSignal:
    """From now on the first SIGTERM is only noted; the second one ends the process."""

    def __init__(self) -> None:
        """Raises ValueError outside of the main thread."""
        self.has_come = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.has_come:
            os._exit(128 + number)
        logger.warning("told to end (SIGTERM): this process serves until it is replaced; once more ends it at once")
        self.has_come = True
