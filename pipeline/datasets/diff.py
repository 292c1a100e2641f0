"""What is new, changed and gone between two datasets, from their digests; and whether two share images."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.datasets.dataset import DatasetInfo, row_groups
from pipeline.datasets.shard_reader import RowGroup, read_row_group
from pipeline.errors import InputError

DIGESTS = "digests.parquet"
SHOWN = 3
THREADS = 16
"""Row groups whose hashes are read at a time."""
pc: Any = pyarrow.compute  # its functions are made when it is imported


@dataclass(frozen=True)
class DatasetDiff:
    """Counts of images, and the ids of those that nobody saw before."""

    new: int
    changed: int
    """Same id, other image or other labels."""
    removed: int
    fresh: int
    """Labelled images whose pair of bytes and labels was not there under any id: what a model could learn from. An
    image that was moved is none, nor is one without labels."""
    unseen: frozenset[str]
    """Ids of images whose bytes were not there under any id: not of moved ones, but of those put in place of others."""

    def counts(self) -> dict[str, int]:
        """Without the ids."""
        return {"new": self.new, "changed": self.changed, "removed": self.removed, "fresh": self.fresh}

    def describe(self) -> str:
        """For a person."""
        counts = f"{self.new} new, {self.changed} changed and {self.removed} removed images since the champion's data"
        return f"{counts}, {self.fresh} to learn from"


def digests(uri: str) -> pa.Table:
    """``image_id, sha256, label_sha256`` of a dataset, or of such a file.

    Raises:
        InputError: It is not there.
    """
    where = uri if uri.endswith(".parquet") else storage.join(uri, DIGESTS)
    try:
        return pq.read_table(pa.BufferReader(storage.read_bytes(where)))
    except FileNotFoundError:
        raise InputError(f"'{where}' is not there; was the dataset removed, or never finished?") from None


def diff_digests(before: pa.Table, after: pa.Table) -> DatasetDiff:
    """Compare two tables of digests by id; image and labels by their hashes, null equal to null alone."""
    joined = after.join(before, keys="image_id", join_type="full outer", right_suffix="_before", coalesce_keys=True)
    is_after, was_before = pc.is_valid(joined["sha256"]), pc.is_valid(joined["sha256_before"])
    same = pc.and_(_same_as_before(joined, "sha256"), _same_as_before(joined, "label_sha256"))
    new = pc.and_(is_after, pc.invert(was_before))
    labelled = after.filter(pc.is_valid(after["label_sha256"]))
    unseen = after["image_id"].filter(pc.invert(_is_among(after["sha256"], before["sha256"])))
    return DatasetDiff(
        _count(new),
        _count(pc.and_(pc.and_(is_after, was_before), pc.invert(same))),
        _count(pc.and_(was_before, pc.invert(is_after))),
        labelled.num_rows - _count(_is_among(_image_and_label(labelled), _image_and_label(before))),
        frozenset(unseen.to_pylist()),
    )


def _is_among(values: pa.ChunkedArray, value_set: pa.ChunkedArray) -> pa.ChunkedArray:
    wide = pa.large_string()  # no number of hashes is too many for its offsets
    return pc.is_in(values.cast(wide), value_set=value_set.cast(wide).combine_chunks())


def _image_and_label(rows: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(rows["sha256"], rows["label_sha256"].fill_null(""), "/")


def _same_as_before(joined: pa.Table, name: str) -> pa.ChunkedArray:
    after, before = joined[name].fill_null(""), joined[f"{name}_before"].fill_null("")
    return pc.equal(after, before)


def _count(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)


def require_disjoint(test: DatasetInfo, test_split: str, learned: DatasetInfo, splits: Sequence[str]) -> None:
    """Refuse to judge on images that the challenger learns from, by the hash of their bytes.

    Args:
        test: The dataset of the frozen test.
        test_split: Its split.
        learned: The dataset to train on.
        splits: Those of its splits that training looks at; ones that it has not are left out.

    Raises:
        InputError: They share images; the first are named.
    """
    test_images = _images(test, test_split)
    for split in splits:
        if not learned.counts.get(split, {}).get("images"):
            continue
        other = _images(learned, split)
        shared = test_images.join(other, keys="sha256", join_type="inner", right_suffix="_learned")
        if shared.num_rows:
            first = ", ".join(shared["image_id_learned"].slice(0, SHOWN).to_pylist())
            raise InputError(
                f"{shared.num_rows} images of split '{split}' of '{learned.uri}' are in the frozen test "
                f"('{test_split}' of '{test.uri}'), the first: {first}; leave them out of training, or choose "
                "another test"
            )


def _images(info: DatasetInfo, split: str) -> pa.Table:
    columns = ["image_id", "sha256"]

    def read(group: RowGroup) -> pa.Table:
        return read_row_group(group, columns).select(columns)

    with ThreadPoolExecutor(THREADS, "hashes") as pool:  # each waits for storage, for a few kB
        return pa.concat_tables(pool.map(read, row_groups(info, split)))
