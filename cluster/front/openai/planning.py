"""From the requests of the OpenAI API to generations: which calls they become, and what their answers look like."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.front.generate_call import GenerateCall, Prompt, TextPrompt, TokenPrompt
from cluster.front.generator import Generator, SeedSource
from cluster.front.openai.answer_form import AnswerHead, AskedPrompt
from cluster.front.openai.api_error import ApiError
from cluster.front.openai.chat_answer import ChatAnswer
from cluster.front.openai.chat_request import ChatRequest
from cluster.front.openai.completion_answer import CompletionAnswer
from cluster.front.openai.completion_request import CompletionRequest
from cluster.front.openai.generation import Generation
from cluster.front.openai.generation_request import GenerationRequest
from cluster.front.openai.served_model import ServedModel
from cluster.front.openai.token_texts import TokenTexts
from cluster.front.openai.translation import (
    chat_prompt,
    chat_sampling,
    completion_prompts,
    completion_sampling,
    generate_call,
)
from cluster.front.openai.usage_tally import UsageTally
from cluster.front.tokenizer import Tokenizer

# JSON's numbers are exact to 53 bits in most languages; seeds have 63.
DROPPED_SEED_BITS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """max_choices: of one request, over all its prompts."""

    generator: Generator
    tokenizer: Tokenizer
    seeds: SeedSource
    model: ServedModel
    max_choices: int

    def chat(self, request: ChatRequest, *, request_id: str, num_bytes: int) -> Generation:
        """May tokenize. Raises ApiError, ValueError naming field and value."""
        prompt, asked = self._asked(request, chat_prompt(request.messages))
        [call] = self._calls(request, [prompt], chat_sampling(request), request_id=request_id, num_bytes=num_bytes)
        head = self._head(f"chatcmpl-{request_id}", [call])
        form = ChatAnswer(request, head=head, prompt=asked, tokens=self._token_texts(request))
        return Generation(request=request, calls=[call], form=form, tally=_tally([asked]))

    def completion(self, request: CompletionRequest, *, request_id: str, num_bytes: int) -> Generation:
        """May tokenize. Raises ApiError, ValueError naming field and value."""
        prompts = completion_prompts(request)
        self._check_choices(len(prompts), request)
        both = [self._asked(request, prompt, echo=bool(request.echo)) for prompt in prompts]
        asked = [shown for _, shown in both]
        sampling = completion_sampling(request)
        calls = self._calls(
            request, [prompt for prompt, _ in both], sampling, request_id=request_id, num_bytes=num_bytes
        )
        form = CompletionAnswer(
            request,
            head=self._head(f"cmpl-{request_id}", calls),
            prompts=asked,
            tokens=self._token_texts(request),
            new_detokenizer=self.tokenizer.detokenizer,
        )
        tally = _tally(asked, counts_output=not request.is_echo_only)
        return Generation(request=request, calls=calls, form=form, tally=tally)

    def _check_choices(self, num_prompts: int, request: GenerationRequest) -> None:
        total = num_prompts * request.num_choices
        if num_prompts > 1 and total > self.max_choices:
            n = request.num_choices
            raise ApiError(
                400,
                f"prompt: {num_prompts} prompts with n {n} make {total} choices, the limit is {self.max_choices}",
                param="prompt",
            )

    def _asked(self, request: GenerationRequest, prompt: Prompt, *, echo: bool = False) -> tuple[Prompt, AskedPrompt]:
        """The prompt to generate from, tokenized already where the answer has to show its tokens or their number."""
        options = request.stream_options
        counts = options is not None and options.continuous_usage_stats
        if not (echo or request.return_token_ids or counts):
            return prompt, AskedPrompt()
        token_ids = self.generator.encode(prompt)
        text = ""
        if echo:
            text = prompt.text if isinstance(prompt, TextPrompt) else self._text_of(token_ids)
        return TokenPrompt(token_ids=token_ids), AskedPrompt(text=text, token_ids=token_ids)

    def _text_of(self, token_ids: Sequence[int]) -> str:
        detokenizer = self.tokenizer.detokenizer()
        return detokenizer.push(token_ids) + detokenizer.finish()

    def _calls(
        self,
        request: GenerationRequest,
        prompts: Sequence[Prompt],
        sampling: dict[str, Any],
        *,
        request_id: str,
        num_bytes: int,
    ) -> list[GenerateCall]:
        """Without a seed of the client's every prompt gets its own: equal prompts are asked for unequal answers. One
        version of the weights answers all of them."""
        version = self.generator.weights_version
        names = [request_id] if len(prompts) == 1 else [f"{request_id}-{index}" for index in range(len(prompts))]
        return [
            generate_call(
                request,
                prompt,
                sampling,
                request_id=name,
                seed=self.seeds.draw() >> DROPPED_SEED_BITS if request.seed is None else request.seed,
                num_bytes=num_bytes // len(prompts),
                weights_version=version,
            )
            for name, prompt in zip(names, prompts, strict=True)
        ]

    def _head(self, answer_id: str, calls: Sequence[GenerateCall]) -> AnswerHead:
        seeds = {call.seed for call in calls}
        return AnswerHead(
            id=answer_id,
            created=int(time.time()),
            model=self.model.name,
            system_fingerprint=self.model.fingerprint_of(calls[0].weights_version or 0),
            seed=seeds.pop() if len(seeds) == 1 else None,
        )

    def _token_texts(self, request: GenerationRequest) -> TokenTexts:
        return TokenTexts(self.tokenizer, by_id=bool(request.return_tokens_as_token_ids))


def _tally(asked: Sequence[AskedPrompt], *, counts_output: bool = True) -> UsageTally:
    num_prompt_tokens = sum(len(prompt.token_ids) for prompt in asked)
    return UsageTally(num_prompt_tokens=num_prompt_tokens, counts_output=counts_output)
