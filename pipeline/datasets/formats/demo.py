"""Generated data with exact labels: real handwritten digits pasted onto dimmed crops of real photographs.

Digits are scikit-learn's (1,797 samples of 8x8 pixels), photographs those in scikit-image's own wheel;
nothing is downloaded. Each image is a pure function of (settings, position), so tasks make them in any order.
A sample of handwriting belongs to one split for good. ``shifted`` makes another world, for testing doubt:
other photographs, blur, and always inverted contrast.
"""

import io
import json
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageFilter
from pydantic import Field

from pipeline import schema
from pipeline.datasets.formats.base import Context, Format, Index, IngestSettings, Labels, Source, box_row
from pipeline.errors import InputError

DIGITS = tuple(str(digit) for digit in range(10))
BACKGROUND = len(DIGITS)
SHARES = {"train": 0.7, "val": 0.1, "calibration": 0.1, "test": 0.1}
"""Of the images, in the order of their positions."""
HANDWRITING = {"train": 0.6, "val": 0.1, "calibration": 0.15, "test": 0.15}
"""Of the samples of each digit."""

PHOTOGRAPHS = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "rocket")
OTHER_PHOTOGRAPHS = ("coins", "gravel", "hubble_deep_field", "motorcycle_left")

DIM = (0.2, 0.5)
"""Factor on the photograph: at most 128 of 255 is left, so that digits are brighter."""
BRIGHTNESS = (180.0, 255.0)
DIGIT_PX = (20.0, 40.0)
"""Side of the 8x8 sample once pasted."""
ANGLE = 25.0
"""Degrees either way; more would turn a 6 into a 9."""
MIN_VISIBLE = 0.85
"""Share of its pixels that a digit keeps when another is pasted over it."""
TRIES = 20
"""Places tried for one digit before it is left out."""


class DemoSettings(IngestSettings):
    """Options of the generated data."""

    images: int = Field(default=1500, ge=1)
    size: int = Field(default=96, ge=64, le=1024)
    """Height and width, pixels."""
    max_digits: int = Field(default=4, ge=1, le=20)
    """An image has between none (rarely) and this many."""
    seed: int = Field(default=0, ge=0)
    shifted: bool = False
    """Other photographs, blur, inverted contrast; all rows are of the split ``test``."""


class Demo(Format):
    """Digits on photographs: ten classes and a background, masks and boxes."""

    name: ClassVar[str] = "demo"
    settings: ClassVar[type[IngestSettings]] = DemoSettings

    def index(self, images: str | None, labels: str | None, classes: Sequence[str] | None, settings: Any) -> Index:
        """One source a position; nothing is read, so ``images`` and ``labels`` must not be given."""
        if images or labels:
            raise InputError(f"--format demo makes its own images and labels; leave out '{images or labels}'")
        if classes is not None and tuple(classes) != (*DIGITS, schema.BACKGROUND):
            raise InputError("--format demo has the classes 0 to 9 and background; leave out --classes")
        _data_folder("skimage", "scikit-image")
        _data_folder("sklearn", "scikit-learn")
        sources = [_source(position, settings) for position in range(settings.images)]
        context = Context((*DIGITS, schema.BACKGROUND), BACKGROUND, ("segmentation", "detection"), settings)
        return Index(sources, context)

    def generate(self, source: Source, context: Context) -> tuple[bytes, Labels]:
        """JPEG bytes and exact labels of one position."""
        place = json.loads(source.label or b"{}")
        settings: DemoSettings = context.settings
        pixels, owner, labels = compose(settings, place["position"], place["handwriting"])
        return _jpeg(pixels), _labels(owner, labels)


def _source(position: int, settings: DemoSettings) -> Source:
    split = "test" if settings.shifted else split_of(position, settings.images)
    place = json.dumps({"position": position, "handwriting": split}, sort_keys=True).encode()
    image_id = f"{'shifted' if settings.shifted else 'digits'}-{position:06d}.jpg"
    return Source(image_id, size=settings.size**2 // 2, label=place, split=split)


def split_of(position: int, images: int) -> str:
    """The split of a position by ``SHARES``: the first 70 % are train, and so on."""
    shares = np.cumsum(list(SHARES.values()))
    return list(SHARES)[int(np.searchsorted(np.round(shares[:-1] * images), position, side="right"))]


def compose(settings: DemoSettings, position: int, split: str) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """One image before it is encoded.

    Args:
        settings: Size, seed and world.
        position: Of the image in the dataset; with the seed and the world it decides everything.
        split: Whose handwriting to use.

    Returns:
        (H, W, 3) uint8 pixels; (H, W) int16 owner of each pixel, an index into the labels or -1; the labels.
    """
    rng = np.random.default_rng([settings.seed, int(settings.shifted), position])
    canvas = _background(settings, rng)
    owner = np.full((settings.size, settings.size), -1, np.int16)
    labels: list[int] = []
    # One image in twenty has no digit: labelled, none there.
    num_digits = 0 if rng.random() < 0.05 else int(rng.integers(1, settings.max_digits + 1))
    for _ in range(num_digits):
        label = int(rng.integers(len(DIGITS)))
        sample = handwriting(split)[label]
        ink = _ink(sample[rng.integers(len(sample))], rng)
        corner = _free_place(owner, ink > 0.5, len(labels), rng)
        if corner is not None:
            _paste(canvas, owner, ink, corner, len(labels), rng)
            labels.append(label)
    pixels = np.clip(canvas, 0, 255).round().astype(np.uint8)
    return (_shift(pixels, rng) if settings.shifted else pixels), owner, labels


def _shift(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.0)))
    return 255 - np.asarray(blurred)


def _background(settings: DemoSettings, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) float32: a crop of a photograph, mirrored half of the time, resized and dimmed."""
    names = OTHER_PHOTOGRAPHS if settings.shifted else PHOTOGRAPHS
    photo = photograph(names[int(rng.integers(len(names)))])
    side = int(rng.uniform(0.25, 0.7) * min(photo.size))
    left, top = (int(rng.integers(extent - side + 1)) for extent in photo.size)
    window = (left, top, left + side, top + side)
    target = (settings.size, settings.size)
    crop = photo.resize(target, Image.Resampling.BILINEAR, box=window, reducing_gap=2.0)
    pixels = np.asarray(crop, np.float32)
    pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    return pixels * np.float32(rng.uniform(*DIM))


def _ink(sample: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The (8, 8) sample scaled and turned: a float32 patch, 0 paper to 1 ink, cropped to its label."""
    from scipy import ndimage  # here, since scipy is slow to import

    side, angle = rng.uniform(*DIGIT_PX), np.deg2rad(rng.uniform(-ANGLE, ANGLE))
    extent = int(np.ceil(side * 1.4))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * (8.0 / side)
    # Pixel centres at +0.5 on both sides; a rim of two pixels of paper around the sample.
    offset: Any = np.array([4.0, 4.0]) - turn @ np.array([extent / 2, extent / 2]) + turn @ [0.5, 0.5] - 0.5 + 2.0
    smooth = ndimage.affine_transform(np.pad(sample, 2), turn, offset, (extent, extent), order=3, cval=0.0)
    # Steeper than the interpolation, so that strokes have edges; 0.5 ink is the border of the label.
    ink = np.clip((smooth - 0.4) * 3.0 + 0.5, 0.0, 1.0).astype(np.float32)
    rows, columns = np.nonzero(ink.max(1) > 0.5)[0], np.nonzero(ink.max(0) > 0.5)[0]
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _free_place(owner: np.ndarray, solid: np.ndarray, label: int, rng: np.random.Generator) -> tuple[int, int] | None:
    """Top left corner where the patch lies inside the image and hides little of the digits below it."""
    height, width = solid.shape
    if height > owner.shape[0] or width > owner.shape[1]:
        return None
    areas = np.bincount(owner.ravel() + 1, minlength=label + 1)[1:]
    for _ in range(TRIES):
        top = int(rng.integers(owner.shape[0] - height + 1))
        left = int(rng.integers(owner.shape[1] - width + 1))
        below = owner[top : top + height, left : left + width][solid]
        hidden = np.bincount(below + 1, minlength=label + 1)[1:]
        if (hidden <= (1 - MIN_VISIBLE) * areas).all():
            return top, left
    return None


def _paste(
    canvas: np.ndarray,
    owner: np.ndarray,
    ink: np.ndarray,
    corner: tuple[int, int],
    index: int,
    rng: np.random.Generator,
) -> None:
    top, left = corner
    window = np.s_[top : top + ink.shape[0], left : left + ink.shape[1]]
    colour = rng.uniform(*BRIGHTNESS) + rng.uniform(-20.0, 20.0, 3)
    canvas[window] += ink[..., None] * (colour.astype(np.float32) - canvas[window])
    owner[window][ink > 0.5] = index


def _labels(owner: np.ndarray, labels: list[int]) -> Labels:
    """Mask, and boxes around the visible pixels of each digit."""
    mask = np.full(owner.shape, BACKGROUND, np.uint8)
    boxes = []
    for index, label in enumerate(labels):
        rows, columns = np.nonzero(owner == index)
        mask[rows, columns] = label
        x1, y1, x2, y2 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        boxes.append(box_row(float(x1), float(y1), float(x2), float(y2), label, instance=index))
    return Labels(mask=mask, boxes=boxes)


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def _data_folder(module: str, package: str) -> Path:
    """Where an optional package lies; importing it to find out would cost a second in each worker."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the demo data needs {package}, which is not installed; pip install 'dubito[demo]'")
    return Path(spec.submodule_search_locations[0])


@cache
def photograph(name: str) -> Image.Image:
    """A photograph of scikit-image's wheel as RGB."""
    folder = _data_folder("skimage", "scikit-image") / "data"
    image_path = next((path for path in sorted(folder.glob(f"{name}.*")) if path.suffix in (".png", ".jpg")), None)
    if image_path is None:
        raise InputError(f"photograph '{name}' is not in '{folder}'; install the version in constraints.txt")
    with Image.open(image_path) as image:
        return image.convert("RGB")


@cache
def handwriting(split: str) -> list[np.ndarray]:
    """For each digit, the (S, 8, 8) float32 samples in [0, 1] that only this split uses."""
    from sklearn.datasets import load_digits

    pixels, target = (np.asarray(part) for part in load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(target))
    ends = np.cumsum([0.0, *HANDWRITING.values()])
    part = list(HANDWRITING).index(split)
    out = []
    for label in range(len(DIGITS)):
        samples_of_label = order[target[order] == label]
        first, last = (round(len(samples_of_label) * end) for end in ends[part : part + 2])
        out.append(pixels[samples_of_label[first:last]].reshape(-1, 8, 8).astype(np.float32) / 16)
    return out
