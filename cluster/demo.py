"""What `make demo` runs: the model that comes with Arriero, on one router and four expert shards of this machine.

It asks over gRPC and through the `openai` client, checks every answer, and shows which experts served which task.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO

from openai import OpenAI
from rich.console import Console

from cluster.checkpoints.demo_tasks import TASKS, Sample, held_out_samples
from cluster.client import ArrieroClient
from cluster.client_types import Sampling
from cluster.commands.status import find_service, get_view
from cluster.expert_picture import ExpertCounts, picture
from cluster.front.chat import ChatMessage
from cluster.launch.served import NotServedError, Served
from cluster.terminal_text import printable
from cluster.v1 import admin_pb2

NUM_SHARDS = 4
NUM_STREAMS = 16
NUM_CHECKED = 32
# What the model's README promises of every task.
MIN_ACCURACY = 0.95
MAX_TOKENS = 64
SEED = 4
GREEDY = Sampling(temperature=0.0, max_tokens=MAX_TOKENS)
READY_TIMEOUT_S = 600.0
LOAD_TIMEOUT_S = 20.0
ANSWER_STYLE = "cyan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """A piece of an answer. usage, in one of the last: prompt, cached and completion tokens."""

    text: str
    usage: tuple[int, int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """num_computed_tokens: what the router's layers had to work on, the prompt's cached tokens left out."""

    text: str
    num_tokens: int
    num_computed_tokens: int
    first_token_s: float


def main() -> int:
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="arriero-demo-") as folder:
        log = Path(folder, "serve.log")
        try:
            with log.open("w") as log_file, running_service(console, log_file) as service:
                wrong_tasks = show(console, service)
        except NotServedError as error:
            print(f"{log.read_text()}demo: {error}", file=sys.stderr)
            return 1
    console.print("\nstopped; nothing is left", style="bold")
    if wrong_tasks:
        print(f"demo: fewer than {MIN_ACCURACY:.0%} right: {', '.join(wrong_tasks)}", file=sys.stderr)
    return 1 if wrong_tasks else 0


@contextmanager
def running_service(console: Console, log: IO[str]) -> Iterator[Served]:
    """`arriero serve` as a user would start it. Raises NotServedError."""
    flags = ["--routers", "1", "--shards", str(NUM_SHARDS)]
    console.print(f"\narriero serve {' '.join(flags)}", style="bold")
    started_s = time.perf_counter()
    with Served(flags, ready_timeout_s=READY_TIMEOUT_S, log=log) as service:
        console.print(f"{service.ready_line}  (after {time.perf_counter() - started_s:.1f} s)", markup=False)
        yield service


def show(console: Console, service: Served) -> list[str]:
    """Returns the tasks that fell short of MIN_ACCURACY."""
    samples = {task: held_out_samples(task, NUM_CHECKED, SEED) for task in TASKS}
    answers: list[Answer] = []
    with ArrieroClient(service.grpc_address) as client:
        console.print("\nover gRPC, one at a time", style="bold")
        answers += [shown(console, each[0], grpc_pieces(client, each[0])) for each in samples.values()]
        console.print("\nthrough the openai client", style="bold")
        with OpenAI(base_url=f"{service.http_url}/v1", api_key="none") as openai_client:
            answers += [shown(console, each[1], http_pieces(openai_client, each[1])) for each in samples.values()]
        view = settled_view(
            service.grpc_address, after={}, num_tokens=sum(each.num_computed_tokens for each in answers)
        )
        console.print(f"\n{NUM_CHECKED} prompts that it was not trained on, per task", style="bold")
        return check_tasks(console, client, service, samples, view)


def grpc_pieces(client: ArrieroClient, sample: Sample) -> Iterator[Heard]:
    for piece in client.generate([ChatMessage.of_text("user", sample.prompt)], sampling=GREEDY):
        usage = piece.usage
        yield Heard(
            text=piece.text,
            usage=None if usage is None else (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens),
        )


def http_pieces(client: OpenAI, sample: Sample) -> Iterator[Heard]:
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": sample.prompt}],
        temperature=0.0,
        max_completion_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = None
        if chunk.usage is not None:
            details = chunk.usage.prompt_tokens_details
            cached = 0 if details is None else details.cached_tokens or 0
            usage = (chunk.usage.prompt_tokens, cached, chunk.usage.completion_tokens)
        yield Heard(text=chunk.choices[0].delta.content or "" if chunk.choices else "", usage=usage)


def shown(console: Console, sample: Sample, pieces: Iterator[Heard]) -> Answer:
    """Prints an answer as it comes, and whether it is right."""
    console.print(f"  {sample.prompt}  ", markup=False, end="")
    answer = heard(pieces, lambda text: console.print(printable(text), style=ANSWER_STYLE, markup=False, end=""))
    verdict = "[green]right[/]" if answer.text == sample.answer else f"[red]wrong: {sample.answer}[/]"
    console.print(f"  {verdict} [dim](first token after {1000 * answer.first_token_s:.0f} ms)[/]")
    return answer


def heard(pieces: Iterator[Heard], each: Callable[[str], None]) -> Answer:
    """The whole answer; ``each`` is called with every piece of its text."""
    started_s = time.perf_counter()
    first_s, text, usage = None, "", None
    for piece in pieces:
        if first_s is None and piece.text:
            first_s = time.perf_counter() - started_s
        text += piece.text
        each(piece.text)
        usage = piece.usage or usage
    assert usage is not None, "a stream tells at its end what it used"
    prompt_tokens, cached_tokens, completion_tokens = usage
    return Answer(
        text=text,
        num_tokens=completion_tokens,
        # The last token of an answer is drawn and not computed with.
        num_computed_tokens=prompt_tokens - cached_tokens + completion_tokens - 1,
        first_token_s=time.perf_counter() - started_s if first_s is None else first_s,
    )


def check_tasks(
    console: Console,
    client: ArrieroClient,
    service: Served,
    samples: dict[str, list[Sample]],
    view: admin_pb2.GetViewResponse,
) -> list[str]:
    """Task by task, NUM_STREAMS prompts at once, so that what the experts counted since view belongs to that task."""
    counts_of_task: dict[str, ExpertCounts] = {}
    wrong_tasks: list[str] = []
    for task, of_task in samples.items():
        before = counts_of(view)
        started_s = time.perf_counter()
        answers = ask_all(client, of_task)
        took_s = time.perf_counter() - started_s
        num_right = sum(answer.text == sample.answer for answer, sample in zip(answers, of_task, strict=True))
        if num_right < MIN_ACCURACY * len(of_task):
            wrong_tasks.append(task)
        console.print(f"  {task:8} {num_right} of {len(of_task)} right, {rates(answers, took_s)}", markup=False)
        view = settled_view(
            service.grpc_address, after=before, num_tokens=sum(each.num_computed_tokens for each in answers)
        )
        counts_of_task[task] = {slot: count - before.get(slot, 0) for slot, count in counts_of(view).items()}
    console.print("\nwhich experts served which task", style="bold")
    shard_of = {(slot.layer, slot.expert): shard.member.id for shard in view.shards for slot in shard.slots}
    console.print(picture(counts_of_task, shard_of))
    return wrong_tasks


def rates(answers: Sequence[Answer], took_s: float) -> str:
    num_tokens = sum(answer.num_tokens for answer in answers)
    first_ms = 1000 * median(answer.first_token_s for answer in answers)
    return f"{num_tokens / took_s:.0f} tokens/s, first token after {first_ms:.0f} ms (median, {NUM_STREAMS} at once)"


def ask_all(client: ArrieroClient, samples: Sequence[Sample]) -> list[Answer]:
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        return list(pool.map(lambda sample: heard(grpc_pieces(client, sample), lambda _text: None), samples))


def settled_view(address: str, *, after: ExpertCounts, num_tokens: int) -> admin_pb2.GetViewResponse:
    """Shards report twice a second: waits until every layer has counted num_tokens more than in ``after``."""
    address, token = find_service(address)
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    while True:
        view = get_view(address, token)
        by_layer: dict[int, int] = defaultdict(int)
        for (layer, expert), count in counts_of(view).items():
            by_layer[layer] += count - after.get((layer, expert), 0)
        if min(by_layer.values(), default=0) >= num_tokens:
            return view
        if time.monotonic() > deadline:
            raise TimeoutError(f"the experts counted {dict(by_layer)} tokens by layer, not {num_tokens}")
        time.sleep(0.1)


def counts_of(view: admin_pb2.GetViewResponse) -> dict[tuple[int, int], int]:
    return {(load.layer, load.expert): load.tokens for load in view.load}


if __name__ == "__main__":
    sys.exit(main())
