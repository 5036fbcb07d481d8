"""The tokens of one HTTP request, over all its prompts."""

from __future__ import annotations

from cluster.front.generate_call import Chunk, Usage
from cluster.front.openai.payloads import PromptTokensDetails, UsagePayload


class UsageTally:
    """num_prompt_tokens: known beforehand only where ``so_far`` is asked for. counts_output: false where what is
    generated is thrown away."""

    def __init__(self, *, num_prompt_tokens: int = 0, counts_output: bool = True) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._counts_output = counts_output
        self._num_received = 0
        self._usages: list[Usage] = []

    def add(self, chunk: Chunk) -> None:
        self._num_received += len(chunk.delta.token_ids)
        if chunk.usage is not None:
            self._usages.append(chunk.usage)

    def so_far(self) -> UsagePayload:
        return self._payload(self._num_prompt_tokens, self._num_received, 0)

    def whole(self) -> UsagePayload:
        """Once every prompt has come to its end."""
        return self._payload(
            sum(usage.prompt_tokens for usage in self._usages),
            sum(usage.completion_tokens for usage in self._usages),
            sum(usage.cached_tokens for usage in self._usages),
        )

    def _payload(self, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> UsagePayload:
        completion_tokens = completion_tokens if self._counts_output else 0
        return UsagePayload(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )
