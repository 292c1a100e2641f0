import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import schema, storage
from pipeline.datasets import shard_writer
from pipeline.datasets.dataset import DatasetInfo, open_dataset, row_groups
from pipeline.datasets.ingest import ingest
from pipeline.datasets.shard_reader import read_row_group
from pipeline.errors import InputError


def make_masks(folder: Path, count: int = 8, seed: int = 0) -> tuple[str, str]:
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).save(folder / f"images/{i:03d}.png")
        Image.fromarray(rng.integers(0, 2, (12, 16), np.uint8)).save(folder / f"masks/{i:03d}_mask.png")
    return str(folder / "images"), str(folder / "masks")


CLASSES = ["background", "vessel"]


class Seen:
    def __init__(self):
        self.last = (0, 0)

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        assert stage == "ingest"
        self.last = (done, total)


def rows_of(info: DatasetInfo, split: str) -> list[dict]:
    return [row for group in row_groups(info, split) for row in read_row_group(group).to_pylist()]


def test_ingest_writes_rows_that_can_be_read_back(ray_local, tmp_path):
    images, masks = make_masks(tmp_path)
    out = str(tmp_path / "out")
    sink = Seen()
    summary = ingest("masks", images, masks, out, CLASSES, options={"shard_bytes": 700}, sink=sink)
    assert summary["images"] == 8
    assert summary["already"] is False
    assert sink.last == (8, 8)
    info = open_dataset(out)
    assert (info.classes, info.background, info.num_things) == (("background", "vessel"), 0, 2)
    assert info.tasks == ("segmentation",)
    assert sum(part["images"] for part in info.counts.values()) == 8
    assert len([file for file in info.meta["files"] if file["path"].startswith("data/train")]) > 1
    seen = []
    for split in info.counts:
        for row in rows_of(info, split):
            number = Path(row["image_id"]).stem
            assert row["image"] == (tmp_path / f"images/{number}.png").read_bytes()
            mask = np.frombuffer(schema.unpack_map(row["mask"], row["height"], row["width"]), np.uint8)
            truth = np.asarray(Image.open(tmp_path / f"masks/{number}_mask.png"))
            np.testing.assert_array_equal(mask.reshape(12, 16), truth)
            assert (row["split"], row["boxes"], row["label_source"]) == (split, None, "human")
            seen.append(row["image_id"])
    assert sorted(seen) == [f"{i:03d}.png" for i in range(8)]
    for file in info.meta["files"]:
        data = (tmp_path / "out" / file["path"]).read_bytes()
        assert (len(data), shard_writer.hashlib.sha256(data).hexdigest()) == (file["size"], file["sha256"])


def test_shards_follow_the_schema_and_store_what_is_compressed(ray_local, tmp_path):
    images, masks = make_masks(tmp_path)
    out = str(tmp_path / "out")
    ingest("masks", images, masks, out, CLASSES)
    group = row_groups(open_dataset(out), "train")[0]
    with storage.open_input(group.file) as file:
        parquet = pq.ParquetFile(file)
        assert parquet.schema_arrow.equals(schema.DATASET)
        footer = parquet.metadata.row_group(group.index)
        assert footer.num_rows == group.rows
        codecs = {footer.column(i).path_in_schema: footer.column(i).compression for i in range(footer.num_columns)}
    assert codecs["image"] == codecs["mask"] == "UNCOMPRESSED"
    assert codecs["image_id"] == codecs["boxes.list.element.x1"] == "ZSTD"
    encoded = read_row_group(group, ["image", "mask"]).to_pylist()
    assert group.num_bytes == sum(len(value) for row in encoded for value in row.values())
    assert read_row_group(group, ["image_id", "boxes"]).column_names == ["image_id", "boxes"]


def test_row_groups_are_bounded(monkeypatch, tmp_path):
    images, masks = make_masks(tmp_path, count=7)
    monkeypatch.setattr(shard_writer, "ROW_GROUP_ROWS", 3)
    from pipeline.datasets.formats import FORMATS

    form = FORMATS["masks"]
    index = form.index(images, masks, CLASSES, form.settings.parse({}, "--set"))
    plan = shard_writer.ShardPlan(str(tmp_path / "s.parquet"), "train", "masks", tuple(index.sources))
    written = shard_writer.write_shard(plan, index.context)
    assert written.file is not None
    assert [rows for rows, _ in written.file["row_groups"]] == [3, 3, 1]
    monkeypatch.setattr(shard_writer, "ROW_GROUP_BYTES", 1)
    written = shard_writer.write_shard(plan, index.context)
    assert written.file is not None
    assert [rows for rows, _ in written.file["row_groups"]] == [1] * 7


def test_same_data_same_fingerprint_wherever_it_is(ray_local, tmp_path):
    one = ingest("masks", *make_masks(tmp_path / "a"), str(tmp_path / "x"), CLASSES)
    two = ingest("masks", *make_masks(tmp_path / "b"), str(tmp_path / "y"), CLASSES, options={"shard_bytes": 1})
    other = ingest("masks", *make_masks(tmp_path / "c", seed=1), str(tmp_path / "z"), CLASSES)
    assert one["fingerprint"] == two["fingerprint"] != other["fingerprint"]


def test_committed_output(ray_local, tmp_path):
    images, masks = make_masks(tmp_path)
    out = str(tmp_path / "out")
    first = ingest("masks", images, masks, out, CLASSES)
    before = (tmp_path / "out/dataset.json").read_bytes()
    again = ingest("masks", images, masks, out, CLASSES)
    assert again["already"] is True
    assert {**again, "seconds": 0, "already": False} == {**first, "seconds": 0}
    with pytest.raises(InputError, match=r"other inputs: classes was .*'vessel'.*now .*'artery'"):
        ingest("masks", images, masks, out, ["background", "artery"])
    with pytest.raises(InputError, match="options.hold_out.val was None, now 0.2"):
        ingest("masks", images, masks, out, CLASSES, options={"hold_out": {"val": 0.2}})
    os.remove(Path(images) / "000.png")
    with pytest.raises(InputError, match="listing was"):
        ingest("masks", images, masks, out, CLASSES)
    assert (tmp_path / "out/dataset.json").read_bytes() == before


def test_bad_files_are_rejected_with_reasons_and_too_many_fail(ray_local, tmp_path):
    images, masks = make_masks(tmp_path, count=8)
    (tmp_path / "images/000.png").write_bytes(b"not an image")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "masks/001_mask.png")
    Image.fromarray(np.full((12, 16), 9, np.uint8)).save(tmp_path / "masks/002_mask.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "masks/zzz.png")
    os.remove(tmp_path / "masks/003_mask.png")
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match=r"1 of 9 \(11.1 %\) could not be used"):  # before any image is read
        ingest("masks", images, masks, out, CLASSES)
    with pytest.raises(InputError, match=r"4 of 9 \(44.4 %\) could not be used") as found:
        ingest("masks", images, masks, out, CLASSES, options={"max_reject_fraction": 0.2})
    text = str(found.value)
    for part in ("corrupt", "wrong_size", "mask is 5x5", "mask_value", "value 9", "no_image", "zzz"):
        assert part in text
    assert not (tmp_path / "out/dataset.json").exists()
    with pytest.raises(InputError, match="run dubito ingest"):
        open_dataset(out)
    summary = ingest("masks", images, masks, out, CLASSES, options={"max_reject_fraction": 0.5})
    assert summary["rejects"] == {"corrupt": 1, "mask_value": 1, "no_image": 1, "wrong_size": 1}
    assert summary["unlabelled"] == 1
    assert summary["images"] == 5
    rejects = pq.read_table(tmp_path / "out/rejects/rejects-00000.parquet")
    assert rejects.schema.equals(schema.REJECTS)
    assert sorted(rejects["reason"].to_pylist()) == sorted(summary["rejects"])
    unlabelled = rows_of(open_dataset(out), "unlabelled")
    assert [(row["image_id"], row["mask"], row["label_source"]) for row in unlabelled] == [("003.png", None, None)]


def test_voc_with_an_unknown_class_names_the_nearest(ray_local, tmp_path):
    from tests.support.format_cases import image_file, put, xml

    image_file(tmp_path, "JPEGImages/a.png")
    put(tmp_path, "Annotations/a.xml", xml(("RCB", 1, 1, 2, 2)))
    with pytest.raises(InputError, match=r"unknown_class .*object 'RCB' .*Did you mean 'RBC'"):
        ingest("voc", str(tmp_path), None, str(tmp_path / "out"), ["RBC", "WBC"])


def test_inputs_that_are_wrong_as_a_whole(tmp_path):
    images, masks = make_masks(tmp_path, count=1)
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match="unknown format 'vok'. Did you mean 'voc'"):
        ingest("vok", images, masks, out)
    with pytest.raises(InputError, match="--labels is missing"):
        ingest("masks", images, "", out, CLASSES)
    with pytest.raises(InputError, match="folder '.*nowhere' not found"):
        ingest("masks", str(tmp_path / "nowhere"), masks, out, CLASSES)
    with pytest.raises(InputError, match="unknown key 'shard_bites'. Did you mean 'shard_bytes'"):
        ingest("masks", images, masks, out, CLASSES, options={"shard_bites": 3})
    with pytest.raises(InputError, match="cannot be committed"):
        ingest("masks", images, masks, "memory://x", CLASSES)
    (tmp_path / "s.json").write_text('{"train": []}')
    with pytest.raises(InputError, match="would be empty: --splits names none of the images"):
        ingest("masks", images, masks, out, CLASSES, str(tmp_path / "s.json"))


def test_reading_what_is_not_there(ray_local, tmp_path):
    out = tmp_path / "out"
    named = tmp_path / "s.json"
    named.write_text('{"train": ["000"], "test": ["001"]}')
    ingest("masks", *make_masks(tmp_path), str(out), CLASSES, str(named))
    info = open_dataset(str(out))
    assert info.meta["left_out"] == 6
    with pytest.raises(InputError, match=r"no rows in split 'val'; those that have: train \(1\), test \(1\)"):
        row_groups(info, "val")
    group = row_groups(info, "test")[0]
    os.remove(group.file)
    with pytest.raises(InputError, match="dataset is damaged"):
        read_row_group(group)
    meta = json.loads((out / "dataset.json").read_text())
    (out / "dataset.json").write_text(json.dumps({**meta, "schema_version": 99}))
    with pytest.raises(InputError, match="schema version 99"):
        open_dataset(str(out))


def test_ingest_from_s3_to_s3(ray_local, s3, tmp_path):
    images, masks = make_masks(tmp_path)
    for kind, folder in (("images", images), ("masks", masks)):
        for file in Path(folder).iterdir():
            storage.write_bytes(f"{s3}/ingest/{kind}/{file.name}", file.read_bytes())
    local = ingest("masks", images, masks, str(tmp_path / "out"), CLASSES)
    call = ("masks", f"{s3}/ingest/images", f"{s3}/ingest/masks", f"{s3}/ingest/out", CLASSES)
    summary = ingest(*call)
    assert summary["fingerprint"] == local["fingerprint"]
    row = rows_of(open_dataset(f"{s3}/ingest/out"), "train")[0]
    assert row["uri"].startswith(f"{s3}/ingest/images/")
    assert ingest(*call)["already"] is True


# --- the real images, with the counts of their publishers


def test_bccd(ray_local, real_images, tmp_path):
    root = str(real_images / "bccd")
    summary = ingest("voc", root, None, str(tmp_path / "out"), splits=f"{root}/ImageSets/Main")
    assert summary["splits"] == {"train": 205, "val": 87}
    assert summary["repairs"] == {"zero_area_box": 2}
    assert (summary["rejects"], summary["left_out"], summary["unlabelled"]) == ({}, 0, 0)
    info = open_dataset(str(tmp_path / "out"))
    assert info.classes == ("Platelets", "RBC", "WBC")
    boxes = sum((Counter(part["boxes"]) for part in info.counts.values()), Counter())
    written = sum(file.read_text().count("<object>") for file in (real_images / "bccd/Annotations").iterdir())
    assert boxes.total() == written - 2
    for row in rows_of(info, "val"):
        assert all(0 <= b["x1"] < b["x2"] <= 640 and 0 <= b["y1"] < b["y2"] <= 480 for b in row["boxes"])


def test_nuclei(ray_local, real_images, tmp_path):
    root = real_images / "nuclei"
    options = {"split_names": {"val": "test"}, "hold_out": {"val": 0.1}}
    summary = ingest(
        "instances", str(root / "images"), str(root / "labels"), str(tmp_path / "out"), ["nucleus"],
        str(root / "splits.json"), options,
    )  # fmt: skip
    counts = summary["splits"]
    assert counts["test"] == 60
    assert counts["train"] + counts["val"] == 380
    assert 20 < counts["val"] < 56
    info = open_dataset(str(tmp_path / "out"))
    assert (info.classes, info.background, info.num_things) == (("nucleus", "background"), 1, 1)
    row = rows_of(info, "test")[0]
    ids = np.asarray(Image.open(root / "labels" / row["image_id"]))
    assert len(row["boxes"]) == len(np.unique(ids)) - 1
    mask = np.frombuffer(schema.unpack_map(row["mask"], row["height"], row["width"]), np.uint8)
    np.testing.assert_array_equal(mask.reshape(ids.shape), (ids == 0).astype(np.uint8))


def test_chase(ray_local, real_images, tmp_path):
    root = real_images / "chase"
    call = (str(root / "images"), str(root / "observer1"), str(tmp_path / "out"), CLASSES)
    summary = ingest("masks", *call, options={"group": r"Image_(\d+)[LR]"})
    assert summary["images"] == 20
    assert set(summary["splits"]) == {"train", "val", "calibration", "test"}
    assert all(count % 2 == 0 for count in summary["splits"].values())
    info = open_dataset(str(tmp_path / "out"))
    truth = [np.asarray(Image.open(file)).sum() for file in (root / "observer1").iterdir()]
    assert sum(part["pixels"]["vessel"] for part in info.counts.values()) == sum(truth)
    assert summary["notes"] == []
