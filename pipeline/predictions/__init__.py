"""Prediction rows written as Parquet, each image exactly once, and read again.

A job is cut into units by a plan that is a pure function of its inputs. Each run of the job is an *attempt*:
``attempt-<k>/_START.json``, committed before any work, names the finished unit files of earlier attempts that
it adopts; the rest is scored into ``attempt-<k>/``. ``_MANIFEST.json``, committed once, names every file of
the result, by way of Parquet lists in ``_lists/``. Readers trust it alone: what a process of an earlier attempt
finishes late is never seen.

attempts: start an attempt at a result, check that every unit is there, commit once
resume: which finished unit files of earlier attempts a new one adopts
unit_file: one unit's rows as one Parquet file, whose footer says what it is
file_lists: Parquet lists of files, which keep the manifest small
reader: read committed predictions, whole or a file at a time
"""

from pipeline.predictions.attempts import Attempt, check_complete, commit_attempt, committed_manifest, start_attempt
from pipeline.predictions.file_lists import iter_files, read_list
from pipeline.predictions.reader import iter_tables, read
from pipeline.predictions.resume import AdoptableUnits
from pipeline.predictions.unit_file import UnitFile, count_statuses, summarise, write_unit

__all__ = [
    "AdoptableUnits",
    "Attempt",
    "UnitFile",
    "check_complete",
    "commit_attempt",
    "committed_manifest",
    "count_statuses",
    "iter_files",
    "read",
    "iter_tables",
    "read_list",
    "start_attempt",
    "summarise",
    "write_unit",
]
