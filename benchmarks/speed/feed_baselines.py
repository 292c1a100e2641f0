"""The rivals of ``benchmarks.speed.feed``: each is what its makers' documentation shows, with its settings.

``data`` has the same images as ``files`` and as Parquet ``shards``, and the ``side`` and ``batch`` that are wanted.
"""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms.v2 import functional as tv

Item = tuple[list[str], Any]
"""Names of N images, and the images: (N, 3, H, W) or (N, H, W, 3) uint8; None where nothing was decoded."""


def pil_then_image(path: str, side: int) -> torch.Tensor:
    """Pillow decodes and, called by torchvision, resizes."""
    image = Image.open(path).convert("RGB")
    return tv.pil_to_tensor(tv.resize(image, [side, side], antialias=True))


def pil_then_tensor(path: str, side: int) -> torch.Tensor:
    """Pillow decodes; torchvision resizes uint8, channels last in memory."""
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    return tv.resize(pixels, [side, side], antialias=True)


def fast_decoder(path: str, side: int) -> torch.Tensor:
    """Decoded by torchvision (libjpeg-turbo, no Pillow), and resized."""
    return tv.resize(decode_jpeg(read_file(path), mode=ImageReadMode.RGB), [side, side], antialias=True)


class Files(torch.utils.data.Dataset):
    """A folder of images, ``passes`` times."""

    def __init__(self, data: Any, passes: int, load: Callable[[str, int], torch.Tensor]) -> None:
        self.files, self.side, self.load = [str(path) for path in data.files] * passes, data.side, load

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor]:
        return os.path.basename(self.files[index]), self.load(self.files[index], self.side)


def loader(data: Any, passes: int, load: Any, workers: int, prefetch: int) -> Iterator[Item]:
    """Torch DataLoader."""
    yield from torch.utils.data.DataLoader(
        Files(data, passes, load), batch_size=data.batch, shuffle=True, num_workers=workers,
        prefetch_factor=prefetch, persistent_workers=True, pin_memory=torch.cuda.is_available(),
    )  # fmt: skip


def repeated(shards: list[str], passes: int) -> list[str]:
    """The shards under ``passes`` names each: Ray reads a path once, however often it is listed."""
    out = []
    for number in range(passes):
        for shard in map(Path, shards):
            again = shard.with_name(f"pass{number:04d}-{shard.name}")
            if not again.exists():
                os.link(shard, again)
            out.append(str(again))
    return out


def naive_ray(data: Any, passes: int, task_rows: int) -> Iterator[Item]:
    """Ray Data, decoding in its tasks."""
    import ray.data

    side = data.side

    def decode(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = [Image.open(io.BytesIO(each)).convert("RGB") for each in rows["image"]]
        resized = [np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)) for image in images]
        return {"image_id": rows["image_id"], "image": np.stack(resized)}

    rows = ray.data.read_parquet(repeated(data.shards, passes)).select_columns(["image_id", "image"])
    for batch in rows.map_batches(decode, batch_size=task_rows).iter_batches(batch_size=data.batch, prefetch_batches=2):
        yield list(batch["image_id"]), batch["image"]


def bare_ray(data: Any, passes: int) -> Iterator[Item]:
    """Ray Data reads, nobody decodes: what any stream through Ray Data has to wait for."""
    import ray.data

    rows: Any = ray.data.read_parquet(repeated(data.shards, passes)).select_columns(["image_id", "image"])
    for table in rows.iter_batches(batch_size=data.batch, batch_format="pyarrow", prefetch_batches=1):
        yield table["image_id"].to_pylist(), None
