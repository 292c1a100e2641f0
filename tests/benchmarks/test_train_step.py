"""The benchmark of training runs end to end, and counts what it says."""

import json

import pytest

from benchmarks.speed import end_to_end, feed, train_step


@pytest.mark.long
@pytest.mark.parametrize("extra", [[], ["--decode", "cluster", "--cache", "decoded"]])
def test_it_trains_on_the_stream_and_on_a_batch_that_stays(ray_local, capsys, extra):
    figures, ratios = train_step.main([
        "--device=cpu", "--models", "anchor_free_s", "--count=12", "--picture=64x48", "--input=64", "--batch=2",
        "--rounds=2", "--turn=2", "--warmup=1", "--against", *extra,
    ])  # fmt: skip
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["benchmark"], line["figures"], line["ratios"]) == ("train_step", figures, ratios)
    found = figures["anchor_free_s"]
    untimed = 2 + 2  # prefetched batches, and those that wait on a GPU
    assert found["trained_images"] == 2 * (1 + 2 * (untimed + 2) + 2 * 2)
    assert len(found["stream_img_s"]) == len(found["resident_img_s"]) == 2
    assert set(ratios) == {"anchor_free_s: stream / resident"}
    assert found["stall"] == 1 - ratios["anchor_free_s: stream / resident"]


@pytest.mark.long
def test_its_dataset_has_distinct_images_with_masks_and_boxes(ray_local, tmp_path):
    from pipeline.datasets.dataset import open_dataset

    info = open_dataset(end_to_end.make_dataset(tmp_path, feed.photographs(None), (64, 48), 6))
    assert info.counts["train"]["images"] == 6
    assert set(info.tasks) == {"segmentation", "detection"}
    assert len({path.read_bytes() for path in (tmp_path / "images").iterdir()}) == 6
