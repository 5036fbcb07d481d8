"""The latest report of each member, and what those have left behind that are gone. Pure: time comes in, in seconds."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.control.member_report import MemberReport, OpenChoice
from cluster.control.membership import MemberId
from cluster.metrics.merge import ServiceNumbers, with_departed
from cluster.metrics.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    report: MemberReport
    taken_s: float


class ReportBook:
    """Counters of a member that is closed still count, so that no sum over members ever goes back."""

    def __init__(self, departed: Snapshot) -> None:
        """departed: as an earlier book had it."""
        self.departed = departed
        self._entries: dict[MemberId, _Entry] = {}

    def take(self, member_id: MemberId, report: MemberReport, now_s: float) -> None:
        """Replaces the member's report before. A member that was closed must not report again."""
        self._entries[member_id] = _Entry(report=report, taken_s=now_s)

    def close(self, member_id: MemberId) -> bool:
        """The member is gone. Whether that has changed ``departed``."""
        entry = self._entries.pop(member_id, None)
        if entry is None:
            return False
        self.departed = with_departed(self.departed, entry.report.metrics)
        return True

    def numbers(self) -> ServiceNumbers:
        living = {str(member_id): entry.report.metrics for member_id, entry in self._entries.items()}
        return ServiceNumbers(living=living, departed=self.departed)

    def open_choices(self, now_s: float, *, at_most: int) -> tuple[int, list[tuple[MemberId, OpenChoice]]]:
        """How many are open in all gateways, and the oldest of them with their gateways, oldest first."""
        num_open = sum(entry.report.num_open_choices for entry in self._entries.values())
        found = [
            (member_id, _aged(choice, now_s - entry.taken_s))
            for member_id, entry in self._entries.items()
            for choice in entry.report.open_choices
        ]
        found.sort(key=lambda pair: -pair[1].age_s)
        return num_open, found[:at_most]


def _aged(choice: OpenChoice, seconds: float) -> OpenChoice:
    return replace(choice, age_s=choice.age_s + seconds, idle_s=choice.idle_s + seconds)
