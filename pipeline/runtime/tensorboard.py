"""A run's curves as TensorBoard event files, written while it trains.

Event files grow at their end, which objects of a store cannot; so each look publishes a file of its own, with the rows
that are new since the last one, complete from the moment that it is there. TensorBoard reads the files of a folder in
the order of their names, and goes on to a new one. A file is named by the last step in it: what a killed run published
past its checkpoint is thus known, and taken back before the run goes on.
"""

import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from pipeline import storage

_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.dubito")
TAGS = {"loss": "loss/train", "val_loss": "loss/validation", "lr": "optim/lr"}
"""Of a row's keys; any other ``val_x`` is ``validation/x``, and the rest ``speed/x``."""


def name_of(step: int) -> str:
    """The file whose last step is ``step``."""
    return f"events.out.tfevents.{step:010d}.dubito"


def steps(folder_uri: str) -> dict[int, str]:
    """Last step -> name, of the files that are there."""
    names = [listed.path for listed in storage.list_files(folder_uri)] if storage.exists(folder_uri) else []
    return {int(found.group(1)): name for name in names if (found := _NAME.fullmatch(name))}


def publish(folder_uri: str, history: Iterable[Mapping[str, Any]], step: int) -> None:
    """Add the rows of ``history`` that no file in ``folder_uri`` has yet.

    Args:
        folder_uri: Of one member.
        history: All rows of the run, up to ``step``: ``step``, ``time`` (seconds since 1970), and numbers.
        step: The last one.
    """
    known = max(steps(folder_uri), default=-1)
    rows = sorted((row for row in history if row["step"] > known), key=lambda row: row["step"])
    if rows:
        storage.write_bytes(storage.join(folder_uri, name_of(step)), encode(rows))


def rewind(folder_uri: str, step: int) -> None:
    """Take back what stands past ``step``, from which the run goes on: it will come again."""
    filesystem, root = storage.arrow(folder_uri)
    for last, name in steps(folder_uri).items():
        if last > step:
            filesystem.delete_file(f"{root}/{name}")


def encode(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """An event file: one event a row, with a scalar for each of its numbers."""
    now = time.time()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "events"
        writer = RecordWriter(str(file))
        for number, row in enumerate(rows):
            when = row.get("time", now)
            if number == 0:
                writer.write(Event(wall_time=when, file_version="brain.Event:2").SerializeToString())
            event = Event(wall_time=when, step=row["step"])
            for key, value in row.items():
                if key not in ("step", "time"):
                    event.summary.value.extend(scalar(_tag(key), value).value)
            writer.write(event.SerializeToString())
        writer.close()
        return file.read_bytes()


def _tag(key: str) -> str:
    other = f"validation/{key.removeprefix('val_')}" if key.startswith("val_") else f"speed/{key}"
    return TAGS.get(key, other)
