"""The plan of a scoring job is a pure function of its inputs."""

from functools import partial
from pathlib import Path

from pipeline.models.bundle import open_bundle
from pipeline.scoring.plan import plan_scoring
from tests.support.scoring_cases import ROWS


def test_the_plan_depends_on_its_inputs_alone(tmp_path: Path, data: str, unet: str, detector: str):
    bundle = open_bundle(unet)
    plan = plan_scoring(bundle, data, None, measure=False)
    assert plan.digest == plan_scoring(bundle, data, None, measure=False).digest
    assert plan.rows == ROWS
    assert sorted(plan.expected) == list(range(len(plan.units)))
    others = [
        plan_scoring(bundle, data, "test", measure=False),
        plan_scoring(bundle, data, None, measure=True),
        plan_scoring(open_bundle(detector), data, None, measure=False),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 4


def test_pages_are_bounded_in_images_and_bytes(tmp_path: Path, unet: str):
    root = tmp_path / "images"
    root.mkdir()
    for n in range(11):
        (root / f"{n:02d}.png").write_bytes(bytes(10 if n else 200))
    pages = partial(plan_scoring, open_bundle(unet), str(root), None, measure=False, unit_rows=4, unit_bytes=100)
    plan = pages()
    assert [unit.rows for unit in plan.units] == [1, 4, 4, 2]
    paths = [path for unit in plan.units for path in unit.source["paths"]]
    assert paths == sorted(paths)
    changed = pages()
    assert changed.inputs == plan.inputs
    (root / "05.png").write_bytes(bytes(11))
    changed = pages()
    assert changed.inputs != plan.inputs
