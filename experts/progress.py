"""How far a load has come, for whoever waits for it."""

from __future__ import annotations

import logging
from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do, in any unit, after each piece."""

_STEPS = 10


def log_progress(logger: logging.Logger, what: str) -> Progress:
    """A line in the log for each tenth."""
    next_step = 1

    def progress(done: int, total: int) -> None:
        nonlocal next_step
        if total and done * _STEPS >= next_step * total:
            next_step = done * _STEPS // total + 1
            logger.info("loading %s: %d%%", what, 100 * done // total)

    return progress
