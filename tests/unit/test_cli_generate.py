"""`arriero generate`: the engine in process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import cli
from cluster.checkpoints.presets import create_checkpoint

Generate = Callable[..., Any]
SMALL = ("--max-model-len", "64", "--router-threads", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_checkpoint("tiny-maverick", tmp_path_factory.mktemp("models") / "tiny-maverick")


@pytest.fixture
def generate(model: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    def run(*arguments: str) -> Any:
        assert cli.main(["generate", "--model", str(model), "--json", *SMALL, *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused(model: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    def run(*arguments: str) -> str:
        assert cli.main(["generate", "--model", str(model), *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        return captured.err

    return run


def test_the_same_seed_gives_the_same_tokens(generate: Generate) -> None:
    flags = ["--prompt", "llama", "--max-tokens", "8", "--ignore-eos"]
    first, again, other = (generate(*flags, "--seed", seed) for seed in ("1", "1", "2"))
    assert first["prompt_ids"][1:] == list(b"llama")
    assert len(first["token_ids"]) == 8
    assert first["finish_reason"] == "length"
    assert first == again
    assert first["token_ids"] != other["token_ids"]


def test_without_a_seed_one_is_drawn_and_told(generate: Generate) -> None:
    flags = ["--prompt-ids", "1,2,3", "--max-tokens", "4", "--ignore-eos"]
    drawn = generate(*flags)
    assert generate(*flags, "--seed", str(drawn["seed"])) == drawn


def test_a_chat_is_rendered_with_the_models_template(generate: Generate, model: Path) -> None:
    answer = generate("--chat", "hi", "--max-tokens", "1")
    assert len(answer["prompt_ids"]) > len("hi") + 1


def test_it_ends_where_the_model_does(generate: Generate) -> None:
    assert len(generate("--prompt", "llama", "--ignore-eos")["token_ids"]) == 64 - len("llama") - 1


def test_text_comes_on_stdout_and_the_rest_on_stderr(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*SMALL, "--prompt", "llama", "--max-tokens", "8", "--ignore-eos", "--seed", "1"]
    assert cli.main(["generate", "--model", str(model), *flags, "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert cli.main(["generate", "--model", str(model), *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out == text + "\n"
    assert "8 tokens" in captured.err
    assert "seed 1" in captured.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt-ids", "1,512"], "512"),
        (["--prompt", "x", "--temperature", "nan"], "temperature"),
        (["--prompt", "x", "--top-p", "0"], "top_p"),
        (["--prompt", "x", "--seed", "-1"], "seed"),
        (["--prompt", "llama", "--max-model-len", "6"], "6 tokens"),
        (["--prompt", "x", "--dtype", "int8"], "dtype"),
    ],
)
def test_bad_input_is_named(refused: Generate, arguments: list[str], named: str) -> None:
    assert named in refused(*arguments)


def test_a_chat_goes_through_the_operators_template(generate: Generate, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("<|header_start|>{{ messages[0].content }}")
    answer = generate("--chat", "<|eot|>", "--chat-template", str(template), "--max-tokens", "1")
    assert answer["prompt_ids"] == [261, *b"<|eot|>"]
