"""Prediction rows -> Parquet, each image exactly once; and back.

A job is cut into units by a plan that is a pure function of its inputs. Each run of the job is an *attempt*:
``attempt-<k>/_START.json``, committed before any work, names the finished unit files of earlier attempts that
it adopts; the rest is scored into ``attempt-<k>/``. ``_MANIFEST.json``, committed once, names every file of
the result, by way of Parquet lists in ``_lists/``. Readers trust it alone: what a process of an earlier attempt
finishes late is never seen.
"""

from pipeline.predictions.attempts import Attempt, check_complete, commit_attempt, committed_manifest, start_attempt
from pipeline.predictions.file_lists import iter_files, read_list
from pipeline.predictions.reader import iter_tables, read
from pipeline.predictions.resume import UnitGroup
from pipeline.predictions.unit_file import UnitFile, count_statuses, summarise, write_unit

__all__ = [
    "Attempt",
    "UnitGroup",
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
