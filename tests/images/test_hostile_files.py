"""Hostile input: whatever is in a file, it becomes a row, a counted reject, or one sentence; no crash, no hang."""

import random
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.faults import coverage_guided_fuzz, hostile_files
from pipeline.datasets.formats import coco
from pipeline.images.decode import DecodeError, decode

SECONDS = 5.0
"""What one file may take, on a busy machine."""


@pytest.mark.parametrize("part", range(4))
def test_mutated_images_become_a_row_or_a_reject(real_or_none: Path | None, part: int):
    rng, good = random.Random(part), hostile_files.good_images(real_or_none)
    words: Counter[str] = Counter()
    for _ in range(250):
        data = hostile_files.image(rng, good)
        began = time.monotonic()
        words[hostile_files.judge_image(data)] += 1
        assert time.monotonic() - began < SECONDS
    assert words["row"] > 20
    assert words["corrupt"] > 50


@settings(max_examples=150)
@given(st.data())
def test_whatever_follows_a_known_beginning(data: st.DataObject):
    good = hostile_files.good_images()
    base = data.draw(st.sampled_from(good))
    cut = data.draw(st.integers(0, min(len(base), 200)))
    hostile_files.judge_image(base[:cut] + data.draw(st.binary(max_size=300)))


@pytest.mark.parametrize("format", sorted(hostile_files.CLASSES))
def test_mutated_labels_become_a_row_a_reject_or_a_sentence(tmp_path: Path, format: str):
    rng, good = random.Random(7), hostile_files.good_labels(format)
    assert hostile_files.judge_labels(format, *hostile_files.write_case(tmp_path, good)) == {"row": 3}
    words: Counter[str] = Counter()
    for number in range(120):
        files = hostile_files.label(rng, format, good)
        began = time.monotonic()
        try:
            words += hostile_files.judge_labels(format, *hostile_files.write_case(tmp_path, files))
        except Exception as error:
            raise AssertionError(f"case {number}: {[data[:3000] for data in files.values()]}") from error
        assert time.monotonic() - began < SECONDS
    assert words["row"] > 100
    assert not words["refused at length"]
    assert words.total() - words["row"] > 20


@pytest.mark.parametrize("what", ["decoder", *sorted(hostile_files.CLASSES)])
@pytest.mark.parametrize("seconds", [6, pytest.param(60, marks=pytest.mark.long)])
def test_what_reaches_new_lines_is_broken_further(what: str, seconds: float):
    found = coverage_guided_fuzz.images(seconds) if what == "decoder" else coverage_guided_fuzz.labels(what, seconds)
    assert found["crashes"] == []
    assert found["inputs"] > 10
    assert found["kept"] > 0, "nothing new was reached: is it looked at?"
    assert found["slowest_s"] < coverage_guided_fuzz.SLOW_S


def test_a_jpeg_of_a_thousand_scans_is_refused_at_once():
    data = next(each for each in hostile_files.good_images() if b"\xff\xc2" in each[:700])
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    with pytest.raises(DecodeError, match="scans; at most"):
        decode(data[:at] + scan * 1000 + data[-2:])


def test_ten_thousand_boxes_in_one_image(tmp_path: Path):
    files = hostile_files.good_labels("voc")
    thing = b"<object>" + files["a.xml"].split(b"<object>", 1)[1].split(b"</object>")[0] + b"</object>"
    files["a.xml"] = files["a.xml"].replace(b"</annotation>", thing * 10_000 + b"</annotation>")
    began = time.monotonic()
    assert hostile_files.judge_labels("voc", *hostile_files.write_case(tmp_path, files)) == {"row": 3}
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("compressed", [False, True])
def test_run_lengths_are_those_of_the_reference(compressed: bool):
    rle = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(3)
    for _ in range(50):
        pixels = rng.random((int(rng.integers(1, 90)), int(rng.integers(1, 90)))) < rng.random()
        packed = rle.encode(np.asfortranarray(pixels.astype(np.uint8)))
        counts = packed["counts"]
        if not compressed:
            flat = pixels.T.ravel()
            edges = np.flatnonzero(np.diff(flat, prepend=False, append=not flat[-1] if len(flat) else False))
            counts = np.diff(edges, prepend=0).tolist()
        assert np.array_equal(coco._from_runs(counts, *pixels.shape), pixels)


def test_run_lengths_beyond_the_image_are_refused():
    for counts in ([5, 10**12], [3, -3, 24 * 32], "0" * 5, "?" * 40, "~", [1.5], ["a"], None):
        with pytest.raises((ValueError, TypeError)):
            coco._from_runs(counts, 24, 32)


def test_memory_stays_bounded():
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6 * 2**20  # kB


@pytest.fixture(scope="module")
def real_or_none() -> Path | None:
    from tests.conftest import SHARED

    return SHARED if SHARED.is_dir() else None
