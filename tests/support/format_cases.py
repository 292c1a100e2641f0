"""Small images and label files, and what a format reads of them."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.datasets.formats import FORMATS
from pipeline.datasets.formats.base import Context, Labels, Source
from pipeline.images.decode import ImageInfo

SIZE = ImageInfo(height=8, width=10)


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def put(folder: Path, name: str, data: bytes | str) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data if isinstance(data, bytes) else data.encode())


def image_file(folder: Path, name: str, height: int = 8, width: int = 10) -> None:
    put(folder, name, png(np.full((height, width, 3), 90, np.uint8)))


def mask_of(labels: Labels) -> np.ndarray:
    assert labels.mask is not None
    return labels.mask


def edges(labels: Labels) -> list[tuple]:
    return [(b["x1"], b["y1"], b["x2"], b["y2"], b["label"]) for b in labels.boxes or []]


# --- pairing


def xml(*objects: tuple, size: tuple[int, int] | None = (10, 8)) -> bytes:
    parts = [
        f"<object><name>{name}</name><difficult>1</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for name, a, b, c, d in objects
    ]
    wide = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation><path>/home/somebody/x.jpg</path>{wide}{''.join(parts)}</annotation>".encode()


def read(name: str, label: bytes, classes: tuple[str, ...], image: ImageInfo = SIZE, **extra) -> Labels:
    form = FORMATS[name]
    background = classes.index("background") if "background" in classes else None
    context = Context(classes, background, ("detection",), form.settings(), extra)
    return form.read(Source("a.png"), image, label, context)
