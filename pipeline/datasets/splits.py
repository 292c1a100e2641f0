"""Which split an image belongs to: lists that people give, and shares held out by hash."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pipeline import schema, storage
from pipeline.datasets.formats.base import IngestSettings, Reject, Source
from pipeline.errors import InputError, nearest

DEFAULT_SHARE = 0.1
HELD_OUT = ("val", "calibration", "test")


@dataclass
class SplitAssignment:
    """The outcome: a split for each image that is kept."""

    split_of: dict[str, str] = field(default_factory=dict)
    """image_id -> split, in no particular order."""
    left_out: int = 0
    """Images that ``--splits`` names nowhere."""
    rejects: list[Reject] = field(default_factory=list)


def read_splits(uri: str, renames: dict[str, str]) -> dict[str, list[str]]:
    """``{split: names}`` from a JSON object, or from a folder of ``<split>.txt`` with one name a line.

    Other files of such a folder (VOC keeps one list a class beside them) are not read.
    """
    if uri.lower().endswith(".json"):
        return _to_our_splits(_from_json(uri), uri, renames)
    list_names = {*schema.SPLITS, *renames}
    lists = [item for item in storage.list_files(uri, (".txt",)) if item.path.removesuffix(".txt") in list_names]
    if not lists:
        expected_files = ", ".join(f"{name}.txt" for name in schema.SPLITS)
        raise InputError(f"--splits '{uri}': wanted a JSON file or a folder with {expected_files}; found none of them")
    names_by_list = {}
    for item in lists:
        lines = storage.read_text(storage.join(uri, item.path), "list of images").splitlines()
        names_by_list[item.path.removesuffix(".txt")] = [line.strip() for line in lines if line.strip()]
    return _to_our_splits(names_by_list, uri, renames)


def _from_json(uri: str) -> dict[str, list[str]]:
    try:
        data = json.loads(storage.read_text(uri, "file of splits"))
    except json.JSONDecodeError as error:
        raise InputError(f"--splits '{uri}' is not valid JSON: {error}") from None
    if not isinstance(data, dict) or not all(isinstance(names, list) for names in data.values()):
        raise InputError(f"--splits '{uri}': wanted a JSON object from split to a list of image names")
    return {str(split): [str(name) for name in names] for split, names in data.items()}


def _to_our_splits(names_by_list: dict[str, list[str]], uri: str, renames: dict[str, str]) -> dict[str, list[str]]:
    names_by_split: dict[str, list[str]] = {}
    for old, names in names_by_list.items():
        split = renames.get(old, old)
        if split not in schema.SPLITS:
            raise InputError(f"--splits '{uri}': unknown split '{split}'.{nearest(split, schema.SPLITS)}")
        names_by_split.setdefault(split, []).extend(names)
    return names_by_split


def assign(
    sources: Sequence[Source], splits: dict[str, list[str]] | None, settings: IngestSettings, format_name: str
) -> SplitAssignment:
    """A split for each source.

    Args:
        sources: All images of the index.
        splits: Names by split as given, or None: the format's own split, else train.
        settings: ``hold_out`` and ``group``.
        format_name: For the URI of sources that have no file.
    """
    out = SplitAssignment()
    if splits is not None:
        _by_name(sources, splits, out)
    for source in sources:
        if splits is None:
            out.split_of[source.image_id] = (source.split or "train") if source.labelled else "unlabelled"
        elif source.image_id not in out.split_of:
            out.left_out += 1
        elif not source.labelled and out.split_of[source.image_id] != "unlabelled":
            split = out.split_of.pop(source.image_id)
            uri = source.image_uri or f"{format_name}:{source.image_id}"
            out.rejects.append(Reject(uri, "no_label", f"named in split '{split}', but there is no label for it"))
    has_splits = splits is not None or any(source.split for source in sources)
    requested = {name: getattr(settings.hold_out, name) for name in HELD_OUT}
    default = 0.0 if has_splits else DEFAULT_SHARE
    shares = {name: default if share is None else share for name, share in requested.items()}
    if has_splits and any(shares.values()) and "train" not in out.split_of.values():
        raise InputError("hold_out takes from split 'train', but it has no labelled image; leave hold_out away")
    optional = [name for name in ("calibration", "test", "val") if requested[name] is None]
    hold_out(out.split_of, shares, settings.group, optional)
    return out


def _by_name(sources: Sequence[Source], splits: dict[str, list[str]], out: SplitAssignment) -> None:
    """Names match an image_id, or else its path without suffix, or else its file name with or without."""
    keys: list[dict[str, list[str]]] = [{}, {}, {}, {}]
    for source in sources:
        image_id = source.image_id
        name = image_id.rsplit("/", 1)[-1]
        for table, key in zip(keys, (image_id, _stem(image_id), name, _stem(name)), strict=True):
            table.setdefault(key, []).append(image_id)
    for split, names in splits.items():
        for name in names:
            image_ids = next((table[name] for table in keys if name in table), [])
            if len(image_ids) != 1:
                what = "no such image" if not image_ids else f"{len(image_ids)} images have this name"
                out.rejects.append(Reject(name, "missing", f"named in split '{split}': {what}"))
            elif out.split_of.setdefault(image_ids[0], split) != split:
                both = f"'{out.split_of[image_ids[0]]}' and '{split}'"
                raise InputError(f"image '{image_ids[0]}' is named in both {both}; a split must not leak into another")


def _stem(path: str) -> str:
    head, dot, tail = path.rpartition(".")
    return head if dot and "/" not in tail else path


def hold_out(
    split_of: dict[str, str], shares: dict[str, float], group: str | None, optional: Sequence[str] = ()
) -> None:
    """Move ``shares`` of train, in place: by group where ``group`` finds one in image_id, else by image.

    A group's place in [0, 1) is the first 8 bytes of sha256(its name) / 2^64, and each share is an interval:
    images that come later do not move those that are there. A requested split that stays empty gets the
    group of train that lies nearest to its interval. Where there are fewer groups than splits, the
    ``optional`` ones are given up, the first first.

    Raises:
        InputError: There are fewer groups than splits that were asked for, or ``group`` finds none.
    """
    requested = {split: share for split, share in shares.items() if share > 0}
    groups: dict[str, list[str]] = {}
    for image_id, split in split_of.items():
        if split == "train":
            groups.setdefault(_group(image_id, group), []).append(image_id)
    for split in optional:
        if len(groups) < len(requested) + 1:
            requested.pop(split, None)
    if not requested or not groups:
        return
    place = {name: hash_position(name) for name in groups}
    chosen, start = {name: "train" for name in groups}, 0.0
    middles = {}
    for split, share in requested.items():
        chosen |= {name: split for name, at in place.items() if start <= at < start + share}
        middles[split] = start + share / 2
        start += share
    middles["train"] = (start + 1) / 2
    if len(groups) < len(middles):
        raise InputError(
            f"{len(groups)} {'groups' if group else 'images'} cannot fill {', '.join(middles)}; give lists "
            "with --splits, or hold out nothing with --set hold_out.val=0 (and .calibration, .test)"
        )
    _fill_empty(chosen, place, middles)
    for name, ids in groups.items():
        split_of.update(dict.fromkeys(ids, chosen[name]))


def hash_position(name: str) -> float:
    """The fixed place of a name in [0, 1)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _group(image_id: str, pattern: str | None) -> str:
    if pattern is None:
        return image_id
    match = re.search(pattern, image_id)
    if match is None or match[1] is None:
        raise InputError(f"--set group='{pattern}' finds no group in image_id '{image_id}'")
    return match[1]


def _fill_empty(chosen: dict[str, str], place: dict[str, float], middles: dict[str, float]) -> None:
    for split in _empty(middles, chosen.values()):
        counts = Counter(chosen.values())
        # train gives first; where it has one group only, whoever has the most
        donor = "train" if counts["train"] > 1 else counts.most_common(1)[0][0]
        names = [name for name, where in chosen.items() if where == donor]
        chosen[min(names, key=lambda name: (abs(place[name] - middles[split]), name))] = split


def _empty(splits: Iterable[str], used: Iterable[str]) -> list[str]:
    used_splits = set(used)
    return [split for split in splits if split not in used_splits]
