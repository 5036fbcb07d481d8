"""The README tells of every key what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from cluster.config import ServiceConfig

README = Path(__file__).parents[2] / "README.md"


def test_the_table_has_every_key_with_its_default_and_no_other() -> None:
    table = README.read_text().partition("## Configuration")[2].partition("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE))
    defaults = {name: field.default for name, field in ServiceConfig.model_fields.items()}
    wanted = {name: "" if default is None else f"`{default}`" for name, default in defaults.items()}
    assert told == {**wanted, "model": "the demo model"}
