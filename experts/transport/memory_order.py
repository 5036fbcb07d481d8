"""What may be relied upon when two processes look at the same memory.

Publishing needs one order: whoever sees that something was published must also see what was published. On x86 the
machine gives it: stores become visible in the order of the program and loads are done in it (Intel SDM vol. 3,
"Memory Ordering"), and nothing between us and the machine reorders them: each Python statement is a call into
compiled code that cannot know the next one. Elsewhere (Arm, POWER) it takes barriers that Python does not have, so
there nothing is ever concluded from memory alone: every publication is a byte on the socket, whose queue the kernel
guards with a lock, and lock and unlock are the acquire and release that are needed.

Falling asleep needs one thing more, on x86 too: a store that is visible before the load that follows it. That takes
an instruction with a lock prefix, which is a full barrier, and taking a semaphore is one.
"""

from __future__ import annotations

import platform
import threading


def memory_keeps_order() -> bool:
    """Whether stores of one process are seen by another in the order in which they were made."""
    return platform.machine().lower() in ("x86_64", "amd64")


class FullBarrier:
    """Called between a store and a load of another address: the store is visible before the load is done.

    On x86 only. CPython's locks are semaphores (sem_trywait) or compare-and-swap, both a ``lock cmpxchg``.
    """

    __slots__ = ("_acquire", "_release")

    def __init__(self) -> None:
        lock = threading.Lock()
        self._acquire, self._release = lock.acquire, lock.release

    def __call__(self) -> None:
        self._acquire(False)
        self._release()
