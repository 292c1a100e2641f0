"""What dataset.json says: fingerprint, statistics, rejects, colours."""

import numpy as np

from pipeline.datasets import metadata, shard_writer
from pipeline.datasets.formats.base import Context, Reject

CONTEXT = Context(("a", "background"), 1, ("segmentation", "detection"), None)


def test_fingerprint_depends_on_content_alone():
    rows = [("1", "train", "aa", "l1"), ("2", "val", "bb", None)]
    same = metadata.fingerprint(rows, CONTEXT)
    assert metadata.fingerprint(rows[::-1], CONTEXT) == same
    others = [
        metadata.fingerprint([("1", "train", "aa", "l2"), rows[1]], CONTEXT),
        metadata.fingerprint([("1", "test", "aa", "l1"), rows[1]], CONTEXT),
        metadata.fingerprint(rows, Context(("b", "background"), 1, CONTEXT.tasks, None)),
    ]
    assert len({same, *others}) == 4


def test_statistics_are_those_of_the_train_pixels():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (4, 6, 3), np.uint8), rng.integers(0, 256, (8, 2, 3), np.uint8)]
    total = shard_writer.SplitStatistics()
    for pixels in images:
        part = shard_writer.SplitStatistics(images=1)
        part.sizes[pixels.shape[0], pixels.shape[1]] += 1
        for channel in range(3):
            part.histogram[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
        total.add(part)
    found = metadata.statistics({"train": total, "test": shard_writer.SplitStatistics(images=9)})
    flat = np.concatenate([pixels.reshape(-1, 3) for pixels in images]) / 255
    np.testing.assert_allclose(found["mean"], flat.mean(0), atol=1e-6)
    np.testing.assert_allclose(found["std"], flat.std(0), atol=1e-6)
    assert found["height"] == {"min": 4, "median": 8, "max": 8}
    assert found["images"] == 2


def test_table_of_rejects_is_most_frequent_first():
    rejects = [Reject("u1", "rare", "x"), Reject("u2", "often", "y"), Reject("u3", "often", "z")]
    lines = metadata.reject_table(rejects).splitlines()
    assert lines[0].split() == ["2", "often", "first:", "u2:", "y"]
    assert "u1: x" in lines[1]


def test_palette_has_as_many_different_colours():
    assert len(set(metadata.palette(100))) == 100


# --- ingest
