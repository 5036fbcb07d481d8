"""What is done to a running service: data only."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.control.membership import MemberKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """SIGKILL to one member of each of these kinds, at once. A router's process is its engine."""

    members: tuple[MemberKind, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """SIGSTOP to one member, and SIGCONT after at least for_s, once it is seen that everybody does without it."""

    member: MemberKind
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Every connection between the clients and the service is reset."""


Fault = Kill | Stop | Cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One kind of fault, so many times, one after the other, each when the view is whole."""

    name: str
    fault: Fault
    times: int = 1

    @property
    def clients_resume(self) -> bool:
        """Clients may only try again where their own call breaks: nothing else may be hidden by that."""
        match self.fault:
            case Kill(members=members):
                return MemberKind.GATEWAY in members
            case Stop():
                return False
            case Cut():
                return True


def kill(*members: MemberKind, times: int = 1) -> Scenario:
    return Scenario(name=f"kill-{'-and-'.join(members)}", fault=Kill(members=members), times=times)


def stop(member: MemberKind, for_s: float, times: int = 1) -> Scenario:
    return Scenario(name=f"stop-{member}-{for_s:g}s", fault=Stop(member=member, for_s=for_s), times=times)


def cut(times: int = 1) -> Scenario:
    return Scenario(name="cut-clients", fault=Cut(), times=times)


# An engine that is silent for a minute is replaced; whoever wakes before must come back as it is.
SHORT = (
    kill(MemberKind.SHARD),
    kill(MemberKind.CONTROLLER),
    kill(MemberKind.ROUTER),
    stop(MemberKind.SHARD, for_s=2),
    stop(MemberKind.ROUTER, for_s=2),
    cut(),
)
LONG = (
    kill(MemberKind.SHARD, times=5),
    kill(MemberKind.ROUTER, times=5),
    kill(MemberKind.CONTROLLER, times=5),
    kill(MemberKind.CONTROLLER, MemberKind.SHARD, times=2),
    kill(MemberKind.GATEWAY, times=2),
    stop(MemberKind.SHARD, for_s=30),
    stop(MemberKind.ROUTER, for_s=5, times=2),
    stop(MemberKind.ROUTER, for_s=30),
    stop(MemberKind.CONTROLLER, for_s=5),
    cut(times=2),
)
