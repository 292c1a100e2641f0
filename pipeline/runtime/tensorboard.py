"""A run's curves as TensorBoard event files, written while it trains.

TensorBoard's own writer appends to one file, which an object store cannot do. So each validation publishes a new file
with the rows since the last one. TensorBoard reads the files of a folder in the order of their names, and notices new
ones. A file is named by the last step in it: what a killed run published past its checkpoint can be told by its name,
and is deleted before the run goes on.
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
"""Key of a row -> TensorBoard tag; any other ``val_x`` becomes ``validation/x``, and the rest ``speed/x``."""


def file_name(step: int) -> str:
    """Name of the file whose last step is ``step``."""
    return f"events.out.tfevents.{step:010d}.dubito"


def files_by_last_step(folder_uri: str) -> dict[int, str]:
    """Last step -> name of the event file; empty where there is no folder yet."""
    names = [listed.path for listed in storage.list_files(folder_uri)] if storage.exists(folder_uri) else []
    return {int(match.group(1)): name for name in names if (match := _NAME.fullmatch(name))}


def publish(folder_uri: str, history: Iterable[Mapping[str, Any]], step: int) -> None:
    """Add the rows of ``history`` that no file in ``folder_uri`` has yet.

    Args:
        folder_uri: The curves of one member.
        history: All rows of the run, up to ``step``: ``step``, ``time`` (seconds since 1970), and numbers.
        step: Last step of the history.
    """
    last_published = max(files_by_last_step(folder_uri), default=-1)
    rows = sorted((row for row in history if row["step"] > last_published), key=lambda row: row["step"])
    if rows:
        storage.write_bytes(storage.join(folder_uri, file_name(step)), encode(rows))


def rewind(folder_uri: str, step: int) -> None:
    """Delete the files that end past ``step``: the run goes on from there, and will publish those steps again."""
    filesystem, root = storage.arrow(folder_uri)
    for last, name in files_by_last_step(folder_uri).items():
        if last > step:
            filesystem.delete_file(f"{root}/{name}")


def encode(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """An event file: one event a row, with a scalar for each of its numbers."""
    now = time.time()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "events"
        writer = RecordWriter(str(file))
        for number, row in enumerate(rows):
            wall_time_s = row.get("time", now)
            # Every event file begins with its format's version.
            if number == 0:
                writer.write(Event(wall_time=wall_time_s, file_version="brain.Event:2").SerializeToString())
            event = Event(wall_time=wall_time_s, step=row["step"])
            for key, value in row.items():
                if key not in ("step", "time"):
                    event.summary.value.extend(scalar(_tag(key), value).value)
            writer.write(event.SerializeToString())
        writer.close()
        return file.read_bytes()


def _tag(key: str) -> str:
    if key in TAGS:
        return TAGS[key]
    if key.startswith("val_"):
        return f"validation/{key.removeprefix('val_')}"
    return f"speed/{key}"
