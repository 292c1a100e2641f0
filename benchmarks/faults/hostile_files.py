"""Hostile input, made from good input by a seed: images and label files that are broken in ways people meet.

``image`` and ``label`` break one file; ``judge_image`` and ``judge_labels`` give it to the code that would read it, and
say what became of it. Anything but a row, a counted reject or one sentence to the user is a crash.
"""

import copy
import io
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import schema
from pipeline.datasets import shard_writer
from pipeline.datasets.formats import FORMATS
from pipeline.errors import InputError
from pipeline.images import decode

SIZE = (24, 32)
"""Height and width of the images that labels belong to."""
NAMES = ["a.png", "b b.png", "ü.png"]
REASONS = {*schema.STATUSES, "bad_label", "bad_box", "wrong_size", "unknown_class", "mask_value", "no_image"}
CLASSES = {"voc": None, "coco": None, "masks": ["one", "two"], "instances": ["cell"]}
"""Formats that read files, and the classes that they are given."""
_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**400, 1e308, -1e308, math.nan, math.inf, "", "NaN", "1e999",
    "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "日本 語.png", "x" * 10_000, [], {}, [[]], [None],
    {"size": [10**9, 10**9], "counts": "0"},
    {"size": list(SIZE), "counts": [5, 10**12]}, [[1, 2, 3, 4, 5, math.inf]], [[0, 0, 1e5, 0, 1e5, 1e5]],
]  # fmt: skip


def good_images(folder: Path | None = None, each: int = 4) -> list[bytes]:
    """Small images of every format that is read, and some photographs from below ``folder``."""
    out, rng = [], np.random.default_rng(0)
    smooth = np.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3) + rng.integers(-20, 20, (48, 64, 3))
    picture = Image.fromarray(np.clip(smooth, 0, 255).astype(np.uint8))
    options: list[tuple[str, str, dict[str, Any]]] = [
        ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}),
        ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "P", {}), ("PNG", "LA", {}), ("PNG", "1", {}),
        ("PNG", "I;16", {}), ("GIF", "P", {}), ("BMP", "RGB", {}), ("TIFF", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "I;16", {}), ("TIFF", "F", {}), ("WEBP", "RGB", {}), ("PPM", "RGB", {}),
    ]  # fmt: skip
    for format, mode, more in options:
        made = picture.convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
        stream = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        more = {**more, "exif": exif.tobytes()} if format in ("JPEG", "WEBP") else more
        made.save(stream, format, **more)
        out.append(stream.getvalue())
    moving = io.BytesIO()
    picture.save(moving, "GIF", save_all=True, append_images=[picture.rotate(90), picture.rotate(180)])
    out.append(moving.getvalue())
    found = sorted(path for path in (folder.rglob("*") if folder else []) if path.suffix in decode.IMAGE_SUFFIXES)
    return out + [path.read_bytes() for path in random.Random(0).sample(found, min(each, len(found)))]


def image(rng: random.Random, good: list[bytes]) -> bytes:
    """One of them, broken."""
    return _bytes(rng, rng.choice(good), rng.choice(good))


def _bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Bits flipped, a part cut out, doubled, zeroed or exchanged, the end lost, or some of these."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        if not out:
            break
        at, length = rng.randrange(len(out)), min(len(out), 1 << rng.randrange(12))
        kind = rng.randrange(8)
        if kind == 0:
            for _ in range(1 << rng.randrange(8)):
                out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length]
        elif kind == 4:
            out[at : at + length] = bytes(length)
        elif kind == 5:
            out[at:] = other[rng.randrange(len(other) or 1) :]
        elif kind == 6:  # a length or a size in a header
            head = rng.randrange(min(64, len(out)))
            out[head : head + 4] = rng.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4), rng.randbytes(4)])
        else:
            out[at : at + length] = rng.randbytes(length)
    return bytes(out)


def judge_image(data: bytes) -> str:
    """``row``, or the word of the reject.

    Raises:
        AssertionError: It is neither.
    """
    (found,) = decode.decode_many([data], 1)
    if isinstance(found, decode.DecodeError):
        assert found.reason in schema.STATUSES, found.reason
        assert len(str(found)) < 1000
        return found.reason
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.uint8
    assert found.ndim == 3
    assert found.shape[2] == 3
    assert found.shape[0] * found.shape[1] <= decode.MAX_PIXELS
    return "row"


def good_labels(format: str) -> dict[str, bytes]:
    """Label files of the three images: name -> content."""
    if format == "voc":
        return {f"{Path(name).stem}.xml": _voc(name) for name in NAMES}
    if format == "coco":
        return {"labels.json": json.dumps(_coco()).encode()}
    value = {"masks": 1, "instances": 300}[format]
    pixels = np.zeros(SIZE, np.uint8 if value < 256 else np.uint16)
    pixels[4:9, 5:20] = value
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return dict.fromkeys(NAMES, stream.getvalue())


def _voc(name: str) -> bytes:
    size = f"<size><width>{SIZE[1]}</width><height>{SIZE[0]}</height><depth>3</depth></size>"
    box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>12</xmax><ymax>20</ymax></bndbox>"
    thing = f"<object><name>cat</name><difficult>0</difficult>{box}</object>"
    return f"<annotation><filename>{name}</filename>{size}{thing}{thing}</annotation>".encode()


def _coco() -> dict[str, Any]:
    images = [{"id": n, "file_name": name, "width": SIZE[1], "height": SIZE[0]} for n, name in enumerate(NAMES)]
    shapes: list[Any] = [[[2, 2, 12, 2, 12, 12]], {"size": list(SIZE), "counts": [10, 30, SIZE[0] * SIZE[1] - 40]}, []]
    notes = [
        {"id": n, "image_id": n, "category_id": 7, "bbox": [2, 2, 10, 10], "iscrowd": n == 1, "segmentation": shape}
        for n, shape in enumerate(shapes)
    ]
    return {"images": images, "annotations": notes, "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]}


def label(rng: random.Random, format: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """The label files with one of them broken."""
    name = rng.choice(sorted(files))
    data = files[name]
    other = rng.choice(list(files.values()))
    if rng.random() < 0.7 and format in ("coco", "voc"):
        try:
            data = _broken_json(rng, json.loads(data)) if format == "coco" else _broken_xml(rng, data)
        except (ValueError, IndexError, RecursionError):  # it was broken before
            data = _bytes(rng, data, other)
    else:
        data = _bytes(rng, data, other)
    return {**files, name: data}


def _broken_json(rng: random.Random, tree: Any) -> bytes:
    """Some of its nodes exchanged, lost or doubled; or nested too deep."""
    if rng.random() < 0.03:
        return rng.choice([b"[" * 100_000, b'{"images":' * 2000, b"[" * 500 + b"]" * 500])
    for _ in range(rng.choice([1, 1, 2, 4])):
        holder, key = rng.choice(list(_nodes(tree)))
        kind = rng.randrange(4)
        if kind == 0 and isinstance(holder, dict):
            del holder[key]
        elif kind == 1 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[key] = copy.deepcopy(rng.choice(_VALUES))
    return json.dumps(tree).encode()


def _nodes(tree: Any) -> Any:
    """(container, key) of every node below."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], (dict, list)) and tree[key]:
            yield from _nodes(tree[key])


_LAUGHS = (
    b"<!DOCTYPE annotation [<!ENTITY a 'ha'>"
    + b"".join(b"<!ENTITY %c '%s'>" % (98 + n, b"&%c;" % (97 + n) * 10) for n in range(9))
    + b"]><annotation><object><name>&j;</name></object></annotation>"
)
_OUTSIDE = b"<!DOCTYPE annotation [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><annotation><object><name>&e;</name></object></annotation>"


def _broken_xml(rng: random.Random, data: bytes) -> bytes:
    """Texts exchanged, elements lost or doubled; or nested too deep, or entities that grow or reach outside."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice([_LAUGHS, _OUTSIDE, b"<a>" * 50_000, b"<annotation>" + b"<object>" * 5000])
    text = data.decode()
    parts = text.split(">")
    at = rng.randrange(len(parts) - 1)
    if kind < 3:
        del parts[at]
    elif kind == 3:
        parts.insert(at, parts[at])
    else:
        numbers = [n for n, part in enumerate(parts) if part[:1] not in ("<", "")]
        where = rng.choice(numbers)
        value = rng.choice([value for value in _VALUES if not isinstance(value, (list, dict))])
        parts[where] = f"{value}<" + parts[where].split("<", 1)[1]
    return ">".join(parts).encode("utf-8", "surrogatepass")


def write_case(folder: Path, files: dict[str, bytes]) -> tuple[Path, Path]:
    """(folder of images, folder of labels)."""
    images, labels = folder / "images", folder / "labels"
    for each in (images, labels):
        each.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        if not (images / name).exists():
            Image.new("RGB", (SIZE[1], SIZE[0])).save(images / name)
    for path in labels.iterdir():
        path.unlink()
    for name, data in files.items():
        (labels / name).write_bytes(data)
    return images, labels


def judge_labels(format: str, images: Path, labels: Path) -> Counter[str]:
    """What became of the three images: ``row``, words of rejects, or ``refused`` (one sentence) for all together.

    Raises:
        AssertionError: A reject of an unknown reason.
    """
    reader = FORMATS[format]
    try:
        index = reader.index(str(images), str(labels), CLASSES[format], reader.settings())
    except InputError as error:
        return Counter(["refused" if len(str(error)) < 4000 else "refused at length"])
    words = Counter(item.reason for item in index.rejects)
    plan = shard_writer.ShardPlan(str(images.parent / "out.parquet"), "train", format, index.sources)
    written = shard_writer.write_shard(plan, index.context)
    words.update(item.reason for item in written.rejects)
    words["row"] += written.sums.images
    assert set(words) <= REASONS | {"row", "second_label"}, words
    assert written.sums.images + len(written.rejects) == len(NAMES)
    return words


def count(judge: Callable[[], Any]) -> str:
    """A crash as ``crash: <what>``; else what the judge says."""
    try:
        return str(judge())
    except Exception as error:  # whatever it is, it is what is looked for
        return f"crash: {type(error).__name__}: {str(error)[:120]}"
