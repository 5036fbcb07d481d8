"""Why a service did not start, in one line."""

from __future__ import annotations

import re

# The last line of a traceback, the exception itself: "router.capacity.CapacityError: ...".
EXCEPTION_LINE = re.compile(r"^(?:\w+\.)*(\w*(?:Error|Exception|Timeout|Died|Failed)\w*): (\S.*)$")
# These only say that something else went wrong in another process.
WRAPPERS = frozenset({"RayTaskError", "RayActorError", "ActorDiedError", "RuntimeError"})


def start_failure(error: BaseException) -> str:
    """The innermost cause that the text of error holds: Ray and Serve put tracebacks of other processes into it.

    Of several exception lines the last that is not a mere wrapper counts; without any, the first line of error.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = [match for match in map(EXCEPTION_LINE.match, lines) if match is not None]
    causes = [match for match in found if match[1] not in WRAPPERS] or found
    if causes:
        return causes[-1][2]
    return lines[0] if lines else type(error).__name__
