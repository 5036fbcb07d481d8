"""Every start that cannot work is refused before anything starts: exit code 2, one line that names the thing."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conditions import free_port
from safetensors.torch import load_file, save_file

from cluster import cli
from cluster.checkpoints.presets import create_checkpoint

Start = Callable[..., str]


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_checkpoint("tiny-maverick", tmp_path_factory.mktemp("models") / "good")


@pytest.fixture
def model(good_model: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(good_model, tmp_path / "model"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Start:
    """Runs `arriero serve`, which must refuse; returns what it says."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("cluster.commands.serve.supervise", lambda *_: pytest.fail("a process would be started"))

    def start(*arguments: str) -> str:
        assert cli.main(["serve", "--grpc-port", str(free_port()), "--http-port", str(free_port()), *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("arriero serve: ")
        assert captured.err.count("\n") == 1
        return captured.err

    return start


def change_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_good_model_passes(good_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(
        "cluster.commands.serve.supervise",
        lambda config, address: started.extend([config.model, config.chat_template]) or 0,
    )
    monkeypatch.chdir(good_model.parent)
    template = good_model.parent / "chat.jinja"
    template.write_text("{{ messages[0].content }}")
    ports = ["--grpc-port", str(free_port()), "--http-port", str(free_port())]
    assert cli.main(["serve", "--model", "good", "--chat-template", "chat.jinja", *ports]) == 0
    assert started == [str(good_model), str(template)], "paths are absolute: workers have another current folder"


def test_a_missing_folder_is_named(refused: Start) -> None:
    assert "/nowhere/llama: no such folder" in refused("--model", "/nowhere/llama")


def test_an_empty_folder_is_refused(refused: Start, tmp_path: Path) -> None:
    assert "config.json" in refused("--model", str(tmp_path))


def test_an_unknown_architecture_is_named(refused: Start, model: Path) -> None:
    change_config(model, model_type="mixtral", architectures=["MixtralForCausalLM"])
    assert "mixtral" in refused("--model", str(model)).lower()


def test_a_wrong_field_of_config_json_is_named(refused: Start, model: Path) -> None:
    change_config(model, num_key_value_heads=3)
    assert "num_key_value_heads" in refused("--model", str(model))


@pytest.mark.parametrize(
    "name",
    ["model.layers.3.feed_forward.experts.down_proj", "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"],
)
def test_a_missing_tensor_is_named(refused: Start, model: Path, name: str) -> None:
    change_tensors(model, lambda tensors: tensors.pop(name))
    assert f"tensor {name} is missing" in refused("--model", str(model))


def test_a_tensor_of_a_wrong_shape_is_named(refused: Start, model: Path) -> None:
    name = "model.layers.1.feed_forward.router.weight"
    change_tensors(model, lambda tensors: tensors.update({name: torch.zeros(7, 64)}))
    said = refused("--model", str(model))
    assert name in said
    assert "[8, 64]" in said
    assert "[7, 64]" in said


def test_a_truncated_file_is_named(refused: Start, model: Path) -> None:
    path = model / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    assert str(path) in refused("--model", str(model))


def test_a_broken_tokenizer_is_named(refused: Start, model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    assert "tokenizer.json is not a tokenizer" in refused("--model", str(model))


def test_a_sequence_longer_than_the_model_takes_is_refused(refused: Start, model: Path) -> None:
    assert "max_model_len" in refused("--model", str(model), "--max-model-len", "5000")


def test_too_few_kv_blocks_for_one_sequence_are_refused(refused: Start, model: Path) -> None:
    said = refused("--model", str(model), "--num-kv-blocks", "3")
    assert "num_kv_blocks 3" in said


def test_more_kv_blocks_than_memory_are_refused(refused: Start, model: Path) -> None:
    assert "GiB are free" in refused("--model", str(model), "--num-kv-blocks", str(10**9))


def test_a_block_size_that_does_not_divide_the_chunk_is_refused(refused: Start, model: Path) -> None:
    assert "block_size" in refused("--model", str(model), "--block-size", "5")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shards", "-1"], "shards"),
        (["--routers", "0"], "routers"),
        (["--shards", "2", "--copies", "3"], "copies must be at most shards (2), not 3"),
        (["--dtype", "int4"], "dtype"),
        (["--expert-wait-s", "0"], "expert_wait_s"),
        (["--on-missing-expert", "panic"], "on_missing_expert"),
        (["--grpc-port", "70000"], "grpc_port"),
        (["--grpc-port", "1234", "--http-port", "1234"], "1234"),
        (["--app-name", "../x"], "app_name"),
    ],
)
def test_a_value_out_of_range_is_named(refused: Start, model: Path, arguments: list[str], named: str) -> None:
    assert named in refused("--model", str(model), *arguments)


@pytest.mark.parametrize(
    ("key", "host"), [("grpc_port", "127.0.0.1"), ("grpc_port", "::"), ("http_port", "127.0.0.1"), ("http_port", "")]
)
def test_a_taken_port_is_named(refused: Start, model: Path, key: str, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with listener:
        port = listener.getsockname()[1]
        said = refused("--model", str(model), "--" + key.replace("_", "-"), str(port))
        assert f"{key}: port {port} is already in use" in said


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("a\n{% for %}", "chat.jinja:2: "),
        ("{{ messages[0].content.x.y }}", "chat.jinja:1: cannot render"),
        ("{{ '<|' ~ 'eot|>' }}", "<|eot|> out of parts"),
        (None, "chat.jinja"),
    ],
)
def test_a_bad_chat_template_is_named(
    refused: Start, model: Path, tmp_path: Path, template: str | None, named: str
) -> None:
    path = tmp_path / "chat.jinja"
    if template is not None:
        path.write_text(template)
    assert named in refused("--model", str(model), "--chat-template", str(path))


def test_a_chat_template_for_a_model_without_a_tokenizer_is_refused(
    refused: Start, model: Path, tmp_path: Path
) -> None:
    (model / "tokenizer.json").unlink()
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    said = refused("--model", str(model), "--chat-template", str(tmp_path / "chat.jinja"))
    assert "chat.jinja" in said
    assert "tokenizer.json" in said


def test_a_foreign_http_host_is_named(refused: Start, model: Path) -> None:
    assert "http_host" in refused("--model", str(model), "--http-host", "198.51.100.7")
    assert "http_host" in refused("--model", str(model), "--http-host", "no.such.host.invalid")
