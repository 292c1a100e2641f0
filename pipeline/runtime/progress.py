"""Progress and messages, and where they go: a terminal, plain lines, or a board that Ray workers write on.

Library code reports through ``Progress`` to a sink; its caller chooses the sink. A job's terminal is a duplicate of the
process's own output, taken before everything else is redirected to a log file, because some of Ray's messages reach the
terminal whatever ``log_to_driver`` says.
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
"""Where output is no terminal, at least so many seconds lie between two progress lines of a stage."""
UPDATE_EVERY_S = 0.1
"""``Progress`` sends its sink no more than one update in this time, but for the last."""


class ProgressSink(Protocol):
    """Where progress goes. ``update`` may be called at any rate."""

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """``done`` of ``total`` units of ``stage`` are finished."""
        ...


class JobOutput(ProgressSink, Protocol):
    """What a job writes to: messages for a person or a program, and progress."""

    def say(self, text: str) -> None:
        """One message."""
        ...

    def fail(self, text: str, traceback_text: str = "") -> None:
        """One message of what went wrong; ``traceback_text`` may be empty."""
        ...

    def close(self) -> None:
        """No more progress for now."""
        ...


class SilentSink:
    """Shows nothing; the default of library functions."""

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """Discard."""


def rate_text(done: int, total: int, seconds: float, unit: str, done_before: int = 0) -> str:
    """``12/80 steps, 3.1 steps/s, 22 s left``; ``done_before`` units were done before the clock started."""
    rate = (done - done_before) / seconds if seconds > 0 else 0.0
    if rate <= 0:
        return f"{done}/{total} {unit}"
    text = f"{done}/{total} {unit}, {rate:.3g} {unit}/s"
    return f"{text}, {(total - done) / rate:.0f} s left" if done < total else text


@dataclass
class _Stage:
    """What the terminal knows of one stage."""

    first_update_s: float
    """When its first update came, on the monotonic clock, as all times here."""
    first_unit_s: float
    """When its first unit was begun, as far as the updates say: time before that is no part of the rate."""
    done_before: int
    """Units that its first update called done: those of an earlier run, which say nothing of the rate."""
    done: int
    total: int
    text: str = ""
    """Counts, rate and note, as shown."""
    last_line_s: float = -math.inf
    """When a plain line was last printed; inf once that of the finished stage was."""


class Terminal:
    """Messages and progress for a person. One live bar a stage; plain lines when output is no terminal."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None, log: Path | None = None) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._log = log
        self._console = Console(file=self._out, highlight=False, soft_wrap=True)
        self._live: RichProgress | None = None
        self._bar_ids: dict[str, TaskID] = {}
        self._stages: dict[str, _Stage] = {}
        self._lock = threading.RLock()
        self._timers: list[threading.Timer] = []

    def say(self, text: str) -> None:
        """One message on standard output."""
        self._console.print(text, markup=False)

    def fail(self, text: str, traceback_text: str = "") -> None:
        """One message on standard error; the traceback goes into the log, which the message names."""
        self.close()
        if traceback_text and self._log is not None:
            with self._log.open("a") as file:
                file.write(traceback_text)
            text = f"{text}; the whole story is in {self._log}"
        print(text, file=self._err, flush=True)

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """Show that ``done`` of ``total`` units of ``stage`` are finished; fewer than before = it runs anew."""
        with self._lock:
            now = time.monotonic()
            state = self._stages.get(stage)
            # Fewer than before: a retry, whose rate begins anew.
            if state is None or done < state.done:
                state = self._stages[stage] = _Stage(now, now, done, done, total)
                self._show_after_a_while(stage)
            # As long as nothing is finished, the first unit may not have begun: workers start, data is listed.
            if done == state.done_before:
                state.first_unit_s = now
            state.done, state.total = done, total
            text = rate_text(done, total, now - state.first_unit_s, unit, state.done_before)
            state.text = f"{text}  {note}" if note else text
            if now - state.first_update_s >= QUIET_S or stage in self._bar_ids:
                self._show(stage, state, now)

    def _show(self, stage: str, state: _Stage, now: float) -> None:
        if self._console.is_terminal:
            self._draw(stage, state)
            return
        # Plain lines: now and then, and one at the end of the stage, after which there are no more.
        ended = state.done >= state.total > 0
        silent_s = now - max(state.last_line_s, state.first_update_s)
        if state.last_line_s != math.inf and (ended or silent_s >= LINE_EVERY_S):
            state.last_line_s = math.inf if ended else now
            self.say(f"{stage}: {state.text}")

    def _show_after_a_while(self, stage: str) -> None:
        """Draw a bar by a timer, for a stage that sends no update for a while, such as one whose workers start."""
        if not self._console.is_terminal:
            return

        def show_if_unfinished() -> None:
            with self._lock:
                state = self._stages.get(stage)
                if state is not None and state.done < state.total:
                    self._draw(stage, state)

        timer = threading.Timer(QUIET_S, show_if_unfinished)
        timer.daemon = True
        timer.start()
        self._timers.append(timer)

    def _draw(self, stage: str, state: _Stage) -> None:
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
        if stage not in self._bar_ids:
            self._bar_ids[stage] = self._live.add_task(stage, total=state.total, text=state.text)
        self._live.update(self._bar_ids[stage], completed=state.done, total=state.total, text=state.text)

    def close(self) -> None:
        """End the live display, leaving its last state on the screen."""
        with self._lock:
            for timer in self._timers:
                timer.cancel()
            self._timers = []
            self._stages = {}
            if self._live is not None:
                self._live.stop()
            self._live = None
            self._bar_ids = {}


class Progress:
    """Counts the units of one stage. ``advance`` is cheap: it updates the sink at most ten times a second."""

    def __init__(self, sink: ProgressSink, stage: str, total: int, done: int = 0, unit: str = "images") -> None:
        self._sink = sink
        self.stage = stage
        self.total = total
        self.done = done
        self._unit = unit
        self._note = ""
        self._last_update_s = 0.0
        sink.update(stage, done, total, "", unit)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """``count`` more units are finished; ``note`` is shown after the rate until another one replaces it."""
        self.done += count
        self._note = self._note if note is None else note
        now = time.monotonic()
        if now - self._last_update_s >= UPDATE_EVERY_S or self.done >= self.total:
            self._last_update_s = now
            self._sink.update(self.stage, self.done, self.total, self._note, self._unit)


class RayBoardSink:
    """Sends updates to the actor that ``start_board`` gave; the process that started it reads and shows them."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        """Send the update without waiting for an answer."""
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

    # Started anew where its node dies: who reads it waits for that, and then sees the updates sent since.
    actor: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Board)
    return actor.remote()


@contextlib.contextmanager
def redirect_output(
    log: Path, make_output: Callable[[TextIO, TextIO, Path], JobOutput] = Terminal
) -> Iterator[JobOutput]:
    """Send file descriptors 1 and 2 to ``log`` while the block runs; yields the job's output on the old ones.

    Args:
        log: File that gets everything else that this process and its children print.
        make_output: (old standard output, old standard error, ``log``) -> the output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # Two duplicates of each: one to be restored at the end, one for the job's output, which closes it.
    saved = os.dup(1), os.dup(2)
    out, err = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in saved)
    output = make_output(out, err, log)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield output
    finally:
        output.close()
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, saved_fd in enumerate(saved, start=1):
            os.dup2(saved_fd, fd)
            os.close(saved_fd)
        out.close()
        err.close()
