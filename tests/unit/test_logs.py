"""The form of a line, as text and as JSON."""

import json
import logging
import sys
from collections.abc import Iterator
from io import StringIO

import pytest

from cluster.launch.worker_lines import json_lines
from experts.logs import JsonFormatter, LogSettings, TextFormatter, configure_logging, fields
from router.choice_id import log_fields


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Logging is the process's own: what a test configures must not outlive it."""
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in ("arriero", "cluster", "router", "experts")]
    handlers, levels = root.handlers[:], [(logger, logger.level) for logger in (root, *ours)]
    root.handlers = []
    yield
    root.handlers = handlers
    for logger, level in levels:
        logger.setLevel(level)


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> StringIO:
    stream = StringIO()
    monkeypatch.setattr(sys, "__stderr__", stream)
    return stream


def record(message: str, *arguments: object, **values: object) -> logging.LogRecord:
    made = logging.LogRecord("arriero.x", logging.INFO, "f", 1, message, arguments, None)
    made.__dict__ |= fields(**values)
    return made


def test_text_has_the_process_the_logger_and_the_fields_after_the_message() -> None:
    line = TextFormatter("gateway-1").format(record("%d%% done", 5, request_id="a", router=None, age_s=1.23456789))
    assert line.endswith(" INFO gateway-1 arriero.x: 5% done request_id=a age_s=1.23457")


@pytest.mark.parametrize("value", ["a b", 'a"b', "a=b", "a\nWARNING forged", "", "ü\x7f"])
def test_no_value_can_pass_for_more_than_itself(value: str) -> None:
    line = TextFormatter("p").format(record("m", request_id=value, last=1))
    assert "\n" not in line
    tail = line.partition("request_id=")[2]
    assert json.JSONDecoder().raw_decode(tail)[0] == value
    assert tail.endswith(" last=1")


def test_json_is_one_object_with_the_fields_under_their_names() -> None:
    line = json.loads(JsonFormatter("gateway-1").format(record("m\n%s", "x", request_id='a"\n', tokens=3)))
    assert line.pop("time").endswith("+00:00")
    assert line.pop("pid") > 0
    assert line == {
        "level": "INFO",
        "process": "gateway-1",
        "logger": "arriero.x",
        "message": "m\nx",
        "request_id": 'a"\n',
        "tokens": 3,
    }


def test_json_keeps_a_stack_trace_in_its_line() -> None:
    made = record("m")
    try:
        raise KeyError("k")
    except KeyError:
        made.exc_info = sys.exc_info()
    text = JsonFormatter("p").format(made)
    assert "\n" not in text
    assert json.loads(text)["exception"].endswith("KeyError: 'k'")


def test_ours_are_heard_from_the_level_on_and_others_when_they_warn(stderr: StringIO) -> None:
    configure_logging(LogSettings(format="text", level="info"), process="first")
    configure_logging(LogSettings(format="json", level="debug"), process="p")
    logging.getLogger("router.engine_loop").debug("ours", extra=fields(request_id="a"))
    logging.getLogger("somebody").info("theirs")
    logging.getLogger("somebody").warning("trouble")
    lines = [json.loads(line) for line in stderr.getvalue().splitlines()]
    assert [(line["process"], line["message"]) for line in lines] == [("p", "ours"), ("p", "trouble")]


def test_a_choice_is_logged_under_the_clients_own_request_id() -> None:
    assert log_fields("my/id/0af3/2", attempt=1) == {
        "fields": {"request_id": "my/id", "nonce": "0af3", "choice": "2", "attempt": 1}
    }
    assert log_fields("plain") == {"fields": {"request_id": "plain"}}


def test_what_ray_brings_is_json_whoever_wrote_it() -> None:
    lines = ['{"time": "t"}', "plain", "", "{no json", "[1]"]
    found = list(json_lines({"pid": 7, "actor_name": "Shard", "lines": lines}))
    assert found[0] == lines[0]
    wrapped = [json.loads(line) for line in found[1:]]
    assert [line["message"] for line in wrapped] == ["plain", "{no json", "[1]"]
    assert wrapped[0] == {"process": "Shard", "pid": 7, "logger": "output", "message": "plain"}
