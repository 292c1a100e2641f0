"""Frames made in tasks instead of workers, and kept in the object store: the same batches in the same order."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline import schema
from pipeline.datasets.shard_reader import RowGroup
from pipeline.errors import InputError
from pipeline.images.input_settings import InputSettings
from pipeline.stream import run_stream
from pipeline.stream.epoch_order import EpochOrder, plan_remaining_rows
from pipeline.stream.frame_cache import FrameCache, FrameRows, require_cache_room
from pipeline.stream.run_stream import ExpandUnits, Ledger
from pipeline.tasks.collate import FAULT, FRAME
from tests.images.test_gpu_decode import jpeg, picture
from tests.stream.test_batches import same
from tests.support.train_cases import tree, worker_of

COLUMNS = ["image_id", "image", "height", "width", "mask", "boxes"]


def table_of(count: int, seed: int = 0) -> pa.Table:
    """Photographs of several sizes with masks and boxes."""
    out = []
    for n in range(count):
        height, width = [(40, 60), (264, 248), (33, 33)][n % 3]  # one is so large that it is decoded at half its size
        box = {"x1": 2.0, "y1": 3.0, "x2": 20.0, "y2": 30.0, "label": n % 2, "crowd": False, "instance": 0}
        mask = np.full((height, width), n % 3, np.uint8)
        out.append({
            "image_id": f"{seed}-{n}", "image": jpeg(picture(height, width, 100 * seed + n)), "height": height,
            "width": width, "mask": schema.pack_map(mask.tobytes()), "boxes": [box] * (n % 3),
        })  # fmt: skip
    return pa.Table.from_pylist(out, schema=pa.schema([schema.DATASET.field(name) for name in COLUMNS]))


def placed(table: pa.Table) -> pa.Table:
    """With the stream's own columns."""
    count = table.num_rows
    table = table.append_column("position", pa.array(np.arange(count, dtype=np.int64)))
    table = table.append_column("epoch", pa.array(np.ones(count, np.int64)))
    return table.append_column("resumed_from", pa.array([""] * count))


@pytest.fixture
def shards(tmp_path) -> list[RowGroup]:
    """Three row groups of 5, 4 and 6 rows."""
    groups = []
    for n, rows in enumerate([5, 4, 6]):
        path = str(tmp_path / f"{n}.parquet")
        table = table_of(rows, n)
        pq.write_table(table, path)
        groups.append(RowGroup(path, 0, rows, table.nbytes))
    return groups


@pytest.mark.parametrize("task", ["segmentation", "detection"])
@pytest.mark.parametrize("fit", ["letterbox", "stretch", "crop"])
def test_frames_made_elsewhere_become_the_batch_made_here(task, fit):
    config = tree(task, input={"size": [32, 48], "fit": fit}, seed=3)
    worker, table = worker_of(config), placed(table_of(7))
    here, _ = worker.task.collate(table, train=True, seed=config.seed)
    framed = FrameRows(config.input, config.seed)(table)
    assert "image" not in framed.column_names
    assert framed[FRAME].type.byte_width == here.images[0].numel() == FrameRows(config.input, 0).row_bytes
    there, failures = worker.task.collate(framed, train=True, seed=config.seed)
    assert failures == []
    same(here, there)
    # As Ray cuts and glues blocks:
    glued = pa.concat_tables([framed.slice(0, 2), framed.slice(2, 3)]).slice(1, 3)
    part, _ = worker.task.collate(glued, train=True, seed=config.seed)
    assert torch.equal(part.images, here.images[1:4])


def test_an_image_that_cannot_be_framed_is_a_failure_and_its_neighbours_are_none():
    table = table_of(4)
    files = table["image"].to_pylist()
    files[1], files[2] = b"nothing", jpeg(picture(10, 10))
    table = placed(table.set_column(1, "image", pa.array(files, pa.binary())))
    worker = worker_of(tree("segmentation"))
    here, wanted = worker.task.collate(table, train=True, seed=0)
    framed = FrameRows(worker.config.input, 0)(table)
    assert [fault is None for fault in framed[FAULT].to_pylist()] == [True, False, False, True]
    there, found = worker.task.collate(framed, train=True, seed=0)
    assert found == wanted
    assert [row for row, *_ in found] == [1, 2]
    same(here, there)


def test_the_order_is_the_same_with_frames(shards):
    order = EpochOrder.of(shards, 3, 2 * max(group.num_bytes for group in shards))
    used = Ledger()
    used.add(np.array([0, 4, 20]))
    framing = FrameRows(InputSettings(size=(32, 32)), 3)

    def walk(**more) -> pa.Table:
        expand = ExpandUnits(order, tuple(COLUMNS), 0, 40, used.to_bytes(), 4, "", **more)
        return pa.concat_tables(list(expand({"id": np.arange(3 * order.windows)})))

    plain, framed = walk(), walk(framing=framing)
    assert plain.drop_columns(["image"]).equals(framed.drop_columns([FRAME, FAULT]))
    again = framing(plain)
    assert again[FRAME].combine_chunks().equals(framed[FRAME].combine_chunks())


def test_cached_frames_are_made_once_and_every_position_comes_once(ray_local, shards):
    import ray

    order = EpochOrder.of(shards, 3, 2 * max(group.num_bytes for group in shards))
    rest = plan_remaining_rows(Ledger(), 3 * order.rows, 4)
    settings = InputSettings(size=(32, 32))
    framing = FrameRows(settings, 3)
    given = (order, rest, Ledger(), COLUMNS, 4, "")

    def read(dataset) -> pa.Table:
        return pa.concat_tables(list(dataset.iter_batches(batch_size=4, batch_format="pyarrow")))

    plain = read(run_stream.dataset(*given))
    cached = read(run_stream.dataset(*given, framing=framing, cached=True))
    assert cached["position"].to_pylist() == list(range(rest.stop))
    assert cached["image_id"].to_pylist() == plain["image_id"].to_pylist()
    assert framing(plain)[FRAME].combine_chunks().equals(cached[FRAME].combine_chunks())

    cache = FrameCache.start(framing, COLUMNS)
    first = cache.read(shards[:2])
    again = cache.read([shards[1], shards[0]])
    assert ray.get(cache.keeper.count.remote()) == 2, "a row group was framed again"
    assert again[1].equals(first[0])


@pytest.mark.parametrize(("gigabytes", "fits"), [(0.5, True), (0.45, False)])
def test_a_cache_that_would_not_fit_is_refused_with_the_numbers(gigabytes, fits):
    framing = FrameRows(InputSettings(size=(256, 256)), 0)
    if fits:
        require_cache_room(framing, 1000, gigabytes * 1e9)
        return
    text = r"1000 frames of 256x256, 0\.20 GB; the cluster's object stores have 0\.45 GB, .* 40% \(0\.18 GB\)"
    with pytest.raises(InputError, match=text):
        require_cache_room(framing, 1000, gigabytes * 1e9)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"stream": {"cache": "decoded"}, "input": {"size": [32, 32], "fit": "crop"}}, "takes another window in every"),
        ({"stream": {"cache": "decoded", "decode": "host"}}, "stream.decode is host"),
        ({"stream": {"cache": "decoded", "decode": "device"}}, "stream.decode is device"),
    ],
)
def test_a_cache_of_what_is_not_kept_is_refused(settings, text):
    with pytest.raises(InputError, match=text):
        tree("segmentation", **settings)


def test_png_files_travel_as_frames_too():
    out = io.BytesIO()
    Image.fromarray(picture(40, 60)).save(out, "PNG")
    table = table_of(1).set_column(1, "image", pa.array([out.getvalue()], pa.binary()))
    framed = FrameRows(InputSettings(size=(40, 60)), 0)(placed(table))
    assert framed[FRAME][0].as_py() == picture(40, 60).tobytes()
