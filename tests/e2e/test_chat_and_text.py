"""What a service takes besides token ids depends on the checkpoint's tokenizer and on the operator's template."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RunApp

from cluster.client import ArrieroClient
from cluster.client_types import ArrieroError, Sampling
from cluster.front.chat import ChatMessage

TIMEOUT_S = 60.0
CHAT = [ChatMessage.of_text("user", "hi")]
SHORT = Sampling(max_tokens=4, ignore_eos=True)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ArrieroError) as failure:
        call()
    assert failure.value.code == "INVALID_ARGUMENT"
    return failure.value.details


def test_a_checkpoint_without_a_tokenizer_serves_token_ids_and_says_what_it_cannot(
    run_app: RunApp, tiny_maverick: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_maverick, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with run_app("wordless", model=str(model), shards=0) as service, service.client() as client:
        pieces = list(client.generate([5, 6, 511], sampling=SHORT, timeout_s=TIMEOUT_S))
        assert len([token_id for piece in pieces for token_id in piece.token_ids]) == 4
        assert "".join(piece.text for piece in pieces) == ""
        stopping = Sampling(stop=("x",))
        assert "stop" in refusal(lambda: list(client.generate([5], sampling=stopping, timeout_s=TIMEOUT_S)))
        for call in (
            lambda: list(client.generate("hi", timeout_s=TIMEOUT_S)),
            lambda: list(client.generate(CHAT, timeout_s=TIMEOUT_S)),
            lambda: client.tokenize("hi"),
            lambda: client.detokenize([5]),
        ):
            assert "has no tokenizer.json" in refusal(call)


def test_an_operators_template_renders_chats_and_may_refuse_them(run_app: RunApp, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{{ bos_token }}{% if messages[0].role != 'user' %}{{ raise_exception('ask first') }}{% endif %}"
        "{{ messages[0].content }}<|eot|>"
    )
    with run_app("template", chat_template=str(template), shards=0) as service, service.client() as client:
        assert client.tokenize([ChatMessage.of_text("user", "<|eom|>")]) == (256, *b"<|eom|>", 264)
        pieces = list(client.generate(CHAT, sampling=SHORT, timeout_s=TIMEOUT_S))
        assert pieces[-1].usage is not None
        assert pieces[-1].usage.prompt_tokens == len("hi") + 2
        assert refusal(lambda: answered(client, "assistant")).endswith("the chat template: ask first")


def answered(client: ArrieroClient, role: str) -> object:
    return list(client.generate([ChatMessage.of_text(role, "hi")], timeout_s=TIMEOUT_S))
