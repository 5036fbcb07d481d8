"""Whether an engine is slow to answer or deep in one step: what the log should say of it. Pure: time comes in."""

from __future__ import annotations

from router.messages import Heartbeat


class EngineWatch:
    """Names each trouble when it begins and again whenever it has lasted twice as long."""

    def __init__(self, *, silent_after_s: float, slow_after_s: float) -> None:
        self._first_s = {"silent": silent_after_s, "slow": slow_after_s}
        self._patience_s = dict(self._first_s)

    def complaints(self, *, silence_s: float, heartbeat: Heartbeat | None) -> list[str]:
        """silence_s: since the engine process was last heard, of which heartbeat was the last."""
        found = []
        if self._is_new("silent", silence_s):
            found.append(f"the engine process has been silent for {silence_s:.1f} s")
        step_s = 0.0 if heartbeat is None else heartbeat.step_s
        if heartbeat is not None and self._is_new("slow", step_s):
            stats = heartbeat.stats
            found.append(
                f"step {heartbeat.step} has taken {step_s:.1f} s so far, with {stats.num_running} running and "
                f"{stats.num_waiting} waiting sequences before it"
            )
        return found

    def _is_new(self, trouble: str, lasting_s: float) -> bool:
        if lasting_s < self._first_s[trouble]:
            self._patience_s[trouble] = self._first_s[trouble]
        if lasting_s < self._patience_s[trouble]:
            return False
        while self._patience_s[trouble] <= lasting_s:
            self._patience_s[trouble] *= 2
        return True
