"""What must hold of a recorded run, whatever happened in it. Pure: checks return sentences, none if all is well."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from holdings import Holdings

from chaos.record import StreamRecord

# Idle connections that Ray opens and closes as it likes.
FD_SLACK = 4
MEMORY_FRACTION = 0.05
# Buffers of sizes that an allocator has not met before; oneDNN keeps code for every number of rows it has met.
MEMORY_SLACK_BYTES = 32 * 2**20

Tokens = Sequence[int]


def lost(records: Iterable[StreamRecord]) -> list[str]:
    """Requests that did not end exactly once and in order."""
    records = list(records)
    found = [f"{each.request_id}: {each.error}" for each in records if each.error is not None]
    found += [
        f"{each.request_id}: {each.num_finishes} ends after {len(each.token_ids)} tokens"
        for each in records
        if each.error is None and each.num_finishes != 1
    ]
    twice = [name for name, count in Counter(each.request_id for each in records).items() if count > 1]
    return found + [f"{name}: recorded twice" for name in twice]


def wrong(records: Iterable[StreamRecord], reference: Sequence[Tokens]) -> list[str]:
    """Streams that ended in order, with other tokens than the undisturbed ones of the same ask, or degraded ones."""
    found = []
    for each in records:
        wanted = reference[each.ask]
        if each.error is None and each.num_finishes == 1 and list(each.token_ids) != list(wanted):
            found.append(f"{each.request_id} (ask {each.ask}): {_difference(each.token_ids, wanted)}")
        if each.is_degraded:
            found.append(f"{each.request_id} (ask {each.ask}): degraded")
    return found


def not_reproducible(first: Sequence[Tokens], second: Sequence[Tokens]) -> list[str]:
    """Asks that got other tokens in the second undisturbed run than in the first."""
    pairs = enumerate(zip(first, second, strict=True))
    return [f"ask {ask}: {_difference(other, one)}" for ask, (one, other) in pairs if list(one) != list(other)]


def longest_pause_s(record: StreamRecord, from_s: float, until_s: float) -> float:
    """The longest time without a message that ends after from_s and begins before until_s; the time before the first
    message counts, too."""
    moments = [record.opened_s, *record.arrivals_s]
    if record.ended_s is not None:
        moments.append(record.ended_s)
    gaps = [after - before for before, after in itertools.pairwise(moments) if after > from_s and before < until_s]
    return max(gaps, default=0.0)


def hurt_bystanders(before: Mapping[str, int], after: Mapping[str, int], replaced: Collection[str]) -> list[str]:
    """Members, by their pids, that are gone or another process though they are not among those that had to be."""
    return [
        f"{name}: process {pid} has become {after.get(name)}"
        for name, pid in before.items()
        if name not in replaced and after.get(name) != pid
    ]


def not_given_back(before: Mapping[str, Holdings], after: Mapping[str, Holdings]) -> list[str]:
    """Processes, by member id, that hold more than before. One that came since is measured by those of its kind, which
    the id begins with, that were there before."""
    found = []
    for name, now in after.items():
        then = before.get(name) or _most([each for other, each in before.items() if _kind(other) == _kind(name)])
        found += [f"{name}: {sentence}" for sentence in _excess(then, now)]
    return found


def _excess(then: Holdings, now: Holdings) -> list[str]:
    found = []
    if now.num_fds > then.num_fds + FD_SLACK:
        found.append(f"{now.num_fds} descriptors, {then.num_fds} before")
    if now.memory_bytes > then.memory_bytes * (1 + MEMORY_FRACTION) + MEMORY_SLACK_BYTES:
        found.append(f"{now.memory_bytes / 2**20:.0f} MiB, {then.memory_bytes / 2**20:.0f} MiB before")
    return found


def _most(some: Sequence[Holdings]) -> Holdings:
    """Raises ValueError for none: a kind of process that was not there before."""
    return Holdings(
        num_fds=max(each.num_fds for each in some),
        num_sockets=max(each.num_sockets for each in some),
        memory_bytes=max(each.memory_bytes for each in some),
    )


def _kind(member_id: str) -> str:
    return member_id.partition("-")[0] + (" (replica)" if member_id.endswith("(replica)") else "")


def _difference(tokens: Tokens, wanted: Tokens) -> str:
    pairs = enumerate(zip(tokens, wanted, strict=False))
    place = next((index for index, (one, other) in pairs if one != other), min(len(tokens), len(wanted)))
    return f"differs from token {place} on: {len(tokens)} tokens, {len(wanted)} wanted"
