"""A fuzz that looks where it has been: what reaches new lines of the project is broken further.

    python -m benchmarks.faults.coverage_guided_fuzz --seconds 600

Inputs are broken by ``benchmarks.faults.hostile_files``. While one is judged, the lines of
``pipeline`` that run are noted, pairs of lines that follow one another included; an input that reaches a new pair joins
those that are broken next.
"""

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import harness
from benchmarks.faults import hostile_files

PIPELINE = str(Path(__file__).resolve().parents[2] / "pipeline")
SLOW_S = 10.0
"""An input that takes longer hangs."""


@dataclass
class Seen:
    """Steps from line to line, and whether the last input made a new one."""

    steps: set[tuple[str, int, int]] = field(default_factory=set)

    def run(self, work: Callable[[], Any]) -> bool:
        """Run ``work`` with an eye on it; whether it reached anything new."""
        before = len(self.steps)
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        try:
            work()
        finally:
            sys.settrace(None)
            threading.settrace(None)  # pyright: ignore[reportArgumentType]
        return len(self.steps) > before

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PIPELINE):
            return None
        last = frame.f_lineno

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal last
            self.steps.add((frame.f_code.co_filename, last, frame.f_lineno))
            last = frame.f_lineno
            return line

        return line


def explore(
    good: list[Any],
    breaks: Callable[[random.Random, list[Any]], Any],
    judge: Callable[[Any], Any],
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """Break and judge until time is up.

    Args:
        good: What to begin with.
        breaks: Takes some inputs, gives one that is broken.
        judge: Raises where it becomes neither a row nor a reject.
        seconds: How long.
        seed: Of what is broken how.

    Returns:
        ``inputs, kept, steps, slowest_s`` and ``crashes``: what was said, with the input.
    """  # fmt: skip
    rng, seen, corpus = random.Random(seed), Seen(), list(good)
    out: dict[str, Any] = {"inputs": 0, "slowest_s": 0.0, "crashes": []}
    for each in good:
        seen.run(partial(judge, each))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        broken, began = breaks(rng, corpus), time.monotonic()
        try:
            if seen.run(partial(judge, broken)):
                corpus.append(broken)
        except Exception as error:  # whatever it is, it is what is looked for
            out["crashes"].append((f"{type(error).__name__}: {error}"[:300], broken))
        out["inputs"] += 1
        out["slowest_s"] = max(out["slowest_s"], time.monotonic() - began)
    return {**out, "kept": len(corpus) - len(good), "steps": len(seen.steps)}


def images(seconds: float, seed: int = 0, folder: Path | None = None) -> dict[str, Any]:
    """Of the decoder."""
    return explore(hostile_files.good_images(folder), hostile_files.image, hostile_files.judge_image, seconds, seed)


def labels(format: str, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Of a format's readers."""
    with tempfile.TemporaryDirectory() as folder:

        def judge(files: dict[str, bytes]) -> None:
            hostile_files.judge_labels(format, *hostile_files.write_case(Path(folder), files))

        def breaks(rng: random.Random, corpus: list[dict[str, bytes]]) -> dict[str, bytes]:
            return hostile_files.label(rng, format, rng.choice(corpus))

        return explore([hostile_files.good_labels(format)], breaks, judge, seconds, seed)


def main(argv: list[str] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Print the table and the JSON line; return figures and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of each of decoder, voc, coco, masks, instances")
    parser.add_argument("--photographs", type=Path, help="real images to break as well, below this folder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    figures = {"decoder": images(args.seconds, args.seed, args.photographs)}
    figures |= {format: labels(format, args.seconds, args.seed) for format in sorted(hostile_files.CLASSES)}
    for name, found in figures.items():
        for said, _ in found["crashes"][:5]:
            print(f"  {name}: {said}", flush=True)
        found["crashes"] = len(found["crashes"])
    print(harness.table([{"what": name, **found} for name, found in figures.items()]))
    harness.finish("guided", figures, {})
    return json.loads(json.dumps(figures)), {}


if __name__ == "__main__":
    main()
