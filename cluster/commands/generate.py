"""`arriero generate`: one prompt through the service's engine, in this process: no Ray, no server, no shards."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

from cluster.config import ServiceConfig
from cluster.engine_settings import engine_settings
from cluster.flags import add_config_flags, config_from_flags, flag
from cluster.front.admission import MAX_DEFAULT_TOKENS
from cluster.front.chat import ChatMessage, turn_end_ids
from cluster.front.chat_encoder import chat_encoder
from cluster.front.tokenizer import Tokenizer
from cluster.launch.preflight import check_model
from cluster.progress_bar import progress_bars
from cluster.service_model import read_model_config, resolve
from experts.hub import resolve_model
from router.messages import GenerateRequest, SequenceOutput, Start
from router.sampling_params import MAX_SEED, SamplingParams

# Of ServiceConfig, what concerns one engine.
ENGINE_FLAGS = (
    "model",
    "chat_template",
    "dtype",
    "expert_dtype",
    "device",
    "max_model_len",
    "max_num_batched_tokens",
    "num_kv_blocks",
    "block_size",
    "router_threads",
)
REQUEST_ID = "generate"
WEIGHTS_VERSION = 1
SAMPLING_HELP = {
    "temperature": "0 takes the most likely token.",
    "top_p": "Keep the smallest set of tokens with at least this probability.",
    "top_k": "Keep this many most likely tokens; 0 keeps all.",
    "min_p": "Keep tokens at least this likely relative to the most likely one.",
    "repetition_penalty": "Above 1: tokens of prompt and output become less likely.",
    "presence_penalty": "Subtracted once from the logits of tokens in the output.",
    "frequency_penalty": "Subtracted from a token's logit for each time it is in the output.",
    "min_tokens": "No end token before this many tokens.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="A text to go on with.")
    prompt.add_argument("--chat", metavar="TEXT", help="A user's message, put into the model's chat template.")
    prompt.add_argument("--prompt-ids", metavar="IDS", type=token_ids_of, help="Token ids, separated by commas.")
    _add_sampling_flags(parser.add_argument_group("sampling"))
    parser.add_argument("--json", action="store_true", help="Print one JSON object at the end instead of the text.")
    add_config_flags(parser, names=ENGINE_FLAGS)


def _add_sampling_flags(group: Any) -> None:
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    for name, text in SAMPLING_HELP.items():
        default = defaults[name]
        group.add_argument(
            flag(name), type=type(default), default=default, metavar="X", help=f"{text} Default: {default}."
        )
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"Stop after this many tokens. Default: what fits, at most {MAX_DEFAULT_TOKENS}.",
    )
    group.add_argument("--seed", type=int, metavar="N", help="Of the sampling noise. Default: drawn.")
    group.add_argument("--stop-token-ids", type=token_ids_of, default=(), metavar="IDS", help="Tokens that end it too.")
    group.add_argument("--ignore-eos", action="store_true", help="Go on after the model's own end tokens.")


def token_ids_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def run(arguments: argparse.Namespace) -> int:
    params = _sampling_params(arguments)
    config = check_model(_engine_config(arguments))
    folder = resolve_model(config.model)
    resolved = resolve(config, read_model_config(folder), len(os.sched_getaffinity(0)))
    tokenizer = Tokenizer(folder)
    prompt_ids = _prompt_ids(arguments, tokenizer, resolved)
    if arguments.chat is not None and not params.ignore_eos:
        params = replace(params, stop_token_ids=(*params.stop_token_ids, *turn_end_ids(tokenizer)))
    assert resolved.max_model_len is not None, "resolved"
    room = resolved.max_model_len - len(prompt_ids)
    if room < 1:
        raise ValueError(f"the prompt has {len(prompt_ids)} tokens, max_model_len is {resolved.max_model_len}")
    params = replace(params, max_tokens=min(params.max_tokens, room))
    request = GenerateRequest(request_id=REQUEST_ID, prompt_ids=prompt_ids, params=params)
    outputs = _outputs(resolved, request)
    return _print_json(tokenizer, request, outputs) if arguments.json else _print_text(tokenizer, request, outputs)


def _engine_config(arguments: argparse.Namespace) -> ServiceConfig:
    alone = {"shards": 0, "routers": 1, "max_routers": None, "copies": 1, "max_num_seqs": 1}
    return config_from_flags(arguments).model_copy(update=alone)


def _sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    seed = secrets.randbelow(MAX_SEED) if arguments.seed is None else arguments.seed
    return SamplingParams(
        **{name: getattr(arguments, name) for name in SAMPLING_HELP},
        max_tokens=MAX_DEFAULT_TOKENS if arguments.max_tokens is None else arguments.max_tokens,
        seed=seed,
        stop_token_ids=arguments.stop_token_ids,
        ignore_eos=arguments.ignore_eos,
    )


def _prompt_ids(arguments: argparse.Namespace, tokenizer: Tokenizer, config: ServiceConfig) -> list[int]:
    if arguments.prompt_ids is not None:
        return list(arguments.prompt_ids)
    if arguments.chat is not None:
        return chat_encoder(tokenizer, config.chat_template)([ChatMessage.of_text("user", arguments.chat)])
    return tokenizer.encode_prompt(arguments.prompt)


def _outputs(config: ServiceConfig, request: GenerateRequest) -> Iterator[SequenceOutput]:
    """Builds the engine and steps it to the end of the request. Raises ValueError when either cannot be done."""
    # Loads torch: what is wrong with the flags was told before.
    from router.engine_builder import build_engine

    start = Start(
        router_id=REQUEST_ID, settings=engine_settings(config), secret=b"", weights_version=WEIGHTS_VERSION, epoch=None
    )
    with progress_bars() as bar:
        built = build_engine(start, progress=lambda part: bar(f"loading {part}"))
    try:
        built.engine.add(request)
        while built.engine.has_work:
            yield from built.engine.step()
    finally:
        built.close()


def _print_text(tokenizer: Tokenizer, request: GenerateRequest, outputs: Iterable[SequenceOutput]) -> int:
    """The answer on stdout as it comes, ids where there is no tokenizer; what it took on stderr."""
    detokenizer = tokenizer.detokenizer()
    times_s: list[float] = []
    num_tokens, reason = 0, None
    for output in outputs:
        text = detokenizer.push(output.token_ids) if tokenizer.has_text else "".join(f"{i} " for i in output.token_ids)
        print(text, end="", flush=True)
        times_s.append(time.perf_counter())
        num_tokens += len(output.token_ids)
        reason = output.finish_reason
        if output.error is not None:
            print(f"\narriero generate: {output.error}", file=sys.stderr)
            return 1
    print(detokenizer.finish())
    rate = f", {(num_tokens - 1) / (times_s[-1] - times_s[0]):.1f} tokens/s" if num_tokens > 1 else ""
    print(f"[{num_tokens} tokens{rate}, ended by {reason}, seed {request.params.seed}]", file=sys.stderr)
    return 0


def _print_json(tokenizer: Tokenizer, request: GenerateRequest, outputs: Iterable[SequenceOutput]) -> int:
    detokenizer = tokenizer.detokenizer()
    token_ids: list[int] = []
    text, last = "", None
    for output in outputs:
        token_ids += output.token_ids
        text += detokenizer.push(output.token_ids)
        last = output
    assert last is not None, "a request ends with an output"
    answer = {
        "prompt_ids": request.prompt_ids,
        "token_ids": token_ids,
        "text": text + detokenizer.finish(),
        "finish_reason": last.finish_reason,
        "seed": request.params.seed,
        "error": last.error,
    }
    print(json.dumps(answer))
    return 0 if last.error is None else 1
