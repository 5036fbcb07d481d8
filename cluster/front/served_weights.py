"""The weights versions that a gateway may bind requests to, as the controller tells them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.front.errors import ServiceError, StatusCode


class ServedWeights:
    """current: what new requests get."""

    def __init__(self, told: Mapping[str, Any]) -> None:
        """told: see Updating.versions_told."""
        self.take(told)

    def take(self, told: Mapping[str, Any]) -> None:
        self.current: int = told["served"]
        self._at_hand = frozenset(told["wanted"])

    def bind(self, wanted: int | None, *, is_resumed: bool) -> int:
        """The version of a request that asks for this one. What is resumed has tokens of it, so no other will do.

        Raises ServiceError.
        """
        if wanted is None or wanted in self._at_hand:
            return self.current if wanted is None else wanted
        if is_resumed:
            raise ServiceError(
                StatusCode.FAILED_PRECONDITION,
                f"weights_version: {wanted} is not served any more: send the request again without resume_token_ids",
            )
        return self.current
