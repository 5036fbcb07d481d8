"""How one choice of a client's request is named among routers: ``request_id/nonce/index``, whatever request_id holds.

The nonce tells apart requests that clients have given the same request_id.
"""

from __future__ import annotations

from typing import Any

from experts.logs import fields


def log_fields(choice_id: str, **more: object) -> dict[str, Any]:
    """``extra`` of a log line about a choice: the client's own request_id, so that all processes tell of the request
    under one name. An id of another shape stands for itself."""
    request_id, *rest = choice_id.rsplit("/", 2)
    if len(rest) != 2:
        return fields(request_id=choice_id, **more)
    nonce, index = rest
    return fields(request_id=request_id, nonce=nonce, choice=index, **more)
