"""A job's messages and progress as JSON lines, for logs that a program reads; and back onto a terminal.

With ``DUBITO_LOG=json`` every line of a job's output is one object: ``time`` (UTC, ISO 8601), ``run`` (``DUBITO_RUN``,
else the log's name), ``verb``, ``level`` (``info``, ``error``, ``progress``), and ``message`` or ``stage, done, total,
unit, note``. Who submitted a job to a cluster sees the same bars as on this machine: ``JsonLogReplay`` draws them.
"""

import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from pipeline import environment
from pipeline.runtime.progress import JobOutput, Terminal

PROGRESS_EVERY_S = 1.0
"""At least so many seconds lie between two progress lines of a stage."""
_LINE_START = '{"time":'


def job_output(verb: str) -> Callable[[TextIO, TextIO, Path], JobOutput]:
    """A function (output, errors, path of the log) -> what a job writes to: JSON lines, or a terminal."""
    if not environment.wants_json_log():
        return Terminal
    return lambda out, err, log: JsonLog(verb, run_of(log), out)


def run_of(log: Path) -> str:
    """Id of the run with that log; its log lines and its metrics carry the same."""
    return environment.run_id() or log.stem


class JsonLog:
    """Messages and progress as JSON lines on standard output."""

    def __init__(self, verb: str, run: str, out: TextIO) -> None:
        self._out = out
        self._common_fields = {"run": run, "verb": verb}
        self._last_written: dict[str, tuple[float, int]] = {}
        self._lock = threading.Lock()

    def _write(self, level: str, **fields: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock:
            event = {"time": now, **self._common_fields, "level": level, **fields}
            print(json.dumps(event), file=self._out, flush=True)

    def say(self, text: str) -> None:
        """One message."""
        self._write("info", message=text)

    def fail(self, text: str, traceback_text: str = "") -> None:
        """One message of what went wrong; ``traceback_text`` may be empty."""
        self._write("error", message=text, **({"traceback": traceback_text} if traceback_text else {}))

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """``done`` of ``total`` units of ``stage`` are finished."""
        now = time.monotonic()
        last_s, done_before = self._last_written.get(stage, (-math.inf, -1))
        # The end of a stage, and its start anew, are always written; what lies between only now and then.
        ended = done >= total and done_before < total
        restarted = done < done_before
        due = now - last_s >= PROGRESS_EVERY_S and done != done_before
        if ended or restarted or due:
            self._last_written[stage] = now, done
            self._write("progress", stage=stage, done=done, total=total, unit=unit, note=note)

    def close(self) -> None:
        """Nothing to do: each line was flushed when it was written."""


class JsonLogReplay:
    """Shows on a terminal what ``JsonLog`` wrote elsewhere.

    All other lines are Ray's; they go to this process's own output (a log). The last of them are kept: they may be all
    that there is to say of a job that failed without a message.
    """

    def __init__(self, terminal: JobOutput) -> None:
        self._terminal = terminal
        self._unfinished_line = ""
        self.chatter: deque[str] = deque(maxlen=5)
        """The last lines that ``JsonLog`` did not write."""

    def feed(self, text: str) -> None:
        """Take a piece of the output; it may end within a line."""
        *lines, self._unfinished_line = (self._unfinished_line + text).split("\n")
        for line in lines:
            self._show(line)

    def close(self) -> None:
        """Show the last line even if it has no end, and close the terminal."""
        if self._unfinished_line:
            self._show(self._unfinished_line)
        self._unfinished_line = ""
        self._terminal.close()

    def _show(self, line: str) -> None:
        event = _parse_event(line)
        if event is None:
            print(line)
            if line.strip():
                self.chatter.append(line)
        elif event["level"] == "progress":
            names = ("stage", "done", "total", "note", "unit")
            self._terminal.update(*(event[name] for name in names))
        else:
            self._terminal.close()
            if event["level"] == "error":
                self._terminal.fail(event["message"], event.get("traceback", ""))
            else:
                self._terminal.say(event["message"])


def _parse_event(line: str) -> dict[str, Any] | None:
    """The event on a line that ``JsonLog`` wrote, else None."""
    if not line.startswith(_LINE_START):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if event.get("level") == "progress":
        fields = ("stage", "done", "total", "note", "unit")
    else:
        fields = ("message", "level")
    return event if all(name in event for name in fields) else None
