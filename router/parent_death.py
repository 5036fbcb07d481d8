"""How a child process ends with its parent, whatever happens to the parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(parent_pid: int, sent_signal: signal.Signals = signal.SIGKILL) -> None:
    """Has the kernel send this process ``sent_signal`` when the thread that started it ends.

    Of the thread, not of the process: start the child from a thread that lives as long as the child should.
    The parent may have died before the kernel knew our wish, so its pid is compared afterwards; where it is not
    our parent any more the signal is sent at once. On other systems than Linux this does nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, sent_signal.value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG, {sent_signal.name}): {os.strerror(error)}")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), sent_signal)
