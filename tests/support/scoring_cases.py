"""What several tests of scoring jobs need: folders of images, and a scorer that writes down what it begins."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow as pa

from pipeline.scoring import evaluate as evaluate_module
from pipeline.scoring import job
from pipeline.scoring.scorer import Scorer
from tests.support.tiny import png

ROWS = 22
"""Images of the dataset that ``tests/scoring`` shares."""
UNIT_ROWS = 4
"""Images of a unit here, so that a few images are many units."""

score = partial(job.score, unit_rows=UNIT_ROWS)
predict = partial(job.predict, unit_rows=UNIT_ROWS)
evaluate = partial(evaluate_module.evaluate, unit_rows=UNIT_ROWS)


def folder_of(root: Path, count: int) -> str:
    """Images of different sizes in two folders; the URI of both."""
    for n in range(count):
        path = root / f"part{n % 2}" / f"image{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(20 + n, 30, n))
    return str(root)


def logging_scorer(log: Path, allowed: int = 10**6) -> Callable[..., Scorer]:
    """Writes down every unit that it begins, and loses power after some. Local, so that it travels by value."""

    class LoggingScorer(Scorer):
        num_begun = 0

        def __call__(self, batch: pa.Table) -> pa.Table:
            with log.open("a") as file:
                file.write(f"{batch['unit'][0].as_py()}\n")
            self.num_begun += 1
            if self.num_begun > allowed:
                raise OSError("power cut")
            return super().__call__(batch)

    return LoggingScorer


def begun_units(log: Path) -> list[int]:
    """The units in such a log, sorted."""
    return sorted(int(line) for line in log.read_text().split())
