"""Reading committed predictions: what the manifest names, and nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import InputError
from pipeline.predictions.attempts import attempt_number, committed_manifest
from pipeline.predictions.file_lists import iter_files, read_named
from pipeline.predictions.resume import THREADS


def read(uri: str, columns: Sequence[str] | None = None, *, verify: bool = True) -> pa.Table:
    """All committed rows, in the order of the plan.

    Args:
        uri: The folder of predictions.
        columns: Columns to read; all if None.
        verify: Compare each file with the manifest's sha256 (pyarrow does not notice flipped bits).

    Raises:
        InputError: Nothing is committed there, or a file is missing or not what the manifest says.
    """
    uri = storage.absolute(uri)
    manifest = committed_manifest(uri)
    if manifest is None:
        unfinished = storage.exists(uri) and any(attempt_number(item.path) >= 0 for item in storage.list_files(uri))
        hint = "the job did not finish; run it again" if unfinished else "check the path"
        raise InputError(f"no committed predictions at '{uri}': {hint}")
    names = list(columns) if columns is not None else None
    with ThreadPoolExecutor(THREADS) as pool:
        tables = list(pool.map(lambda entry: _read_file(uri, entry, names, verify), iter_files(uri, manifest)))
    return pa.concat_tables(tables).replace_schema_metadata(None)


def iter_tables(uri: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The committed rows one file at a time, these columns alone, so that memory does not grow with the folder.

    Files are not compared with their digests (that would read all of them: ``dubito verify`` does).

    Raises:
        InputError: Nothing is committed there, or a file is missing.
    """
    uri = storage.absolute(uri)
    manifest = committed_manifest(uri)
    if manifest is None:
        raise InputError(f"no committed predictions at '{uri}'; check the path, or finish them with dubito predict")
    for entry in iter_files(uri, manifest):
        yield _read_file(uri, entry, list(columns), verify=False)


def _read_file(uri: str, entry: Mapping[str, Any], columns: list[str] | None, verify: bool) -> pa.Table:
    if verify:
        source: Any = pa.BufferReader(read_named(uri, entry))
        return pq.ParquetFile(source).read(columns).replace_schema_metadata(None)
    where = storage.join(uri, entry["file"])
    try:
        with storage.open_input(where) as file:
            return pq.ParquetFile(file).read(columns).replace_schema_metadata(None)
    except OSError as error:
        raise InputError(
            f"'{where}' could not be read ({storage.error_status(error)}), but the manifest names it"
        ) from None
