from pathlib import Path

import pytest

from cluster.checkpoints.demo_model import demo_checkpoint
from cluster.config import ConfigError, ServiceConfig, parse_config, read_config_file


def test_every_key_has_a_help_text() -> None:
    without = [name for name, field in ServiceConfig.model_fields.items() if not field.description]
    assert without == []


def test_unknown_keys_are_errors_that_name_them() -> None:
    with pytest.raises(ConfigError, match=r"shard: unknown key; routres: unknown key"):
        parse_config({"model": "m", "shard": 3, "routres": 1})


def test_without_a_model_it_is_the_demo_model() -> None:
    assert parse_config({}).model == str(demo_checkpoint())
    assert parse_config({"model": "m"}).model == "m"


@pytest.mark.parametrize(
    ("key", "value"),
    [("shards", "3"), ("shards", True), ("shards", -1), ("routers", 0), ("dtype", "float16"), ("grpc_port", 70000)],
)
def test_values_of_the_wrong_kind_or_range_are_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: .*{value}"):
        parse_config({"model": "m", key: value})


def test_more_copies_than_shards_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"copies must be at most shards \(2\), not 3"):
        parse_config({"model": "m", "shards": 2, "copies": 3})


@pytest.mark.parametrize(
    ("shards", "max_shards", "message"), [(3, 2, "max_shards .* not 2"), (0, 2, "^shards .* not 0")]
)
def test_bounds_of_the_shards_that_contradict_each_other_are_refused(
    shards: int, max_shards: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({"model": "m", "shards": shards, "max_shards": max_shards})


def test_one_copy_is_fine_without_shards() -> None:
    assert parse_config({"model": "m", "shards": 0}).copies == 1


def test_routers_may_become_more_but_not_fewer_than_there_are_without_load() -> None:
    assert parse_config({"model": "m", "routers": 2}).most_routers == 2
    assert parse_config({"model": "m", "routers": 2, "max_routers": 3}).most_routers == 3
    with pytest.raises(ConfigError, match=r"max_routers must be at least routers \(2\), not 1"):
        parse_config({"model": "m", "routers": 2, "max_routers": 1})


def test_equal_ports_are_refused() -> None:
    with pytest.raises(ConfigError, match="grpc_port must differ from http_port"):
        parse_config({"model": "m", "grpc_port": 8000})


def test_without_a_word_about_it_requests_wait_for_lost_experts() -> None:
    config = parse_config({"model": "m"})
    assert (config.on_missing_expert, config.expert_wait_s) == ("wait", 120.0)
    with pytest.raises(ConfigError, match="expert_wait_s"):
        parse_config({"model": "m", "expert_wait_s": 0})


def test_an_application_name_must_be_fit_for_actor_names() -> None:
    with pytest.raises(ConfigError, match="app_name"):
        parse_config({"model": "m", "app_name": "a b"})


def test_a_dumped_configuration_parses_to_itself() -> None:
    config = parse_config({"model": "m", "shards": 3, "lane_timeout_s": 2})
    assert parse_config(config.model_dump()) == config


def test_an_empty_file_has_no_keys(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert read_config_file(path) == {}


@pytest.mark.parametrize("text", ["- a\n- b\n", "3\n", "1: x\n"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"wrong\.yaml must be a mapping"):
        read_config_file(path)


def test_broken_yaml_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("model: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not YAML"):
        read_config_file(path)
