"""What a label format is: an index made once on the driver, and a pure reader that runs in tasks.

``index`` lists what there is: one small picklable ``Source`` an image. ``read`` turns the label of one
source into ``Labels`` in the conventions of ``schema``. A format without source files (the demo) leaves
``Source.image_uri`` as None and implements ``generate`` instead: it makes the encoded image and its labels
from the source alone, inside the task, so the index stays small and the work is spread.
"""

import re
from abc import ABC
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from pipeline import schema
from pipeline.config import Settings
from pipeline.errors import InputError
from pipeline.images.decode import ImageInfo

TEXT = 500
"""Characters of what a reject says."""


class HoldOut(Settings):
    """Shares of ``train`` to move to other splits; None = 0.1 without ``--splits``, 0 with it."""

    val: float | None = Field(default=None, ge=0, lt=1)
    calibration: float | None = Field(default=None, ge=0, lt=1)
    test: float | None = Field(default=None, ge=0, lt=1)

    @model_validator(mode="after")
    def _leaves_some(self) -> "HoldOut":
        if sum(share or 0 for share in (self.val, self.calibration, self.test)) >= 1:
            raise ValueError("the shares held out add up to 1 or more; nothing would be left to train on")
        return self


class IngestSettings(Settings):
    """Options that every format has; each format's own settings class extends it."""

    name: str = ""
    """Name of the dataset; empty = the last part of the output URI."""
    hold_out: HoldOut = HoldOut()
    group: str | None = None
    """Regular expression with one group, matched in image_id: images of one group share a split."""
    split_names: dict[str, str] = {}
    """Renames splits as read from ``--splits``: ``{val: test}`` ingests a published val list as test."""
    max_reject_fraction: float = Field(default=0.01, ge=0, le=1)
    shard_bytes: int = Field(default=128 * 2**20, ge=1)
    """Encoded image bytes to aim at in one shard."""
    referenced: bool = False
    """Leave the images where they are: rows hold their URI and hash, and every job fetches them as it goes. For
    archives too large to copy; packed datasets stream faster, and cannot lose an image to somebody who tidies up."""

    @field_validator("group")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
            if groups != 1:
                raise ValueError(f"wanted a regular expression with one (group), found {groups}")
        return value

    @field_validator("split_names")
    @classmethod
    def _known_splits(cls, value: dict[str, str]) -> dict[str, str]:
        for new in value.values():
            if new not in schema.SPLITS:
                raise ValueError(f"'{new}' is no split; known: {', '.join(schema.SPLITS)}")
        return value


@dataclass(frozen=True, slots=True)
class Source:
    """One image and where its label is. Small and picklable: a plan holds as many as there are images.

    Labelled = ``label_uri`` or ``label`` is given. A generated image has ``image_uri`` None and keeps what
    its generator needs (a seed, parameters) in ``label``.
    """

    image_id: str
    """Unique; the path relative to the folder of images."""
    image_uri: str | None = None
    size: int = 0
    """Bytes of the encoded image, or a guess where it is generated: shards are planned by it."""
    label_uri: str | None = None
    label_size: int = 0
    label: bytes | None = None
    """The label itself, where it does not have a file of its own."""
    split: str | None = None
    """Split that the format itself assigns; obeyed where there is no ``--splits``."""

    @property
    def labelled(self) -> bool:
        """Whether there is a label (which may still say that nothing is there)."""
        return self.label_uri is not None or self.label is not None


@dataclass(frozen=True, slots=True)
class Reject:
    """One row of ``rejects/``: something that could not be used, and why."""

    uri: str
    reason: str
    detail: str

    def __post_init__(self) -> None:
        for name in ("uri", "detail"):
            object.__setattr__(self, name, printable(getattr(self, name)))


@dataclass(frozen=True)
class Context:
    """What reading one label needs to know of the whole; sent to every task once."""

    classes: tuple[str, ...]
    background: int | None
    tasks: tuple[schema.Task, ...]
    settings: Any
    """The format's own settings object."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the format's index found and its reader needs (COCO: category id -> label). Small."""

    @property
    def things(self) -> tuple[str, ...]:
        """Class names that boxes may have: without a trailing background."""
        last = len(self.classes) - 1
        return self.classes[:last] if self.background == last and last >= 0 else self.classes


@dataclass(frozen=True)
class Index:
    """Everything that is there, before any image was opened."""

    sources: list[Source]
    context: Context
    rejects: list[Reject] = field(default_factory=list)
    colours: list[str] | None = None
    """One ``#rrggbb`` a class, where the labels say; None = chosen by the dataset."""


@dataclass
class Labels:
    """Labels of one image in the conventions of ``schema``. None = not labelled, empty = none there."""

    mask: np.ndarray | None = None
    """(H, W) uint8 class ids of the upright image; ``schema.VOID`` counts as nothing."""
    boxes: list[dict[str, Any]] | None = None
    """Rows of ``schema.BOX``; build them with ``box_row`` or ``fit_box``."""
    tags: list[int] | None = None
    shapes: list[dict[str, Any]] | None = None
    """Rows of ``schema.SHAPE``."""
    repairs: Counter[str] = field(default_factory=Counter)
    """Harmless faults that were mended or dropped, counted by name in dataset.json."""


def printable(text: str) -> str:
    """Text of a label as it may be shown and stored: of bounded length, and whatever is no Unicode escaped."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= TEXT else f"{text[:TEXT]}..."


class LabelError(ValueError):
    """A label that cannot be used; becomes a row of ``rejects/`` with this reason and detail."""

    def __init__(self, reason: str, detail: str) -> None:
        detail = printable(detail)
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return self.detail


class Format(ABC):
    """A way in which people keep labels. Instances have no state; ``FORMATS`` holds one of each.

    A format with source files implements ``index`` and ``read``; one that makes its images implements
    ``index`` and ``generate``.
    """

    name: ClassVar[str]
    settings: ClassVar[type[IngestSettings]] = IngestSettings

    def index(self, images: str | None, labels: str | None, classes: Sequence[str] | None, settings: Any) -> Index:
        """List the sources. Runs on the driver and opens no image.

        Args:
            images: URI of the folder of images; None where the format generates them.
            labels: URI of the labels (a folder or file, as the format has it), or None.
            classes: Names in label order as given with ``--classes``, or None to find them.
            settings: An instance of this format's ``settings`` class.

        Raises:
            InputError: The inputs as a whole are unusable. Single faults become ``Index.rejects``.
        """
        raise NotImplementedError

    def read(self, source: Source, image: ImageInfo, label: bytes, context: Context) -> Labels:
        """The labels of one image. Pure; runs in tasks, in threads.

        Args:
            source: Its row of the index.
            image: Height and width of the upright image, and the EXIF orientation that was applied.
            label: Content of ``source.label_uri``, or ``source.label``.
            context: Class names and settings.

        Raises:
            LabelError: This label cannot be used.
        """
        raise NotImplementedError

    def generate(self, source: Source, context: Context) -> tuple[bytes, Labels]:
        """(encoded image, labels) for a source whose ``image_uri`` is None. Pure and deterministic."""
        raise NotImplementedError


def box_row(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    label: int,
    *,
    crowd: bool = False,
    instance: int | None = None,
) -> dict[str, Any]:
    """A row of ``schema.BOX``: xyxy, continuous edges, pixels of the upright image."""
    row: dict[str, Any] = {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "label": label, "crowd": crowd}
    return row | {"instance": instance}


def fit_box(row: dict[str, Any], image: ImageInfo, repairs: Counter[str]) -> dict[str, Any] | None:
    """The box clipped to its image, or None if nothing of it is left; either is counted in ``repairs``."""
    x1, y1, x2, y2 = row["x1"], row["y1"], row["x2"], row["y2"]
    if not np.isfinite([x1, y1, x2, y2]).all():
        raise LabelError("bad_box", f"box ({x1}, {y1}, {x2}, {y2}) is not finite")
    if x2 <= x1 or y2 <= y1:
        repairs["zero_area_box"] += 1
        return None
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(image.width)), min(y2, float(image.height)))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        repairs["outside_box"] += 1
        return None
    if inside != (x1, y1, x2, y2):
        repairs["clipped_box"] += 1
    return row | dict(zip(("x1", "y1", "x2", "y2"), inside, strict=True))


def check_size(height: int, width: int, image: ImageInfo, what: str) -> None:
    """Raise LabelError("wrong_size") unless a label of this size belongs to the upright image."""
    if (height, width) == (image.height, image.width):
        return
    detail = f"{what} is {width}x{height}, its image {image.width}x{image.height} (width x height)"
    if image.orientation >= 5 and (width, height) == (image.height, image.width):
        detail += f"; labels must be upright, as seen after EXIF orientation {image.orientation}"
    raise LabelError("wrong_size", detail)


def need(uri: str | None, option: str, what: str) -> str:
    """The URI, or an InputError that says which option is missing."""
    if uri is None:
        raise InputError(f"{option} is missing; give the URI of {what}")
    return uri
