"""`arriero chat`: a chat in the terminal with any running service. Imports neither Ray nor torch."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from rich.console import Console

from cluster.client import ArrieroClient
from cluster.client_stream import GenerationStream
from cluster.client_types import ArrieroError, Piece, Sampling
from cluster.conversation import Conversation
from cluster.launch.token_file import find_record, state_folder
from cluster.terminal_text import printable

HELP = "/reset forgets what was said, /exit or Ctrl-D leaves, Ctrl-C ends an answer early"
PROMPT = "you> "
ANSWER_STYLE = "cyan"
NOTE_STYLE = "dim"
ERROR_STYLE = "red"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="gRPC address of the service. Default: the one started last on this machine.",
    )
    parser.add_argument("--application", metavar="NAME", help="Which one, where several share a cluster.")
    parser.add_argument("--system", metavar="TEXT", help="A system message, put before all else.")
    parser.add_argument("--temperature", type=float, metavar="X", help="0 takes the most likely token.")
    parser.add_argument("--top-p", type=float, metavar="X", help="Keep the most likely tokens of this probability.")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="Longest answer.")
    parser.add_argument("--seed", type=int, metavar="N", help="Of the sampling noise. Default: drawn for each answer.")


def run(arguments: argparse.Namespace) -> int:
    address = arguments.address or find_record(state_folder()).grpc_address
    sampling = Sampling(
        temperature=arguments.temperature, top_p=arguments.top_p, max_tokens=arguments.max_tokens
    )  # fmt: skip
    with ArrieroClient(address, application=arguments.application) as client:
        chat = Chat(
            client=client,
            conversation=Conversation(arguments.system),
            sampling=sampling,
            seed=arguments.seed,
            console=Console(highlight=False, soft_wrap=True),
        )
        return chat.run(f"chatting with {address}: {HELP}")


@dataclass(slots=True)
class Answer:
    """An answer so far. Times are of time.perf_counter()."""

    started_s: float
    text: str = ""
    num_tokens: int = 0
    times_s: list[float] = field(default_factory=list)
    is_degraded: bool = False
    was_interrupted: bool = False
    reason: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.num_tokens += len(piece.token_ids)
        self.is_degraded |= piece.degraded
        self.reason = piece.finish_reason or self.reason
        self.times_s.append(time.perf_counter())

    def summary(self) -> str:
        parts = [f"{self.num_tokens} tokens"]
        if self.times_s:
            parts.append(f"first after {1000 * (self.times_s[0] - self.started_s):.0f} ms")
        if self.num_tokens > 1 and self.times_s[-1] > self.times_s[0]:
            parts.append(f"{(self.num_tokens - 1) / (self.times_s[-1] - self.times_s[0]):.0f} tokens/s")
        if self.reason == "length":
            parts.append("cut off: it was as long as it may be")
        if self.is_degraded:
            parts.append("degraded: an expert was missing")
        if self.was_interrupted:
            parts.append("interrupted")
        return ", ".join(parts)


class Chat:
    """Reads questions from stdin, streams the answers to stdout."""

    def __init__(
        self,
        *,
        client: ArrieroClient,
        conversation: Conversation,
        sampling: Sampling,
        seed: int | None,
        console: Console,
    ) -> None:
        self._client = client
        self._conversation = conversation
        self._sampling = sampling
        self._seed = seed
        self._console = console
        self._notes = Console(stderr=True, highlight=False, soft_wrap=True)

    def run(self, greeting: str) -> int:
        """Until the input ends. 1 when the last question got no answer and there is nobody to ask another."""
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            self._note(greeting)
        was_answered = True
        for line in _lines(is_terminal):
            match line.strip():
                case "":
                    continue
                case "/exit":
                    break
                case "/reset":
                    self._conversation.clear()
                    self._note("forgotten")
                case command if command.startswith("/"):
                    self._note(f"{command.split()[0]} is no command: {HELP}")
                case question:
                    was_answered = self._answer(question)
        return 0 if was_answered or is_terminal else 1

    def _answer(self, question: str) -> bool:
        """Streams one answer. A question that failed is as if it had not been asked."""
        try:
            answer = self._stream(question)
        except ArrieroError as error:
            self._notes.print(printable(str(error)), style=ERROR_STYLE, markup=False)
            if error.code == "INVALID_ARGUMENT" and self._conversation.num_turns:
                self._note("/reset forgets what was said before")
            return False
        self._note(answer.summary())
        self._conversation.add_turn(question, answer.text)
        return True

    def _stream(self, question: str) -> Answer:
        answer = Answer(started_s=time.perf_counter())
        messages = self._conversation.ask(question)
        stream = self._client.generate(messages, sampling=self._sampling, seed=self._seed)
        # Python raises Ctrl-C in the main thread, between any two of its steps. So that none of them is one of the
        # console's or of gRPC's, which would be left half done, the main thread only waits here.
        with stream, ThreadPoolExecutor(max_workers=1) as reader:
            reading = reader.submit(self._print_pieces, stream, answer)
            try:
                reading.result()
            except KeyboardInterrupt:
                answer.was_interrupted = True
                stream.close()
                reading.result()
        self._console.print()
        return answer

    def _print_pieces(self, stream: GenerationStream, answer: Answer) -> None:
        for piece in stream:
            answer.add(piece)
            self._console.print(printable(piece.text), style=ANSWER_STYLE, markup=False, end="")

    def _note(self, text: str) -> None:
        self._notes.print(text, style=NOTE_STYLE, markup=False)


def _lines(is_terminal: bool) -> Iterator[str]:
    """What is typed, or what is piped in. Ctrl-C at the prompt clears the line, as shells do."""
    if not is_terminal:
        yield from sys.stdin
        return
    with suppress(ImportError):
        import readline  # noqa: F401 editing and history for input()
    while True:
        try:
            yield input(PROMPT)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
