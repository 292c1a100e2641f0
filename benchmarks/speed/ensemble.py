"""What M members cost in one pass over the images, beside M passes of one member each.

    python -m benchmarks.speed.ensemble --images FOLDER
    python -m benchmarks.speed.ensemble --small

Sides: one ``dubito predict`` with all members in one bundle; a ``dubito predict`` for each member; and, as the rival,
a job of Ray's documented batch inference for each (``benchmarks.speed.predict``, in the setting that is best for it
there). Bytes of images read, images decoded and CPU-seconds of decoding and framing are counted inside the workers; the
wall time is that of whole jobs. The one pass also pools the members and measures their doubt, the others do not.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks import harness
from benchmarks.speed import predict as single
from jobs.session import ray_session
from pipeline import predictions
from pipeline.runtime.progress import SilentSink
from pipeline.scoring.job import predict
from pipeline.scoring.scorer import Scorer
from pipeline.scoring.unit_reader import Reader

ONE, OURS, RIVAL = "one pass", "a predict a member", "Ray's documented pattern a member"


def counting(log: Path) -> tuple[type[Reader], type[Scorer]]:
    """Reader and scorer that note what they do, one JSON line each time. Local, so that they travel by value."""

    class CountingReader(Reader):
        def __call__(self, batch: pa.Table) -> pa.Table:
            out = super().__call__(batch)
            with pa.ipc.open_stream(out["images"][0].as_buffer()) as stream:
                images = stream.read_all()["image"]
            note(log, bytes_read=sum(len(image.as_buffer()) for image in images if image.is_valid))
            return out

    class CountingScorer(Scorer):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            predictor = self.predictor
            # In the calling thread, whose CPU time can be told from that of the members.
            predictor.task.collator.threads = 1
            collate = predictor._collate

            def timed(table: pa.Table) -> Any:
                began = time.thread_time()
                out = collate(table)
                note(log, decoded=table.num_rows, decode_s=time.thread_time() - began)
                return out

            predictor._collate = timed  # type: ignore[method-assign]

    return CountingReader, CountingScorer


def note(log: Path, **values: float) -> None:
    """One line; appending is atomic."""
    with log.open("a") as file:
        file.write(json.dumps(values) + "\n")


def counted(log: Path) -> dict[str, float]:
    """Sums of what was noted; the log is emptied."""
    total: dict[str, float] = {"bytes_read": 0.0, "decoded": 0.0, "decode_s": 0.0}
    for line in log.read_text().splitlines() if log.exists() else []:
        for key, value in json.loads(line).items():
            total[key] += value
    log.unlink(missing_ok=True)
    return total


class Runs:
    """Every side over the same folder of images; each turn writes to folders of its own."""

    def __init__(self, root: Path, images: Path, bundles: list[str], pool: str, side: int) -> None:
        self.root, self.images, self.bundles, self.pool, self.side = root, images, bundles, pool, side
        self.log, self.number = root / "log", 0
        self.figures: dict[str, list[dict[str, float]]] = {}

    def turn(self, name: str, jobs: list[Callable[[Path], Any]]) -> float:
        """Images a second of all the jobs one after the other."""
        began = time.perf_counter()
        for job in jobs:
            self.number += 1
            job(self.root / f"out{self.number}")
        seconds = time.perf_counter() - began
        self.figures.setdefault(name, []).append({"wall_s": seconds, **counted(self.log)})
        return single.count(self.images) / seconds

    def predict(self, uri: str, target: Path) -> None:
        """One ``dubito predict``, counted."""
        reader, scorer = counting(self.log)
        made = predict(uri, str(self.images), str(target), sink=SilentSink(), reader_class=reader, scorer_class=scorer)
        wanted = single.count(self.images)
        if made["statuses"] != {"ok": wanted} or predictions.read(str(target)).num_rows != wanted:
            raise RuntimeError(f"{made['statuses']} where {wanted} images were")

    def sides(self, rival: bool) -> dict[str, Callable[[], float]]:
        """Name -> one turn."""
        setting = {"batch": 16, "early": True, "apart": True}
        weights = [str(Path(uri).parent / "0.safetensors") for uri in self.bundles]
        jobs: dict[str, list[Callable[[Path], Any]]] = {
            ONE: [partial(self.predict, self.pool)],
            OURS: [partial(self.predict, uri) for uri in self.bundles],
        }
        if rival:
            jobs[RIVAL] = [partial(single.rival, path, self.side, self.images, **setting) for path in weights]
        return {name: partial(self.turn, name, each) for name, each in jobs.items()}


def median(runs: list[dict[str, float]], key: str) -> float:
    """Of one figure."""
    return harness.spread([run[key] for run in runs])[0]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs; default: scikit-image's samples")
    parser.add_argument("--size", default="500x375", help="width x height of the JPEGs")
    parser.add_argument("--side", type=int, help="side of the network's square input in pixels (512; small: 128)")
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--count", type=int, help="images (GPU: 20000, else 128; small: 24)")
    parser.add_argument("--rounds", type=int, help="turns of each side (3; small: 1)")
    parser.add_argument("--no-rival", dest="rival", action="store_false", help="leave Ray's pattern out")
    parser.add_argument("--small", action="store_true", help="under 2 minutes on 2 cores: few images, small input")
    args = parser.parse_args(argv)
    args.count = args.count or (24 if args.small else 20_000 if single.torch.cuda.is_available() else 128)
    args.rounds = args.rounds or (1 if args.small else 3)
    args.side = args.side or (128 if args.small else 512)
    return args


def main(argv: list[str] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Print the table and the JSON line; return figures and ratios."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as folder, ray_session():
        root = Path(folder)
        _, images = single.folders(root, args, args.count)
        pool = single.write_bundle(root / "pool", args.side, list(range(args.members)))
        bundles = [single.write_bundle(root / f"member{k}", args.side, [k]) for k in range(args.members)]
        runs = Runs(root, images, bundles, pool, args.side)
        harness.in_turns(runs.sides(args.rival), args.rounds)
    rows: list[dict[str, Any]] = []
    for name, found in runs.figures.items():
        told = {key: None if name == RIVAL else median(found, key) for key in ("bytes_read", "decoded", "decode_s")}
        rows.append({"side": name, "images": args.count, "wall s": median(found, "wall_s"), **told})
    print(harness.table(rows), flush=True)
    one = runs.figures[ONE]
    ratios = {
        f"{key}: {OURS} / {ONE}": median(runs.figures[OURS], key) / median(one, key)
        for key in ("bytes_read", "decoded", "decode_s", "wall_s")
    }
    if args.rival:
        ratios[f"wall_s: {RIVAL} / {ONE}"] = median(runs.figures[RIVAL], "wall_s") / median(one, "wall_s")
    harness.finish("ensemble", {"members": args.members, "images": args.count, **runs.figures}, ratios)
    return runs.figures, ratios


if __name__ == "__main__":
    main()
