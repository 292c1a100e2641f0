"""The dashboard and the alerts ask for metrics that exist and labels that they have; the files are sound."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser as promql
import pytest
import yaml

from infra.dashboards import build
from pipeline.runtime import prometheus

FOLDER = Path(__file__).resolve().parents[2] / "infra" / "dashboards"
DASHBOARD = json.loads((FOLDER / "dubito.json").read_text("utf-8"))
RULES = [
    rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text("utf-8"))["groups"] for rule in group["rules"]
]
OF_RAY = {
    "ray_node_gpus_utilization", "ray_node_gram_used", "ray_object_store_memory", "ray_resources",
    "ray_node_cpu_utilization", "ray_node_mem_used", "ray_node_disk_usage",
}  # fmt: skip
KNOWN = {name: metric for metric in prometheus.METRICS for name in prometheus.exported_names(metric)}
PLACE = {
    "type": "object", "required": ["h", "w", "x", "y"], "additionalProperties": False,
    "properties": {name: {"type": "integer", "minimum": 0, "maximum": 24 if name in "wx" else 999} for name in "hwxy"},
}  # fmt: skip
PANEL = {
    "type": "object", "required": ["id", "type", "title", "gridPos"],
    "properties": {
        "id": {"type": "integer"}, "gridPos": PLACE, "title": {"type": "string", "minLength": 1},
        "targets": {
            "type": "array", "minItems": 1,
            "items": {"type": "object", "required": ["refId", "expr", "datasource", "legendFormat"]},
        },
    },
}  # fmt: skip


def queries() -> dict[str, str]:
    """Where it stands -> PromQL, as Prometheus would get it."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in RULES}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$__rate_interval", "1m").replace("$verb", ".*").replace("$run", ".*")
            found[f"{panel['title']} {target['refId']}"] = query
    return found


def parts(node: Any) -> Iterator[Any]:
    """A parsed query, and all that is in it."""
    if isinstance(node, promql.VectorSelector):
        yield node
    elif isinstance(node, promql.MatrixSelector):
        yield from parts(node.vector_selector)
    elif isinstance(node, promql.BinaryExpr):
        for side in (node.lhs, node.rhs):
            yield from parts(side)
    elif isinstance(node, promql.Call):
        for each in node.args:
            yield from parts(each)
    elif isinstance(node, (promql.AggregateExpr, promql.ParenExpr, promql.UnaryExpr, promql.SubqueryExpr)):
        yield node
        yield from parts(node.expr)


def selectors(query: str) -> list[Any]:
    return [part for part in parts(promql.parse(query)) if isinstance(part, promql.VectorSelector)]


def unknown(query: str) -> list[str]:
    """Metrics of ours that are none, and labels that its metrics have not."""
    found, ours = [], set()
    for selector in selectors(query):
        if selector.name not in KNOWN:
            found += [] if selector.name in OF_RAY else [selector.name]
            continue
        labels = {*prometheus.COMMON_TAGS, *prometheus.METRICS[KNOWN[selector.name]].tags}
        labels |= {"le"} if selector.name.endswith("_bucket") else set()
        found += [f"{selector.name}: {each.name}" for each in selector.matchers.matchers if each.name not in labels]
        ours |= labels
    for part in parts(promql.parse(query)):
        by = part.modifier.labels if ours and isinstance(part, promql.AggregateExpr) and part.modifier else []
        found += [f"by {label}" for label in by if label not in ours]
    return found


@pytest.mark.parametrize("where", queries())
def test_a_query_asks_for_what_is_exported(where: str):
    query = queries()[where]
    assert selectors(query)
    assert unknown(query) == []


@pytest.mark.parametrize(
    ("query", "what"),
    [
        ("rate(ray_dubito_image_total[1m])", ["ray_dubito_image_total"]),
        ('ray_dubito_images_total{state="ok"}', ["ray_dubito_images_total: state"]),
        ("sum by (status) (ray_dubito_steps_total)", ["by status"]),
        ("a_metric / on (run) ray_dubito_epochs", ["a_metric"]),
    ],
)
def test_a_query_for_something_else_is_found_out(query: str, what: list[str]):
    assert unknown(query) == what


def test_every_metric_has_a_panel():
    drawn = {
        each.name for where, query in queries().items() if not where.startswith("alert") for each in selectors(query)
    }
    missing = [metric for metric in prometheus.METRICS if not drawn & set(prometheus.exported_names(metric))]
    assert not missing
    assert drawn - set(KNOWN) == OF_RAY


def test_the_alerts_cover_what_a_night_watch_needs():
    names = {rule["alert"] for rule in RULES}
    assert len(names) == len(RULES)
    asked = {KNOWN[each.name] for rule in RULES for each in selectors(rule["expr"])}
    assert {"dubito_running", "dubito_images_total", "dubito_decisions_total", "dubito_nonfinite_total"} <= asked
    for rule in RULES:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        # What an annotation shows must be a label that the expression leaves.
        shown = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        assert shown <= {"verb", "stage", "run"}, rule["alert"]
        top = promql.parse(rule["expr"])
        while isinstance(top, promql.BinaryExpr):
            top = top.lhs
        kept = set(top.modifier.labels) if isinstance(top, promql.AggregateExpr) else set(prometheus.COMMON_TAGS)
        assert shown <= kept, rule["alert"]


def test_grafana_can_import_the_dashboard():
    jsonschema.validate(DASHBOARD["panels"], {"type": "array", "items": PANEL})
    assert {"title", "uid", "schemaVersion", "templating", "time", "panels"} <= set(DASHBOARD)
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        names = [target["refId"] for target in panel.get("targets", [])]
        assert len(set(names)) == len(names)
    variables = {each["name"]: each["type"] for each in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource": "datasource", "verb": "query", "run": "query"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels))) - {"__rate_interval"}
    assert used == set(variables)


def test_the_file_is_what_the_program_writes():
    assert (FOLDER / "dubito.json").read_text("utf-8") == build.text(), "run python -m infra.dashboards.build"


def test_the_table_for_people_is_the_table():
    assert prometheus.as_markdown() in (FOLDER / "README.md").read_text("utf-8")


def test_prometheus_finds_nodes_where_ray_writes_them():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]
    assert all((FOLDER / file).is_file() for file in config["rule_files"])
