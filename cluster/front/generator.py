"""Generation as the gateway offers it, whatever the protocol: from a client's call to a stream of chunks."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from cluster.front.admission import ServiceLimits, check_call, check_prompt, plan_choices
from cluster.front.chat import turn_end_ids
from cluster.front.chat_encoder import EncodeChat, chat_encoder
from cluster.front.choice_progress import ChoiceProgress
from cluster.front.choice_text import ChoiceText
from cluster.front.errors import ServiceError, StatusCode
from cluster.front.generate_call import ChatPrompt, Chunk, GenerateCall, Origin, Prompt, TextPrompt, Usage
from cluster.front.journal import ChoiceJournal, ChoicePlan, Delta
from cluster.front.open_requests import OpenRequests
from cluster.front.relay import Relay, RelayLimits, Routers, TokenPath
from cluster.front.served_weights import ServedWeights
from cluster.front.stop_matcher import StopMatcher, StopStrings
from cluster.front.tokenizer import Tokenizer
from router.sampling_params import MAX_SEED

# Larger calls are tokenized in a thread: the event loop has other streams to feed.
MAX_INLINE_BYTES = 16 * 1024


class SeedSource:
    """Draws seeds for requests that bring none: reproducibly from a seed of its own, or from the system."""

    def __init__(self, seed: int | None, *, gateway_index: int) -> None:
        """gateway_index tells gateways apart, which would otherwise all draw the same."""
        self._random = random.Random(f"{seed}/{gateway_index}") if seed is not None else secrets.SystemRandom()

    def draw(self) -> int:
        return self._random.randint(0, MAX_SEED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A call that has passed all checks."""

    request_id: str
    seed: int
    prompt_ids: list[int]
    journals: list[ChoiceJournal]


class Generator:
    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        encode_chat: EncodeChat | None = None,
        limits: ServiceLimits,
        routers: Routers,
        tokens: TokenPath,
        relay_limits: RelayLimits,
        seeds: SeedSource,
        requests: OpenRequests | None = None,
        weights: ServedWeights | None = None,
    ) -> None:
        """encode_chat: Llama 4's format unless given. requests: where those that are under way are looked after.
        weights: the versions that there are; one alone unless given."""
        self._weights = weights or ServedWeights({"served": 0, "wanted": [0]})
        self._requests = requests or OpenRequests()
        self._tokenizer = tokenizer
        self._encode_chat = encode_chat or chat_encoder(tokenizer, None)
        self._turn_end_ids = turn_end_ids(tokenizer)
        self._limits = limits
        self._routers = routers
        self._tokens = tokens
        self._relay_limits = relay_limits
        self._seeds = seeds

    @property
    def weights_version(self) -> int:
        """That new requests get."""
        return self._weights.current

    def encode(self, prompt: Prompt) -> list[int]:
        """Raises ValueError naming what is wrong with the prompt."""
        match prompt:
            case TextPrompt():
                add_begin = prompt.add_begin_of_text
                return self._tokenizer.encode_prompt(prompt.text) if add_begin else self._tokenizer.encode(prompt.text)
            case ChatPrompt():
                return self._encode_chat(prompt.messages)
            case _:
                return prompt.token_ids

    def decode(self, token_ids: Sequence[int], *, keep_special_tokens: bool) -> str:
        """Raises ValueError for ids outside the vocabulary, and without a tokenizer."""
        for token_id in token_ids:
            if token_id >= self._limits.vocab_size:
                raise ValueError(f"token_ids must be below {self._limits.vocab_size}, not {token_id}")
        return self._tokenizer.decode(token_ids, keep_special_tokens=keep_special_tokens)

    def refuse(self, origin: Origin, error: ServiceError) -> None:
        """Counts and logs a request that did not even become a call."""
        self._requests.refuse(origin, error)

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Chunk]:
        """Raises ServiceError. Leaving the iteration aborts the request."""
        with self._requests.observe(call) as observer:
            try:
                if call.num_bytes > MAX_INLINE_BYTES:
                    accepted = await asyncio.to_thread(self._accept, call)
                else:
                    accepted = self._accept(call)
            except ValueError as error:
                raise ServiceError(StatusCode.INVALID_ARGUMENT, str(error)) from None
            # With nothing in between: reports tell the versions of open requests, and of those that may come.
            version = self._weights.bind(call.weights_version, is_resumed=bool(call.resumed))
            for journal in accepted.journals:
                journal.weights_version = version
            observer.accepted(accepted.request_id, len(accepted.prompt_ids), accepted.journals)
            async with aclosing(self._stream(accepted, observer.progress)) as chunks:
                async for chunk in chunks:
                    observer.sending(chunk.delta)
                    yield chunk

    def _accept(self, call: GenerateCall) -> Accepted:
        check_call(call, self._limits)
        call = self._with_turn_ends(call)
        if call.stop and not self._tokenizer.has_text:
            raise ValueError("stop must be empty for a model without a tokenizer.json: use stop_token_ids")
        prompt_ids = self.encode(call.prompt)
        check_prompt(prompt_ids, self._limits)
        request_id = call.request_id or secrets.token_hex(16)
        seed = self._seeds.draw() if call.seed is None else call.seed
        # A name of its own: the same request may still be running for a gateway that has died.
        engine_id = f"{request_id}/{secrets.token_hex(4)}"
        plans = plan_choices(call, prompt_ids, seed=seed, engine_id=engine_id, limits=self._limits)
        stop_strings = StopStrings(call.stop) if call.stop else None
        return Accepted(
            request_id=request_id,
            seed=seed,
            prompt_ids=prompt_ids,
            journals=[ChoiceJournal(plan, self._choice_text(call, plan, stop_strings)) for plan in plans],
        )

    def _with_turn_ends(self, call: GenerateCall) -> GenerateCall:
        """A chat's answer ends with either of them, though a checkpoint's configuration may know of one alone."""
        if not isinstance(call.prompt, ChatPrompt) or call.sampling.get("ignore_eos"):
            return call
        stop_token_ids = (*call.sampling.get("stop_token_ids", ()), *self._turn_end_ids)
        return replace(call, sampling={**call.sampling, "stop_token_ids": stop_token_ids})

    def _choice_text(self, call: GenerateCall, plan: ChoicePlan, stop_strings: StopStrings | None) -> ChoiceText:
        stop = None
        if stop_strings is not None:
            stop = StopMatcher(stop_strings, include=call.include_stop_str_in_output)
        return ChoiceText(self._tokenizer.detokenizer(), stop=stop, min_tokens=plan.params.min_tokens)

    async def _stream(self, accepted: Accepted, progress: Sequence[ChoiceProgress]) -> AsyncGenerator[Chunk]:
        relay = Relay(
            accepted.journals,
            routers=self._routers,
            tokens=self._tokens,
            limits=self._relay_limits,
            progress=progress,
        )
        is_first = is_open = True
        async with aclosing(relay.batches()) as batches:
            async for deltas in batches:
                is_open = not all(journal.is_finished for journal in accepted.journals)
                for delta in deltas:
                    is_last = not is_open and delta is deltas[-1]
                    yield _chunk(accepted, delta, is_first=is_first, is_last=is_last)
                    is_first = False
        if is_open:
            # Every choice had ended before; the client still needs to hear so.
            yield _chunk(accepted, Delta(choice_index=0), is_first=is_first, is_last=True)


def _chunk(accepted: Accepted, delta: Delta, *, is_first: bool, is_last: bool) -> Chunk:
    return Chunk(
        delta=delta,
        request_id=accepted.request_id if is_first else "",
        seed=accepted.seed if is_first else None,
        weights_version=accepted.journals[0].weights_version if is_first else None,
        usage=_usage(accepted) if is_last else None,
    )


def _usage(accepted: Accepted) -> Usage:
    return Usage(
        prompt_tokens=len(accepted.prompt_ids),
        completion_tokens=sum(journal.num_completion_tokens for journal in accepted.journals),
        cached_tokens=accepted.journals[0].num_cached_tokens,
    )
