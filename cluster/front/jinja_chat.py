"""Chat messages to token ids by a Jinja template of the operator's, in place of our own format (cluster/front/chat.py).

A template spells special tokens out, and so may a user. What counts is where it stands: the template's own literals
are marked before it is compiled (cluster/front/special_marks.py), and only marks become special tokens. What users
write goes through the template as it is and stays text wherever the template puts it, and whatever it makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.front.chat import ChatMessage, check_role, text_of
from cluster.front.special_marks import SpecialMarks
from cluster.front.template_literals import LiteralRewriter
from cluster.front.tokenizer import Tokenizer

PROBE = (ChatMessage.of_text("user", "hi"),)


class JinjaChat:
    """A template as transformers renders it: the same environment, variables and helpers."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer) -> None:
        """Raises OSError, and ValueError naming the file, and the line where there is one."""
        self._path = Path(path)
        if not tokenizer.has_text:
            raise ValueError(f"chat_template {self._path} is of no use: the model has no tokenizer.json")
        self._tokenizer = tokenizer
        self._marks = SpecialMarks(tokenizer.special_tokens)
        self._named_tokens = {name: self._marks.mark(token) for name, token in tokenizer.named_tokens.items()}
        self._template = self._compile(_read(self._path))
        self._probe()

    def encode(self, messages: Sequence[ChatMessage]) -> list[int]:
        """The prompt for the assistant's next message. Raises ValueError saying what is wrong with the messages."""
        if not messages:
            raise ValueError("messages must not be empty")
        plain = [_plain(message, index) for index, message in enumerate(messages)]
        try:
            rendered = self._render(plain)
        except jinja2.TemplateError as error:
            raise ValueError(f"messages are refused by the chat template: {error}") from error
        except Exception as error:  # what a template does with what it is given is its own
            raise ValueError(f"the chat template fails on these messages: {type(error).__name__}: {error}") from error
        return self._marks.encode(rendered, self._tokenizer.encode)

    def _render(self, messages: list[dict[str, str]]) -> str:
        variables = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
        return self._template.render(**variables, **self._named_tokens)

    def _compile(self, source: str) -> jinja2.Template:
        environment = _environment()
        try:
            tree = environment.parse(source, filename=str(self._path))
            LiteralRewriter(self._marks.mark).visit(tree)
            code = environment.compile(tree, filename=str(self._path))
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{self._path}:{error.lineno}: {error.message}") from error
        return environment.template_class.from_code(environment, code, environment.globals)

    def _probe(self) -> None:
        """A template that cannot do the least, or whose special tokens we cannot recognise, is better known at once."""
        try:
            rendered = self._render([_plain(message, index) for index, message in enumerate(PROBE)])
            self._marks.encode(rendered, self._tokenizer.encode)
        except Exception as error:
            line = _line_in(str(self._path), error.__traceback__)
            raise ValueError(f"{self._path}:{line}: cannot render a user's message: {error}") from error
        spelled = self._marks.find_spelling(rendered)
        if spelled is not None:
            raise ValueError(
                f"{self._path} makes the special token {spelled} out of parts: write it in one piece, as only then it "
                "can be told from what users write"
            )


class _GenerationTag(Extension):
    """{% generation %}: transformers marks by it what a model is trained on. Here it is as if it were not there."""

    tags = {"generation"}  # noqa: RUF012 (so it is declared there)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _plain(message: ChatMessage, index: int) -> dict[str, str]:
    """As templates know messages. Text alone, as every template takes it."""
    check_role(message.role, index)
    text = text_of(message, index)
    try:
        # A lone surrogate is no text, and could be a mark.
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"messages[{index}].content must be valid Unicode: {error}") from None
    return {"role": message.role, "content": text}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _line_in(filename: str, traceback: TracebackType | None) -> int:
    """The innermost line of the file that the traceback passes through; 1 if it does not."""
    line = 1
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == filename:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line
