"""Progress and messages with a pluggable sink: a terminal, plain lines, or a board that Ray workers write on.

Library code reports through ``Progress``; who shows it decides the sink. The terminal is a duplicate of the
process's own output taken before everything else is diverted to a log file, because some of Ray's chatter
reaches the terminal whatever ``log_to_driver`` says.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

QUIET_S = 2.0
"""Work shorter than this shows no progress."""
LINE_EVERY_S = 10.0
"""Where output is no terminal, a plain progress line at most this often."""


class ProgressSink(Protocol):
    """Where progress goes. ``update`` may be called at any rate."""

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """``done`` of ``total`` units of ``stage`` are finished."""
        ...


class JobOutput(ProgressSink, Protocol):
    """What a job speaks through: messages for a person or a program, and progress."""

    def say(self, text: str) -> None:
        """One message."""
        ...

    def fail(self, text: str, story: str = "") -> None:
        """One message of what went wrong; ``story`` is the traceback, where there is one."""
        ...

    def close(self) -> None:
        """No more progress for now."""
        ...


class SilentSink:
    """Shows nothing: the library's default."""

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """Discard."""


def rate_text(done: int, total: int, seconds: float, unit: str, start: int = 0) -> str:
    """``12/80 steps, 3.1 steps/s, 22 s left``; ``start`` units were there before the clock started."""
    rate = (done - start) / seconds if seconds > 0 else 0.0
    if rate <= 0:
        return f"{done}/{total} {unit}"
    text = f"{done}/{total} {unit}, {rate:.3g} {unit}/s"
    return f"{text}, {(total - done) / rate:.0f} s left" if done < total else text


@dataclass
class _Stage:
    """What the terminal knows of one stage."""

    seen: float
    """When it was first heard of."""
    began: float
    """When its first unit was begun, as far as known: waiting for a start is no part of the rate."""
    start: int
    done: int
    total: int
    text: str = ""
    said: float = -math.inf
    """When a plain line was last printed; inf once the last one was."""


class Terminal:
    """Messages and progress for a person. One live bar a stage; plain lines when output is no terminal."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None, log: Path | None = None) -> None:
        self._out, self._err, self._log = out or sys.stdout, err or sys.stderr, log
        self._console = Console(file=self._out, highlight=False, soft_wrap=True)
        self._live: RichProgress | None = None
        self._bars: dict[str, TaskID] = {}
        self._stages: dict[str, _Stage] = {}
        self._lock = threading.RLock()
        self._timers: list[threading.Timer] = []

    def say(self, text: str) -> None:
        """One message on standard output."""
        self._console.print(text, markup=False)

    def fail(self, text: str, story: str = "") -> None:
        """One message on standard error; the story goes into the log, which is named."""
        self.close()
        if story and self._log is not None:
            with self._log.open("a") as file:
                file.write(story)
            text = f"{text}; the whole story is in {self._log}"
        print(text, file=self._err, flush=True)

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """Show that ``done`` of ``total`` units of ``stage`` are finished; fewer than before = it runs anew."""
        with self._lock:
            now = time.monotonic()
            known = self._stages.get(stage)
            if known is None or done < known.done:
                known = self._stages[stage] = _Stage(now, now, done, done, total)
                self._show_late(stage)
            if done == known.start:
                known.began = now
            known.done, known.total = done, total
            text = rate_text(done, total, now - known.began, unit, known.start)
            known.text = f"{text}  {note}" if note else text
            if now - known.seen >= QUIET_S or stage in self._bars:
                self._show(stage, known, now)

    def _show(self, stage: str, known: _Stage, now: float) -> None:
        if self._console.is_terminal:
            self._draw(stage, known)
            return
        ended = known.done >= known.total > 0
        silent_s = now - max(known.said, known.seen)
        if known.said != math.inf and (ended or silent_s >= LINE_EVERY_S):
            known.said = math.inf if ended else now
            self.say(f"{stage}: {known.text}")

    def _show_late(self, stage: str) -> None:
        """A bar for a stage that says nothing for a while, such as one whose workers are starting."""
        if not self._console.is_terminal:
            return

        def late() -> None:
            with self._lock:
                known = self._stages.get(stage)
                if known is not None and known.done < known.total:
                    self._draw(stage, known)

        timer = threading.Timer(QUIET_S, late)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def _draw(self, stage: str, known: _Stage) -> None:
        if self._live is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(24),
                TextColumn("{task.fields[text]}", markup=False),
            )
            # What others print (Ray does) belongs into the log, not between the bars.
            self._live = RichProgress(
                *columns, TimeElapsedColumn(), console=self._console, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
        if stage not in self._bars:
            self._bars[stage] = self._live.add_task(stage, total=known.total, text=known.text)
        self._live.update(self._bars[stage], completed=known.done, total=known.total, text=known.text)

    def close(self) -> None:
        """End the live display, leaving its last state on the screen."""
        with self._lock:
            for timer in self._timers:
                timer.cancel()
            self._timers, self._stages = [], {}
            if self._live is not None:
                self._live.stop()
            self._live, self._bars = None, {}


class Progress:
    """Counts one stage. ``advance`` is cheap: the sink hears of it ten times a second at most."""

    def __init__(self, sink: ProgressSink, stage: str, total: int, done: int = 0, unit: str = "images") -> None:
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


class RayBoardSink:
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

    # Started anew where its node dies: whoever reads it waits for that, and hears what is posted from then on.
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board)
    return actor.remote()


@contextlib.contextmanager
def redirect_output(log: Path, make: Callable[[TextIO, TextIO, Path], JobOutput] = Terminal) -> Iterator[JobOutput]:
    """Send file descriptors 1 and 2 to ``log`` and yield what speaks on the old ones, made of them and the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    out, err = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in saved)
    terminal = make(out, err, log)
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
