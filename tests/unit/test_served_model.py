"""The name and the fingerprint under which a service is known over HTTP."""

from pathlib import Path

import pytest

from cluster.config import ServiceConfig
from cluster.front.openai.served_model import ServedModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "alpaca-7"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def served(folder: Path, **values: object) -> ServedModel:
    return ServedModel.of(ServiceConfig(**{"model": str(folder), "max_model_len": 64, **values}), folder)


def test_a_folder_is_known_by_its_name_and_never_by_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert served(folder).name == "alpaca-7"
    monkeypatch.chdir(folder)
    assert served(folder, model=".").name == "alpaca-7"


def test_a_model_of_the_hub_is_known_by_its_id(folder: Path) -> None:
    assert served(folder, model="meta-llama/Llama-4-Scout").name == "meta-llama/Llama-4-Scout"


def test_the_operator_may_choose_the_name(folder: Path) -> None:
    assert served(folder, served_model_name="llama").name == "llama"


def test_equal_services_have_equal_fingerprints_and_others_do_not(folder: Path) -> None:
    assert served(folder) == served(folder)
    assert served(folder).fingerprint != served(folder, dtype="float32").fingerprint
