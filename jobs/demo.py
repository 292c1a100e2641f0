"""``dubito demo``: the whole path on generated images, and one table of its figures."""

import json
import time
from pathlib import Path
from typing import Any

from jobs.session import ray_session, run_job
from pipeline.runtime.progress import JobOutput

MEMBERS = 2
SEED = 1
"""Seed of the images. Settings were tried on those of seed 0, so nothing was chosen on these."""
CONFIGS = Path(__file__).parent / "configs"
TASKS = {"segmentation": "demo.yaml", "detection": "demo_detection.yaml"}


def run(out: str) -> int:
    """Run the job; returns the exit code."""

    def story(terminal: JobOutput) -> None:
        from pipeline import storage

        root = storage.absolute(out)
        began = time.monotonic()
        with ray_session():
            _data(root, terminal)
            figures = {task: _task(root, task, terminal) for task in TASKS}
        summary = {
            **figures,
            "seconds": round(time.monotonic() - began, 1),
            "picture": storage.join(out, "segmentation.png"),
            "pictures": [storage.join(out, f"{task}.png") for task in TASKS],
            "predictions": storage.join(out, "predictions"),
        }
        storage.write_bytes(storage.join(root, "summary.json"), json.dumps(summary, indent=1).encode())
        terminal.close()
        _table(summary, terminal)

    return run_job("demo", story)


def _data(root: str, terminal: JobOutput) -> None:
    from pipeline import storage
    from pipeline.datasets import ingest

    for name, options in (("data", {}), ("shifted", {"shifted": True, "images": 150})):
        terminal.say(f"demo: making the {'shifted ' if options else ''}images")
        options |= {"seed": SEED}
        ingest.ingest("demo", None, None, storage.join(root, name), options=options, sink=terminal)


def _task(root: str, task: str, terminal: JobOutput) -> dict[str, Any]:
    """Train two members, score the test split and the shifted images, draw; returns the figures of the table."""
    import contextlib

    from pipeline import predictions, storage
    from pipeline.config import load
    from pipeline.datasets.dataset import open_dataset
    from pipeline.errors import DoneError
    from pipeline.report import summary
    from pipeline.scoring import job
    from pipeline.training import ensemble
    from pipeline.training.train_config import TrainConfig

    settings = load(str(CONFIGS / TASKS[task]), [f"data={root}/data", f"out={root}/{task}"])
    terminal.say(f"demo: training {MEMBERS} {task} members")
    with contextlib.suppress(DoneError):
        ensemble.train_ensemble(TrainConfig.parse(settings, TASKS[task]), MEMBERS, resume=True, sink=terminal)
    terminal.close()
    bundle = storage.join(root, task, "bundle")
    tables = {}
    metrics = {}
    for name in ("data", "shifted"):
        uri = storage.join(root, "predictions", f"{task}-{name}")
        data = storage.join(root, name)
        result = job.score(bundle, data, out=uri, split="test", measure="metrics", sink=terminal)
        metrics[name] = result["metrics"]
        tables[name] = predictions.read(uri)
    infos = {name: open_dataset(storage.join(root, name)) for name in tables}
    panels = [
        (title, infos[name], storage.join(root, "predictions", f"{task}-{name}"))
        for title, name in (("test", "data"), ("shifted", "shifted"))
    ]
    storage.write_bytes(storage.join(root, f"{task}.png"), summary.doubtful_images(task, panels))
    figures = {**metrics["data"], **summary.uncertainty_shift(tables["data"], tables["shifted"])}
    if task == "segmentation":
        figures |= {"nll_members": [member["nll"] for member in figures["members"]], "nll_pool": figures["nll"]}
    keys = ["miou", "nll_members", "nll_pool"] if task == "segmentation" else ["map50", "map"]
    return {key: figures[key] for key in [*keys, "uncertainty_test", "uncertainty_shifted", "shift_auroc"]}


def _table(summary: dict[str, Any], terminal: JobOutput) -> None:
    seg, det = summary["segmentation"], summary["detection"]
    members = ", ".join(f"{value:.4f}" for value in seg["nll_members"])
    rows = [
        ("", "segmentation", "detection"),
        ("accuracy on test", f"mIoU {seg['miou']:.3f}", f"mAP@.5 {det['map50']:.3f}"),
        ("NLL of members", members, ""),
        ("NLL of the pool", f"{seg['nll_pool']:.4f}", ""),
        *(
            (text, f"{seg[key]:.4g}", f"{det[key]:.4g}")
            for text, key in (
                ("mean uncertainty on test", "uncertainty_test"),
                ("mean uncertainty on shifted", "uncertainty_shifted"),
                ("AUROC shifted against test", "shift_auroc"),
            )
        ),
    ]
    for name, left, right in rows:
        terminal.say(f"{name:<28} {left:<24} {right}")
    terminal.say(f"{summary['seconds']} s; pictures {', '.join(summary['pictures'])}")
    terminal.say(
        f"predictions (Parquet) {summary['predictions']}; figures {Path(summary['picture']).parent}/summary.json"
    )
