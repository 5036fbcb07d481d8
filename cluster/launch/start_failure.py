"""Why a service did not start, in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

# The last line of a traceback, the exception itself: "router.capacity.CapacityError: ...".
EXCEPTION_LINE = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Timeout|Died|Failed)\w*): (\S.*)$")
# These only say that something else went wrong in another process.
WRAPPERS = frozenset({"RayTaskError", "RayActorError", "ActorDiedError", "RuntimeError"})


def start_failure(messages: Sequence[str]) -> str:
    """The innermost cause in the messages: Ray and Serve put the tracebacks of other processes into theirs.

    The last exception line of the last message that has one and is not a mere wrapper's counts; without any, the
    first line there is.
    """
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    found = [match for match in map(EXCEPTION_LINE.match, lines) if match is not None]
    causes = [match for match in found if match[1] not in WRAPPERS] or found
    if causes:
        return causes[-1][2]
    return lines[0] if lines else "for no reason that Ray would tell"
