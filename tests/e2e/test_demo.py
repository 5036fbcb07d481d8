"""`make demo`: the model that comes with Arriero, served, asked over both protocols, checked, and taken down."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from serve_process import MARK, living

from cluster import demo
from cluster.checkpoints.demo_tasks import TASKS

pytestmark = pytest.mark.cluster

TIME_LIMIT_S = 240


def test_the_demo_gets_its_answers_right_and_leaves_nothing(tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), MARK: mark, "COLUMNS": "160"}
    result = subprocess.run(
        [sys.executable, "-m", "cluster.demo"], capture_output=True, text=True, env=environment, timeout=TIME_LIMIT_S
    )
    assert result.returncode == 0, result.stdout + result.stderr
    text = result.stdout
    assert text.count("  right (first token after") == 2 * len(TASKS), text
    for task in TASKS:
        [count] = re.findall(rf"^  {task} +(\d+) of {demo.NUM_CHECKED} right, \d+ tokens/s", text, re.MULTILINE)
        assert int(count) >= demo.MIN_ACCURACY * demo.NUM_CHECKED
        assert re.search(rf"^ +\d+ +{task} .*expert \d+: \d+% *$", text, re.MULTILINE), text
    assert living(mark) == {}
