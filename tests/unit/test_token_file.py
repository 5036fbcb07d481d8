from pathlib import Path

import pytest

from cluster.launch.token_file import ServiceRecord, find_record, remove_record, state_folder, write_record


def record(
    port: int = 9000, *, app_name: str = "arriero", token: str = "secret", started_at: float = 1.0
) -> ServiceRecord:
    return ServiceRecord(
        app_name=app_name,
        admin_token=token,
        grpc_address=f"127.0.0.1:{port}",
        http_address="127.0.0.1:8000",
        started_at=started_at,
    )


def test_only_the_owner_can_read_the_token(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path / "state")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_file_that_was_open_to_others_is_replaced_by_a_private_one(tmp_path: Path) -> None:
    path = tmp_path / record().file_name
    path.write_text("{}")
    path.chmod(0o644)
    write_record(record(), tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_service_started_last_is_found(tmp_path: Path) -> None:
    for port, started_at in ((9000, 5.0), (9001, 7.0), (9002, 6.0)):
        write_record(record(port, started_at=started_at), tmp_path)
    assert find_record(tmp_path).grpc_address == "127.0.0.1:9001"


@pytest.mark.parametrize("address", ["127.0.0.1:9002", "localhost:9002", ":9002"])
def test_a_service_is_found_by_its_address(tmp_path: Path, address: str) -> None:
    write_record(record(9000, started_at=9.0), tmp_path)
    write_record(record(9002, token="other"), tmp_path)
    assert find_record(tmp_path, address).admin_token == "other"


def test_a_service_that_was_never_recorded_is_reported_by_its_address(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the service at 10\.0\.0\.1:9"):
        find_record(tmp_path, "10.0.0.1:9")


def test_a_record_is_not_removed_by_a_service_that_it_no_longer_belongs_to(tmp_path: Path) -> None:
    write_record(record(token="new"), tmp_path)
    remove_record(record(token="old"), tmp_path)
    assert find_record(tmp_path).admin_token == "new"
    remove_record(record(token="new"), tmp_path)
    remove_record(record(token="new"), tmp_path)
    with pytest.raises(FileNotFoundError):
        find_record(tmp_path)


def test_the_state_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_folder() == tmp_path / "arriero"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert state_folder() == Path("/home/someone/.local/state/arriero")
