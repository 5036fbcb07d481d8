"""The dashboard and the table of metrics speak of metrics that there are."""

import json
import re
from pathlib import Path

from cluster.metrics.definitions import METRICS, Kind

FOLDER = Path(__file__).parents[2] / "deploy" / "dashboards"
NAME = re.compile(r"\b(?:vllm|arriero):\w+")
SERIES = {name for metric in METRICS for name in metric.series_names}


def test_every_query_of_the_dashboard_is_of_series_that_exist() -> None:
    dashboard = json.loads((FOLDER / "arriero.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [
        variable["query"]["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"
    ]
    asked = {name for expression in expressions for name in NAME.findall(expression)}
    assert len(asked) > 20
    assert asked <= SERIES
    assert all(expression.count("(") == expression.count(")") for expression in expressions)


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = json.loads((FOLDER / "arriero.json").read_text())["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(panels) == len({panel["id"] for panel in panels})


def test_the_table_has_every_metric_with_its_type_labels_and_meaning() -> None:
    text = (FOLDER / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    expected = [
        [
            f"`{metric.name}{'_total' if metric.kind is Kind.COUNTER else ''}`",
            metric.kind,
            ", ".join(f"`{label}`" for label in ((*["member"] * metric.per_member, *metric.labels))),
            metric.help,
        ]
        for metric in METRICS
    ]
    assert rows == expected
