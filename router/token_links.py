"""The engine process's links to all gateways: which tokens go where."""

from __future__ import annotations

from collections.abc import Iterable

from router.messages import Abort, RequestAttempt, SequenceOutput, TokenBatch, encode
from router.token_link import LinkLimits, TokenLink
from router.token_opening import MAX_BATCH_BYTES


class TokenLinks:
    """One link per gateway, made when a request first names it. Belongs to the engine loop's thread."""

    def __init__(
        self,
        *,
        router_id: str,
        secret: bytes,
        limits: LinkLimits | None = None,
        max_batch_bytes: int = MAX_BATCH_BYTES,
    ) -> None:
        self._router_id = router_id
        self._secret = secret
        self._limits = limits or LinkLimits()
        self._max_batch_bytes = max_batch_bytes
        self._links: dict[str, TokenLink] = {}
        self._aborts: list[tuple[str, Abort]] = []

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(self._links)

    @property
    def have_backlog(self) -> bool:
        return any(link.has_backlog for link in self._links.values())

    def open(self, address: str) -> None:
        """Starts to connect unless that was done before. Raises ValueError if address is not host:port."""
        if address not in self._links:
            self._links[address] = TokenLink(
                address, router_id=self._router_id, secret=self._secret, limits=self._limits
            )

    def tell_begun(self, address: str, begun: list[RequestAttempt]) -> None:
        """Requests that the engine has taken, to the gateway that has sent them; never waits."""
        self._links[address].send(encode(TokenBatch(router_id=self._router_id, begun=begun)))

    def send(self, address: str, outputs: list[SequenceOutput]) -> list[SequenceOutput]:
        """One batch to one gateway that has been opened; never waits. A lost gateway is told by ``poll``.

        Returns the outputs that were not sent because each alone is larger than a gateway takes.
        """
        batch = encode(TokenBatch(router_id=self._router_id, outputs=outputs))
        if len(batch) <= self._max_batch_bytes:
            self._links[address].send(batch)
            return []
        if len(outputs) == 1:
            return outputs
        middle = len(outputs) // 2
        return self.send(address, outputs[:middle]) + self.send(address, outputs[middle:])

    def poll(self) -> dict[str, str]:
        """Moves what can be moved, both ways. Forgets lost links and returns their addresses, each with the reason."""
        for address, link in self._links.items():
            self._aborts += [(address, abort) for abort in link.poll()]
        lost = {address: link.lost for address, link in self._links.items() if link.lost is not None}
        self._forget(lost)
        return lost

    def take_aborts(self) -> list[tuple[str, Abort]]:
        """What gateways have said since the last time, each with its gateway's address."""
        aborts, self._aborts = self._aborts, []
        return aborts

    def close(self, timeout_s: float) -> None:
        """Hangs up on all gateways, each once it has its tokens, or after timeout_s. Idempotent."""
        for link in self._links.values():
            link.close(timeout_s)
        self._forget(tuple(self._links))

    def _forget(self, addresses: Iterable[str]) -> None:
        for address in addresses:
            del self._links[address]
