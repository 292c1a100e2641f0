"""The feed benchmark runs, and its rivals deliver the same pictures."""

import json
from typing import Any

import pytest

from benchmarks.speed import feed
from benchmarks.speed.feed_baselines import repeated


@pytest.mark.long
def test_every_side_delivers_every_image_and_the_same_pixels(ray_local: None, capsys: pytest.CaptureFixture[str]):
    arguments = "--small --sizes 96x80 --count 32 --batch 16 --side 64 --seconds 0 --rounds 1"
    feed.main(arguments.split())
    said: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["benchmark"] == "feed"
    figures = said["figures"]["96x80"]
    for side in (feed.OURS, *feed.RIVALS):
        assert figures[side]["images"] == 32
        assert figures[side]["difference"] < 1.5, side
    assert set(said["ratios"]) == {f"96x80 rate / {side}" for side in feed.RIVALS} | {
        f"96x80 first batch / {feed.BARE}"
    }


def test_shards_under_other_names_are_the_same_shards(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"x")
    found = repeated([str(tmp_path / "a.parquet")], 3)
    assert len(set(found)) == 3
    assert repeated([str(tmp_path / "a.parquet")], 2) == found[:2]
    assert all(open(path, "rb").read() == b"x" for path in found)
