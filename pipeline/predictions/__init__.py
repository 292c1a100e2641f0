"""Prediction rows -> Parquet, each image exactly once; and back.

A job is cut into units by a plan that is a pure function of its inputs. Each run of the job is an *attempt*:
``attempt-<k>/_START.json``, committed before any work, names the finished unit files of earlier attempts that
it adopts; the rest is scored into ``attempt-<k>/``. ``_MANIFEST.json``, committed once, names every file of
the result, by way of Parquet lists in ``_lists/``. Readers trust it alone: what a process of an earlier attempt
finishes late is never seen.
"""

from pipeline.predictions.attempts import Attempt, check, commit, committed, start
from pipeline.predictions.file_lists import listed, read_list
from pipeline.predictions.reader import read, read_each
from pipeline.predictions.resume import Piece
from pipeline.predictions.unit_file import UnitFile, count_statuses, summarise, write_unit

__all__ = [
    "Attempt",
    "Piece",
    "UnitFile",
    "check",
    "commit",
    "committed",
    "count_statuses",
    "listed",
    "read",
    "read_each",
    "read_list",
    "start",
    "summarise",
    "write_unit",
]
