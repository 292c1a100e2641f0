"""What ``limits`` finds of whole jobs of Ray: the driver's time, and what happens before the first result."""

import resource
import time
from pathlib import Path
from typing import Any

import ray
import ray.data

from benchmarks.scale import ten_million_ids
from pipeline.predictions.attempts import MANIFEST
from pipeline.predictions.resume import list_attempts
from pipeline.runtime.progress import SilentSink
from pipeline.scoring import crash_guard
from pipeline.scoring.job import predict


def cpu_s() -> float:
    """CPU seconds that this process took."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


class First(SilentSink):
    """Remembers when something was done for the first time."""

    def __init__(self) -> None:
        self.at: float | None = None

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """Look at the clock."""
        if done and self.at is None:
            self.at = time.perf_counter()


def job(folder: Path, model: str, count: int) -> dict[str, float]:
    """A prediction job over units that cost nothing, and once more with all of them finished before."""
    data = ten_million_ids.write_dataset(folder / "data", count, max(1, count // 250), group=1)
    out, found = folder / "out", dict[str, float]()
    for name in ("scored", "adopted"):
        begin, began, first = cpu_s(), time.perf_counter(), First()
        result = predict(model, data, str(out), sink=first, threads=1)
        found |= {f"{name} CPU": cpu_s() - begin, f"{name} s": time.perf_counter() - began}
        found[f"{name} first"] = (first.at or began) - began
        assert result[name] == count, result
        (out / MANIFEST).rename(out / f"_{name}.json")
    assert len([name for name in list_attempts(str(out)) if name.endswith(".parquet")]) >= count
    lists = sum(path.stat().st_size for path in (out / "_lists").glob("files-*"))
    return {**found, "lists": lists}


def windows(few: int, many: int) -> dict[str, float]:
    """What each reading task of training costs before the first one has begun: the dataset is a range of them."""

    def first(count: int) -> float:
        began = time.perf_counter()
        rows = iter(ray.data.range(count, override_num_blocks=count).map_batches(as_it_is).iter_rows())
        assert 0 <= next(rows)["id"] < count  # whichever is first
        return time.perf_counter() - began

    first(few)  # Ray's workers have to start
    return {"ms a window before the first": 1e3 * (first(many) - first(few)) / (many - few)}


def as_it_is(batch: Any) -> Any:
    """The same."""
    return batch


def driver(folder: Path, model: str, counts: tuple[int, int]) -> dict[str, float]:
    """What a unit takes of the driver, by the difference of two jobs."""
    few, many = (job(folder / str(count), model, count) for count in counts)
    more = {key: (many[key] - few[key]) / (counts[1] - counts[0]) for key in few}
    with crash_guard.start_counter() as starts:
        began = time.perf_counter()
        for unit in range(counts[1]):
            starts.unit_started.remote(unit)
            starts.unit_done.remote(unit)
        ray.get(starts.unit_started.remote(0))  # calls are answered in order
        counted_s = time.perf_counter() - began
    return {
        "ms a unit scored": 1e3 * more["scored CPU"], "units a second here": 1 / more["scored s"],
        "ms a unit before the first": 1e3 * more["scored first"],
        "ms a unit adopted": 1e3 * more["adopted CPU"], "adopted a second here": 1 / more["adopted s"],
        "bytes of lists a unit": more["lists"],
        "units a second that are counted": counts[1] / counted_s,
    }  # fmt: skip
