"""Source files of a format: images and labels listed, and paired by name."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

from pipeline import storage
from pipeline.datasets.formats.base import Reject, Source
from pipeline.errors import InputError, nearest
from pipeline.images.decode import IMAGE_SUFFIXES

READ_THREADS = 32
"""Small label files are read this many at a time: an object store answers in some 2 to 20 ms each."""


def images_in(folder: str) -> list[storage.Listed]:
    """The image files below a folder, which must hold at least one."""
    images = storage.list_files(folder, IMAGE_SUFFIXES)
    if not images:
        endings = ", ".join(IMAGE_SUFFIXES)
        raise InputError(f"no images in '{folder}': wanted {endings} files, found none; check --images")
    return images


def labels_in(folder: str, suffixes: tuple[str, ...]) -> list[storage.Listed]:
    """The label files below a folder, which must hold at least one."""
    labels = storage.list_files(folder, suffixes)
    if not labels:
        raise InputError(f"no labels in '{folder}': wanted {', '.join(suffixes)} files, found none; check --labels")
    return labels


def subfolder(uri: str, name: str) -> str:
    """``uri/name`` if there is such a folder, else ``uri``."""
    inner = storage.join(uri, name)
    return inner if storage.exists(inner) else uri


def stem(path: str) -> str:
    """The path without its last suffix."""
    return str(PurePosixPath(path).with_suffix("")) if path else path


def _longest_prefix(name: str, rows_by_stem: dict[str, list[int]]) -> list[int]:
    """Entries of the longest known name that begins ``name``; a number is never cut: 1 does not begin 12."""
    for end in range(len(name), 0, -1):
        if end < len(name) and name[end].isdigit() and name[end - 1].isdigit():
            continue
        if name[:end] in rows_by_stem:
            return rows_by_stem[name[:end]]
    return []


def pair(
    images: Sequence[storage.Listed], labels: Sequence[storage.Listed], labels_uri: str
) -> tuple[dict[int, storage.Listed], list[Reject]]:
    """Match labels to images: a label belongs to the image whose stem is the longest prefix of its own.

    Paths below the two folders are compared first, then file names alone, if only one image has that name.

    Returns:
        ({index of the image: its label}, rejects: labels of no image, or of an image that has one already).
    """
    by_path: dict[str, list[int]] = {}
    by_name: dict[str, list[int]] = {}
    for index, image in enumerate(images):
        path = stem(image.path)
        by_path.setdefault(path, []).append(index)
        by_name.setdefault(path.rsplit("/", 1)[-1], []).append(index)
    label_of: dict[int, storage.Listed] = {}
    rejects: list[Reject] = []
    # Shorter stems first: an exact match takes the image before a longer name can.
    for label in sorted(labels, key=lambda item: (len(stem(item.path)), item.path)):
        uri, path = storage.join(labels_uri, label.path), stem(label.path)
        matches = _longest_prefix(path, by_path) or _longest_prefix(path.rsplit("/", 1)[-1], by_name)
        if not matches:
            hint = _closest(path, by_name)
            rejects.append(Reject(uri, "no_image", f"no image has a stem that begins '{path}'{hint}"))
        elif len(matches) > 1:
            first = ", ".join(images[index].path for index in matches[:2])
            rejects.append(Reject(uri, "no_image", f"{len(matches)} images have its name: {first}"))
        elif matches[0] in label_of:
            image, other = images[matches[0]].path, label_of[matches[0]].path
            rejects.append(Reject(uri, "second_label", f"image '{image}' already has label '{other}'"))
        else:
            label_of[matches[0]] = label
    return label_of, rejects


def _closest(path: str, names: Iterable[str]) -> str:
    """A short hint; listing every image of a data set would help nobody."""
    hint = nearest(path.rsplit("/", 1)[-1], names).split(" Known:")[0]
    return f".{hint}" if hint else ""


def paired_sources(images_uri: str, labels_uri: str, suffixes: tuple[str, ...]) -> tuple[list[Source], list[Reject]]:
    """Sources of a folder of images and a folder of label files, and what could not be paired.

    A folder of labels inside the folder of images is no source of images.
    """
    images_uri, labels_uri = storage.absolute(images_uri), storage.absolute(labels_uri)
    if images_uri == labels_uri and set(suffixes) & set(IMAGE_SUFFIXES):
        raise InputError(f"--images and --labels are both '{images_uri}'; label images need a folder of their own")
    images, labels = images_in(images_uri), labels_in(labels_uri, suffixes)
    if labels_uri.startswith(images_uri + "/"):
        inner = labels_uri.removeprefix(images_uri + "/") + "/"
        images = [image for image in images if not image.path.startswith(inner)]
    label_of, rejects = pair(images, labels, labels_uri)
    sources = []
    for index, image in enumerate(images):
        label = label_of.get(index)
        sources.append(
            Source(
                image_id=image.path,
                image_uri=storage.join(images_uri, image.path),
                size=image.size,
                label_uri=storage.join(labels_uri, label.path) if label else None,
                label_size=label.size if label else 0,
            )
        )
    return sources, rejects


def read_many(uris: Sequence[str]) -> list[bytes | None]:
    """The objects, in order; None for one that cannot be read (its own task will say why)."""

    def read(uri: str) -> bytes | None:
        try:
            return storage.read_bytes(uri)
        except OSError:
            return None

    with ThreadPoolExecutor(READ_THREADS, "labels") as pool:
        return list(pool.map(read, uris))
