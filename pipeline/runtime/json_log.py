"""A job's messages and progress as JSON lines, for logs that a program reads; and back onto a terminal.

With ``DUBITO_LOG=json`` every line of a job's output is one object: ``time`` (UTC, ISO 8601), ``run`` (``DUBITO_RUN``,
else the log's name), ``verb``, ``level`` (``info``, ``error``, ``progress``), and ``message`` or ``stage, done, total,
unit, note``. Who submitted the job to a cluster sees the same bars as on this machine: ``Replay`` draws them.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from pipeline import environment
from pipeline.runtime.progress import JobOutput, Terminal

EVERY_S = 1.0
"""Progress of a stage at most this often."""
_MARK = '{"time":'


def job_output(verb: str) -> Callable[[TextIO, TextIO, Path], JobOutput]:
    """Makes what a job speaks through, of its output, its errors and its log: a terminal, or JSON lines."""
    if not environment.wants_json_log():
        return Terminal
    return lambda out, err, log: JsonLog(verb, run_of(log), out)


def run_of(log: Path) -> str:
    """Id of the run whose log that is: the same in its lines and in its metrics."""
    return environment.run_id() or log.stem


class JsonLog:
    """Messages and progress as JSON lines on standard output."""

    def __init__(self, verb: str, run: str, out: TextIO) -> None:
        self._out = out
        self._always = {"run": run, "verb": verb}
        self._said: dict[str, tuple[float, int]] = {}
        self._lock = threading.Lock()

    def _write(self, level: str, **fields: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock:
            print(json.dumps({"time": now, **self._always, "level": level, **fields}), file=self._out, flush=True)

    def say(self, text: str) -> None:
        """One message."""
        self._write("info", message=text)

    def fail(self, text: str, story: str = "") -> None:
        """One message of what went wrong; ``story`` is the traceback, where there is one."""
        self._write("error", message=text, **({"traceback": story} if story else {}))

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """``done`` of ``total`` units of ``stage`` are finished."""
        now = time.monotonic()
        when, before = self._said.get(stage, (-EVERY_S, -1))
        ended = done >= total and before < total
        if ended or done < before or now - when >= EVERY_S and (done, total) != (before, total):
            self._said[stage] = now, done
            self._write("progress", stage=stage, done=done, total=total, unit=unit, note=note)

    def close(self) -> None:
        """Nothing is held back."""


class JsonLogReplay:
    """Shows what ``Lines`` wrote elsewhere.

    Anything else, Ray's chatter, goes to this process's own output (a log), and its last lines are kept for the case
    that nothing better was said.
    """

    def __init__(self, terminal: JobOutput) -> None:
        self._terminal, self._rest = terminal, ""
        self.chatter: deque[str] = deque(maxlen=5)

    def feed(self, text: str) -> None:
        """Take a piece of the output: it may end within a line."""
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            self._show(line)

    def close(self) -> None:
        """Show what stands on a last line that was never ended."""
        if self._rest:
            self._show(self._rest)
        self._rest = ""
        self._terminal.close()

    def _show(self, line: str) -> None:
        event = _event(line)
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


def _event(line: str) -> dict[str, Any] | None:
    """The object on a line that ``Lines`` wrote, else None."""
    if not line.startswith(_MARK):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    wanted = ("stage", "done", "total", "note", "unit") if event.get("level") == "progress" else ("message", "level")
    return event if all(name in event for name in wanted) else None
