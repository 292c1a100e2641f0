"""Progress and messages with a pluggable sink: a terminal, plain lines, or a board that Ray workers write on.

Library code reports through ``Progress``; who shows it decides the sink. The terminal is a duplicate of the
process's own output taken before everything else is diverted to a log file, because some of Ray's chatter
reaches the terminal whatever ``log_to_driver`` says.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

QUIET_S = 2.0
"""Work shorter than this shows no progress."""
LINE_EVERY_S = 10.0
"""Where output is no terminal, a plain progress line at most this often."""


class Sink(Protocol):
    """Where progress goes. ``update`` may be called at any rate."""

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """``done`` of ``total`` units of ``stage`` are finished."""
        ...


class NoSink:
    """Shows nothing: the library's default."""

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """Discard."""


def rate_text(done: int, total: int, seconds: float, unit: str, start: int = 0) -> str:
    """``12/80 steps, 3.1 steps/s, 22 s left``; ``start`` units were there before the clock started."""
    rate = (done - start) / seconds if seconds > 0 else 0.0
    text = f"{done}/{total} {unit}, {rate:.3g} {unit}/s"
    return f"{text}, {(total - done) / rate:.0f} s left" if done < total and rate > 0 else text


class Terminal:
    """Messages and progress for a person. One live bar a stage; plain lines when output is no terminal."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._console = Console(file=self._out, highlight=False, soft_wrap=True)
        self._live: RichProgress | None = None
        self._bars: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._said: dict[str, float] = {}

    def say(self, text: str) -> None:
        """One message on standard output."""
        self._console.print(text, markup=False)

    def fail(self, text: str) -> None:
        """One message on standard error."""
        self.close()
        print(text, file=self._err, flush=True)

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """Show that ``done`` of ``total`` units of ``stage`` are finished."""
        now = time.monotonic()
        began, start = self._began.setdefault(stage, (now, done))
        if now - began < QUIET_S and stage not in self._bars:
            return
        text = rate_text(done, total, now - began, unit, start)
        text = f"{text}  {note}" if note else text
        if self._console.is_terminal:
            self._draw(stage, done, total, text)
        elif self._line_is_due(stage, now - self._said.get(stage, began), ended=done >= total > 0):
            self._said[stage] = math.inf if done >= total > 0 else now
            self.say(f"{stage}: {text}")

    def _line_is_due(self, stage: str, silent_s: float, *, ended: bool) -> bool:
        """Every ten seconds, and once at the end."""
        return self._said.get(stage) != math.inf and (ended or silent_s >= LINE_EVERY_S)

    def _draw(self, stage: str, done: int, total: int, text: str) -> None:
        if self._live is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(24),
                TextColumn("{task.fields[text]}", markup=False),
            )
            self._live = RichProgress(*columns, TimeElapsedColumn(), console=self._console)
            self._live.start()
        if stage not in self._bars:
            self._bars[stage] = self._live.add_task(stage, total=total, text=text)
        self._live.update(self._bars[stage], completed=done, total=total, text=text)

    def close(self) -> None:
        """End the live display, leaving its last state on the screen."""
        if self._live is not None:
            self._live.stop()
        self._live, self._bars = None, {}
        self._began, self._said = {}, {}


class Progress:
    """Counts one stage. ``advance`` is cheap: the sink hears of it ten times a second at most."""

    def __init__(self, sink: Sink, stage: str, total: int, done: int = 0, unit: str = "images") -> None:
        self._sink, self.stage, self.total, self.done, self._unit = sink, stage, total, done, unit
        self._note, self._told = "", 0.0
        sink.update(stage, done, total, "", unit)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """``count`` more units are finished; ``note`` is shown behind the rate until the next one."""
        self.done += count
        self._note = self._note if note is None else note
        now = time.monotonic()
        if now - self._told >= 0.1 or self.done >= self.total:
            self._told = now
            self._sink.update(self.stage, self.done, self.total, self._note, self._unit)


class BoardSink:
    """The Ray sink: updates go to a ``Board`` actor, whose owner shows them."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """Post without waiting."""
        self._board.post.remote(stage, done, total, note, unit)


def start_board() -> Any:
    """A handle to a fresh Ray actor that keeps the last update of each stage."""
    import ray

    class Board:
        def __init__(self) -> None:
            self.stages: dict[str, tuple[int, int, str, str]] = {}

        def post(self, stage: str, done: int, total: int, note: str, unit: str) -> None:
            self.stages[stage] = (done, total, note, unit)

        def read(self) -> dict[str, tuple[int, int, str, str]]:
            return self.stages

    return ray.remote(num_cpus=0)(Board).remote()


@contextlib.contextmanager
def diverted(log: Path) -> Iterator[Terminal]:
    """Send file descriptors 1 and 2 to ``log`` and yield a Terminal on the old ones."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    out, err = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in saved)
    terminal = Terminal(out, err)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield terminal
    finally:
        terminal.close()
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, old in enumerate(saved, start=1):
            os.dup2(old, fd)
            os.close(old)
        out.close()
        err.close()
