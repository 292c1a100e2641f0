"""Writes ``dubito.json``, a dashboard that Grafana imports: ``python -m infra.dashboards.build``."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("dubito.json")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT = 8, 8
"""Of a panel; a row of the grid is 24 wide."""
OURS = 'verb=~"$verb", run=~"$run"'
BY = "verb, stage, run"


@dataclass(frozen=True)
class Panel:
    """One drawing: queries and what their lines are called."""

    title: str
    what: str
    queries: dict[str, str]
    """Legend -> PromQL; ``OURS`` stands for the labels that the variables choose."""
    unit: str = "short"
    kind: str = "timeseries"
    options: dict[str, Any] = field(default_factory=dict)
    """Of the field's defaults."""


def _share(counter: str, chosen: str) -> str:
    """Part of a run's images; counters of a run begin at zero, so this is the share so far."""
    return f"sum by ({BY}) ({counter}{{{chosen}, OURS}}) / sum by ({BY}) ({counter}{{OURS}})"


def _quantile(share: float) -> str:
    rate = "rate(ray_dubito_step_seconds_bucket{OURS}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by (le, {BY}) ({rate}))"


STAGE, LOG = "{{verb}} {{stage}} {{run}}", {"custom": {"scaleDistribution": {"type": "log", "log": 10}}}
PART = {"min": 0, "max": 1}
ROWS = {
    "Speed": [
        Panel(
            "Images a second",
            "Trained on, scored or ingested.",
            {STAGE: f"sum by ({BY}) (rate(ray_dubito_images_total{{OURS}}[$__rate_interval]))"},
        ),
        Panel(
            "Waiting for data",
            "Share of the time in which a training worker or a scoring actor had nothing to work on; mean of the "
            "processes.",
            {STAGE: f"avg by ({BY}) (rate(ray_dubito_wait_seconds_total{{OURS}}[$__rate_interval]))"},
            "percentunit",
            options=PART,
        ),
        Panel(
            "Running stages",
            "A stage that ended is gone after 20 s.",
            {STAGE: f"max by ({BY}) (ray_dubito_running{{OURS}})"},
            kind="state-timeline",
            options={"max": 1, "min": 0},
        ),
    ],
    "Training": [
        Panel(
            "Loss",
            "The last one; of the validation split at each look.",
            {"{{split}} {{stage}} {{run}}": "ray_dubito_loss{OURS}"},
            options=LOG,
        ),
        Panel("Learning rate", "Of the last step.", {STAGE: "ray_dubito_learning_rate{OURS}"}, "sci"),
        Panel("Epochs", "Parts of them included.", {STAGE: "ray_dubito_epochs{OURS}"}),
        Panel(
            "Steps a second",
            "Optimiser steps.",
            {STAGE: f"sum by ({BY}) (rate(ray_dubito_steps_total{{OURS}}[$__rate_interval]))"},
        ),
        Panel(
            "Time of a step",
            "From the moment that its data is asked for.",
            {"median {{stage}} {{run}}": _quantile(0.5), "95 % {{stage}} {{run}}": _quantile(0.95)},
            "s",
        ),
        Panel(
            "Checkpoints",
            "Of each run: saved after a validation, kept since a machine was about to go, restored.",
            {"{{event}} {{stage}} {{run}}": f"sum by (event, {BY}) (ray_dubito_checkpoints_total{{OURS}})"},
        ),
    ],
    "Doubt": [
        Panel("Mean uncertainty", "Of the images scored so far.", {STAGE: "ray_dubito_uncertainty_mean{OURS}"}),
        Panel(
            "Share for review",
            "Of the images scored so far that were decided on.",
            {STAGE: _share("ray_dubito_decisions_total", 'decision="review"')},
            "percentunit",
            options=PART,
        ),
    ],
    "Trouble": [
        Panel(
            "Images that could not be had",
            "Of each run, by status.",
            {"{{status}} {{stage}} {{run}}": f'sum by (status, {BY}) (ray_dubito_images_total{{status!="ok", OURS}})'},
        ),
        Panel(
            "Rejects",
            "Of each ingest, by reason.",
            {"{{reason}} {{run}}": f"sum by (reason, {BY}) (ray_dubito_rejects_total{{OURS}})"},
        ),
        Panel(
            "Begun again, and losses that were no number",
            "Units whose process died, members whose training failed.",
            {
                "{{what}} {{stage}} {{run}}": f"sum by (what, {BY}) (ray_dubito_restarts_total{{OURS}})",
                "no number {{stage}} {{run}}": f"sum by ({BY}) (ray_dubito_nonfinite_total{{OURS}})",
            },
        ),
    ],
    "Cluster (Ray's own metrics)": [
        Panel(
            "GPU utilisation",
            "Of each GPU.",
            {"{{instance}} {{GpuIndex}}": "sum by (instance, GpuIndex) (ray_node_gpus_utilization) / 100"},
            "percentunit",
            options=PART,
        ),
        Panel(
            "GPU memory",
            "Used, of each GPU.",
            {"{{instance}} {{GpuIndex}}": "sum by (instance, GpuIndex) (ray_node_gram_used) * 1024 * 1024"},
            "bytes",
        ),
        Panel(
            "Object store",
            "By where it is; SPILLED is on disk.",
            {
                "{{Location}}": "sum by (Location) (ray_object_store_memory)",
                "size": 'sum(ray_resources{Name="object_store_memory"})',
            },
            "bytes",
        ),
        Panel(
            "CPU utilisation",
            "Of each node.",
            {"{{instance}}": "avg by (instance) (ray_node_cpu_utilization) / 100"},
            "percentunit",
            options=PART,
        ),
        Panel(
            "Memory",
            "Used, of each node.",
            {"{{instance}}": "sum by (instance) (ray_node_mem_used)"},
            "bytes",
        ),
        Panel("Disk", "Used, of each node.", {"{{instance}}": "sum by (instance) (ray_node_disk_usage)"}, "bytes"),
    ],
}


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        place = {"h": 1, "w": 24, "x": 0, "y": top}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": place, "panels": []})
        for number, panel in enumerate(row):
            x, y = number * WIDTH % 24, top + 1 + number * WIDTH // 24 * HEIGHT
            place = {"h": HEIGHT, "w": WIDTH, "x": x, "y": y}
            panels.append({"id": len(panels) + 1, "gridPos": place, **_drawn(panel)})
        top += 1 + -(-len(row) * WIDTH // 24) * HEIGHT
    return {
        "title": "Dubito",
        "uid": "dubito",
        "tags": ["dubito", "ray"],
        "description": "Images, waits, losses, doubt and trouble of every run on a Ray cluster.",
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_source(), _chosen("verb"), _chosen("run")]},
        "panels": panels,
    }


def _drawn(panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + n), "datasource": SOURCE, "legendFormat": legend, "expr": query.replace("OURS", OURS)}
        for n, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.what,
        "datasource": SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, **panel.options}, "overrides": []},
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _chosen(label: str) -> dict[str, Any]:
    query = f"label_values(ray_dubito_images_total, {label})"
    choice = {"includeAll": True, "multi": True, "allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}}
    return {"name": label, "type": "query", "datasource": SOURCE, "query": query, "refresh": 2, **choice}


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
