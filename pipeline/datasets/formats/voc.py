"""Pascal VOC: one XML file an image, with 1-based inclusive pixel boxes."""

from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from pipeline.datasets.formats import files
from pipeline.datasets.formats.base import (
    Context,
    Format,
    Index,
    IngestSettings,
    LabelError,
    Labels,
    Source,
    box_row,
    check_size,
    fit_box,
    need,
)
from pipeline.errors import InputError, nearest
from pipeline.images.decode import ImageInfo


class Voc(Format):
    """``--images ROOT`` (with JPEGImages and Annotations), or ``--images`` and ``--labels`` given directly.

    Pixel xmin..xmax, 1-based and inclusive, is x1 = xmin - 1, x2 = xmax. Difficult objects are kept. A box
    with xmax <= xmin as written is dropped and counted; one beyond the edge is clipped and counted. The
    fields ``path``, ``folder`` and ``filename`` are ignored: they tell where a file once was. Without
    ``--classes`` the names are those found, in alphabetical order, for which all labels are read once more.
    """

    name = "voc"

    def index(
        self, images: str | None, labels: str | None, classes: Sequence[str] | None, settings: IngestSettings
    ) -> Index:
        """See ``Format.index``."""
        root = need(images, "--images", "the folder of images, or of JPEGImages and Annotations")
        images_uri = files.subfolder(root, "JPEGImages")
        labels_uri = files.subfolder(labels or root, "Annotations")
        sources, rejects = files.paired_sources(images_uri, labels_uri, (".xml",))
        names = list(classes) if classes else _find_classes(sources, labels_uri)
        return Index(sources, Context(tuple(names), None, ("detection",), settings), rejects)

    def read(self, source: Source, image: ImageInfo, label: bytes, context: Context) -> Labels:
        """See ``Format.read``."""
        root = _parse(label)
        written = [root.findtext(f"size/{side}") for side in ("height", "width")]
        height, width = (_side(text) for text in written)
        if height > 0 and width > 0:  # several tools leave the size out, or write 0
            check_size(height, width, image, "the size in the label")
        boxes: list[dict[str, Any]] = []
        out = Labels(boxes=boxes)
        for thing in root.findall("object"):
            name = (thing.findtext("name") or "").strip()
            if name not in context.classes:
                raise LabelError(
                    "unknown_class",
                    f"object '{name}' is none of the classes.{nearest(name, context.classes)}",
                )
            row = _box(thing, context.classes.index(name), out)
            row = fit_box(row, image, out.repairs) if row else None
            if row:
                boxes.append(row)
        return out


def _box(thing: Element, label: int, out: Labels) -> dict[str, Any] | None:
    texts = [thing.findtext(f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    try:
        xmin, ymin, xmax, ymax = (float(text or "") for text in texts)
    except ValueError:
        raise LabelError("bad_box", f"wanted four numbers in bndbox, found {texts}") from None
    if xmax <= xmin or ymax <= ymin:
        out.repairs["zero_area_box"] += 1
        return None
    return box_row(xmin - 1, ymin - 1, xmax, ymax, label)


def _side(text: str | None) -> int:
    """A side of the image; 0 where none is written."""
    try:
        return int(float(text or 0))
    except (ValueError, OverflowError):  # no number, NaN, or infinite
        return 0


def _parse(data: bytes) -> Element:
    try:
        root = fromstring(data)
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:  # LookupError: of the encoding
        raise LabelError("bad_label", f"not a readable XML file: {error}") from None
    if root.tag != "annotation":
        raise LabelError("bad_label", f"wanted <annotation> as the outermost element, found <{root.tag}>")
    return root


def _find_classes(sources: list[Source], labels_uri: str) -> list[str]:
    names: set[str] = set()
    for data in files.read_many([source.label_uri for source in sources if source.label_uri]):
        try:
            objects = _parse(data or b"").findall("object")
        except LabelError:
            continue  # its task rejects it with the reason
        names |= {(thing.findtext("name") or "").strip() for thing in objects}
    names.discard("")
    if not names:
        raise InputError(f"no objects in the labels in '{labels_uri}'; name the classes with --classes a,b")
    return sorted(names)
