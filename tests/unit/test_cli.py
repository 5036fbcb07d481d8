"""The command line: flags, the YAML file, and what each subcommand may import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cluster import cli
from cluster.config import ConfigError, ServiceConfig
from cluster.flags import add_config_flags, config_from_flags, flag


def parse(*arguments: str) -> ServiceConfig:
    parser = cli.argparse.ArgumentParser()
    add_config_flags(parser)
    return config_from_flags(parser.parse_args(list(arguments)))


def test_every_key_has_a_flag_with_the_same_default() -> None:
    config = parse("--model", "m")
    assert config == ServiceConfig(model="m")


def test_a_flag_takes_the_keys_type() -> None:
    config = parse("--model", "m", "--shards", "5", "--lane-timeout-s", "2.5", "--dtype", "float32")
    assert (config.shards, config.lane_timeout_s, config.dtype) == (5, 2.5, "float32")


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("model: from-file\nshards: 4\nrouters: 3\n")
    config = parse("--config", str(path), "--shards", "7")
    assert (config.model, config.shards, config.routers) == ("from-file", 7, 3)


def test_an_unknown_key_of_the_file_is_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("model: m\nshrads: 4\n")
    with pytest.raises(ConfigError, match=r"serve\.yaml: unknown key: shrads"):
        parse("--config", str(path))


def test_a_number_in_quotes_in_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text('model: m\nshards: "4"\n')
    with pytest.raises(ConfigError, match="shards"):
        parse("--config", str(path))


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_refused_in_one_line(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    assert cli.main(["serve", "--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert "serve.yaml" in said
    assert said.count("\n") == 1


def test_a_missing_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--config", "/nowhere.yaml"]) == 2
    assert "/nowhere.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["serve", "--bogus", "1"], "--bogus"),
        (["serve", "--shards", "many"], "--shards"),
        (["fly"], "fly"),
        ([], "COMMAND"),
        (["checkpoint", "create", "--preset", "huge", "--out", "x"], "huge"),
        (["generate", "--model", "m"], "--prompt"),
        (["generate", "--model", "m", "--prompt", "x", "--prompt-ids", "1"], "--prompt-ids"),
    ],
)
def test_a_wrong_command_line_is_refused_by_name(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert named in capsys.readouterr().err


def test_help_shows_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["serve", "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for name in ServiceConfig.model_fields:
        assert flag(name) in text
    assert "Default: 9000" in text


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], ["ray", "torch", "grpc", "pydantic"]),
        (["status", "--address", "127.0.0.1:1"], ["ray", "torch", "transformers", "pydantic"]),
        (["chat", "--help"], ["ray", "torch", "transformers", "pydantic"]),
        (["rebalance", "--address", "127.0.0.1:1"], ["ray", "torch", "transformers", "pydantic"]),
        (["serve", "--help"], ["ray", "torch", "transformers", "grpc"]),
        (["checkpoint", "create", "--help"], ["ray", "torch", "transformers"]),
        (["generate", "--help"], ["ray", "torch", "transformers"]),
        (["serve", "--model", "/nowhere/at-all"], ["ray"]),
    ],
)
def test_a_command_imports_only_what_it_needs(arguments: list[str], heavy: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, cluster.cli\n"
        f"try: cluster.cli.main({arguments!r})\n"
        "except SystemExit: pass\n"
        f"print('LOADED', [name for name in {heavy!r} if name in sys.modules])"
    )
    environment = {"PATH": "", "XDG_STATE_HOME": str(tmp_path), "ARRIERO_ADMIN_TOKEN": "x"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert result.stdout.endswith("LOADED []\n"), result.stdout + result.stderr
