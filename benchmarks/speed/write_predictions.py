"""How long predictions take to encode and to write: masks and maps as this project keeps them, beside PNG.

    python -m benchmarks.speed.write_predictions
    python -m benchmarks.speed.write_predictions --small

Masks are smooth regions with ragged edges, maps are smooth with noise, as networks make them. Encoding: one image at a
time, in memory, on one thread; each decodes to what went in (checked). Writing: rows through ``predictions.write_unit``
to a local folder, in units of 64, beside one PNG file an image for mask and map.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks import harness
from pipeline import predictions
from pipeline.schema import PREDICTIONS, pack_map, unpack_map

UNIT = 64
OURS, PNG, FAST_PNG = "zstd-1", "PNG, level 6", "PNG, level 1"


def pictures(count: int, size: int, classes: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(masks, maps): (size, size) uint8 each."""
    rng = np.random.default_rng(0)
    masks, maps = [], []
    for _ in range(count):
        coarse = Image.fromarray(rng.random((12, 12)).astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
        smooth = np.asarray(coarse) + rng.normal(0, 0.003, (size, size))
        masks.append((np.clip(smooth, 0, 0.999) * classes).astype(np.uint8))
        maps.append((np.clip(np.abs(smooth - 0.5) + rng.normal(0, 0.01, (size, size)), 0, 1) * 255).astype(np.uint8))
    return masks, maps


def png(level: int, pixels: np.ndarray) -> bytes:
    """By Pillow."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=level)
    return out.getvalue()


def from_png(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    """Undo ``png``."""
    return np.asarray(Image.open(io.BytesIO(data))).reshape(shape)


def ours(pixels: np.ndarray) -> bytes:
    """As a prediction keeps a mask or a map."""
    return pack_map(np.ascontiguousarray(pixels).tobytes())


def from_ours(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    """Undo ``ours``."""
    return np.frombuffer(unpack_map(data, *shape), np.uint8).reshape(shape)


def encoding(name: str, items: list[np.ndarray], rounds: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(table rows, figures) of all encoders over the same pictures."""
    encoders: dict[str, Callable[[np.ndarray], bytes]] = {OURS: ours, PNG: partial(png, 6), FAST_PNG: partial(png, 1)}
    sizes = {}

    def turn(side: str) -> float:
        began = time.perf_counter()
        made = [encoders[side](item) for item in items]
        seconds = time.perf_counter() - began
        back = from_ours if side == OURS else from_png
        assert all(np.array_equal(back(data, item.shape), item) for data, item in zip(made, items, strict=True))
        sizes[side] = sum(map(len, made)) / len(made) / 1e3
        return len(items) / seconds

    rates = harness.in_turns({side: partial(turn, side) for side in encoders}, rounds)
    figures = {side: {"images/s": harness.spread(rates[side]), "kB": sizes[side]} for side in encoders}
    rows = [
        {"picture": name, "as": side, "images/s": found["images/s"][0],
         "quartiles": f"{found['images/s'][1]:.4g} to {found['images/s'][2]:.4g}", "kB": found["kB"]}
        for side, found in figures.items()
    ]  # fmt: skip
    return rows, figures


def rows_of(masks: list[np.ndarray], maps: list[np.ndarray], start: int) -> pa.Table:
    """A unit of predictions that hold nothing but masks and maps."""
    columns: dict[str, Any] = {}
    schema = PREDICTIONS["segmentation"]
    for field in schema:
        columns[field.name] = [None] * len(masks)
    columns["image_id"] = [f"image-{start + n:06d}" for n in range(len(masks))]
    columns["status"] = ["ok"] * len(masks)
    columns["uncertainty"] = [0.5] * len(masks)
    columns["mask"] = [ours(mask) for mask in masks]
    columns["uncertainty_map"] = [ours(map) for map in maps]
    return pa.Table.from_pydict(columns, schema=schema)


def writing(masks: list[np.ndarray], maps: list[np.ndarray], rounds: int) -> dict[str, Any]:
    """Encode and write everything, as units and as files."""

    def units(folder: str) -> None:
        for start in range(0, len(masks), UNIT):
            part = slice(start, start + UNIT)
            table = rows_of(masks[part], maps[part], start)
            predictions.write_unit(folder, "attempt-0", start // UNIT, table, digest="benchmark", sources=[])

    def files(folder: str) -> None:
        for n, (mask, map) in enumerate(zip(masks, maps, strict=True)):
            Path(folder, f"{n:06d}-mask.png").write_bytes(png(1, mask))
            Path(folder, f"{n:06d}-map.png").write_bytes(png(1, map))

    def turn(write: Callable[[str], None]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            write(folder)
            return len(masks) / (time.perf_counter() - began)

    sides = {"units of Parquet": partial(turn, units), "PNG files, level 1": partial(turn, files)}
    return {side: harness.spread(rates) for side, rates in harness.in_turns(sides, rounds).items()}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, help="distinct images (1024; small: 64)")
    parser.add_argument("--size", type=int, default=512, help="side of masks and maps in pixels")
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--rounds", type=int, help="turns of each side (5; small: 3)")
    parser.add_argument("--small", action="store_true", help="under 2 minutes on 2 cores")
    args = parser.parse_args(argv)
    for name, (full, small) in {"count": (1024, 64), "rounds": (5, 3)}.items():
        if getattr(args, name) is None:
            setattr(args, name, small if args.small else full)
    return args


def main(argv: list[str] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Print the tables and the JSON line; return figures and ratios."""
    args = parse(argv)
    masks, maps = pictures(args.count, args.size, args.classes)
    figures, ratios, table = {}, {}, []
    for name, items in (("mask", masks), ("map", maps)):
        rows, figures[name] = encoding(name, items, args.rounds)
        table += rows
        for other in (PNG, FAST_PNG):
            ratios[f"{name}, {OURS} / {other}"] = (
                figures[name][OURS]["images/s"][0] / figures[name][other]["images/s"][0]
            )
    print(f"{args.count} images of {args.size} x {args.size}, one thread, encoding alone")
    print(harness.table(table), flush=True)
    figures["writing"] = writing(masks, maps, args.rounds)
    print("\nmask and map encoded and written, rows/s")
    rows = [{"side": side, "rows/s": rate[0], "quartiles": f"{rate[1]:.4g} to {rate[2]:.4g}"}
            for side, rate in figures["writing"].items()]  # fmt: skip
    print(harness.table(rows), flush=True)
    units, files = figures["writing"].values()
    ratios["rows written / PNG files"] = units[0] / files[0]
    harness.finish("write", figures, ratios)
    return figures, ratios


if __name__ == "__main__":
    main()
