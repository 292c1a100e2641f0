"""Prediction rows -> Parquet, each image exactly once; and back.

A job is cut into units by a plan that is a pure function of its inputs. Each run of the job is an *attempt*:
``attempt-<k>/_START.json``, committed before any work, names the finished unit files of earlier attempts that
it adopts; the rest is scored into ``attempt-<k>/``. ``_MANIFEST.json``, committed once, names every file of
the result. Readers trust it alone: what a process of an earlier attempt finishes late is never seen.
"""

from pipeline.predictions.attempts import Attempt, check, commit, committed, start
from pipeline.predictions.files import UnitFile, adoptable, id_hashes, summarise, write_unit
from pipeline.predictions.reader import read

__all__ = [
    "Attempt",
    "UnitFile",
    "adoptable",
    "check",
    "commit",
    "committed",
    "id_hashes",
    "read",
    "start",
    "summarise",
    "write_unit",
]
