"""Progress and messages: what a person sees, and what goes to the log instead."""

import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.runtime.progress import Progress, SilentSink, Terminal, rate_text, redirect_output

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock.monotonic)
    return clock


class Memory:
    """A sink that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int, str]] = []

    def update(self, stage: str, done: int, total: int, note: str = "", unit: str = "images") -> None:
        self.seen.append((stage, done, total, note))


@pytest.mark.parametrize(
    ("done", "total", "seconds", "text"),
    [
        (12, 80, 4.0, "12/80 steps, 3 steps/s, 23 s left"),
        (80, 80, 4.0, "80/80 steps, 20 steps/s"),
        (0, 80, 0.0, "0/80 steps"),
        (1, 3000, 0.001, "1/3000 steps, 1e+03 steps/s, 3 s left"),
    ],
)
def test_rate_text(done: int, total: int, seconds: float, text: str):
    assert rate_text(done, total, seconds, "steps") == text


def test_progress_tells_the_first_the_last_and_ten_a_second(clock: Clock):
    sink = Memory()
    progress = Progress(sink, "train", 100)
    for _ in range(100):
        clock.now += 0.01
        progress.advance(note=f"loss {progress.done}")
    assert sink.seen[0] == ("train", 0, 100, "")
    assert sink.seen[-1] == ("train", 100, 100, "loss 99")
    assert 10 <= len(sink.seen) <= 13
    assert [done for _, done, _, _ in sink.seen] == sorted(done for _, done, _, _ in sink.seen)


def test_progress_keeps_the_last_note(clock: Clock):
    sink = Memory()
    progress = Progress(sink, "train", 3, done=1)
    clock.now += 1
    progress.advance(note="loss 2")
    clock.now += 1
    progress.advance()
    assert sink.seen == [("train", 1, 3, ""), ("train", 2, 3, "loss 2"), ("train", 3, 3, "loss 2")]
    Progress(SilentSink(), "quiet", 1).advance()


def shown(steps: list[tuple[float, int, int]], clock: Clock) -> list[str]:
    out = io.StringIO()
    terminal = Terminal(out, io.StringIO())
    for seconds, done, total in steps:
        clock.now += seconds
        terminal.update("score", done, total)
    terminal.close()
    return out.getvalue().splitlines()


def test_short_work_shows_nothing(clock: Clock):
    assert shown([(0, 0, 10), (0.5, 5, 10), (1, 10, 10)], clock) == []


def test_long_work_without_a_terminal_is_a_line_every_ten_seconds_and_one_at_the_end(clock: Clock):
    lines = shown([(0, 0, 60), *[(1.0, done, 60) for done in range(1, 61)], (1.0, 60, 60)], clock)
    assert lines[0] == "score: 10/60 images, 1 images/s, 50 s left"
    assert lines[-1] == "score: 60/60 images, 1 images/s"
    assert len(lines) == 6


def test_work_that_ends_between_two_lines_still_says_that_it_ended(clock: Clock):
    lines = shown([(0, 0, 60), (11, 30, 60), (5, 60, 60)], clock)
    assert lines == ["score: 30/60 images, 2.73 images/s, 11 s left", "score: 60/60 images, 3.75 images/s"]


def test_work_over_two_seconds_without_a_terminal_ends_with_a_line(clock: Clock):
    assert shown([(0, 0, 60), (3, 30, 60), (3, 60, 60)], clock) == ["score: 60/60 images, 10 images/s"]


def test_resumed_work_counts_only_its_own_in_the_rate(clock: Clock):
    lines = shown([(0, 500, 1000), (10, 600, 1000)], clock)
    assert lines == ["score: 600/1000 images, 10 images/s, 40 s left"]


def test_a_live_bar_shows_the_rate_and_the_note(clock: Clock):
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Tty()
    terminal = Terminal(out, io.StringIO())
    terminal.update("score", 0, 10)
    clock.now += 1
    terminal.update("score", 3, 10)
    assert out.getvalue() == ""
    clock.now += 3
    terminal.update("score", 5, 10, "[4/s]")
    clock.now += 1
    terminal.update("score", 10, 10, "[note]")
    terminal.close()
    assert "10/10 images, 2 images/s  [note]" in out.getvalue()


def test_messages_are_shown_as_they_are():
    out, err = io.StringIO(), io.StringIO()
    terminal = Terminal(out, err)
    terminal.say("[bold]not markup[/bold] s3://b/" + "x" * 200)
    terminal.fail("wanted a, found b")
    assert out.getvalue() == "[bold]not markup[/bold] s3://b/" + "x" * 200 + "\n"
    assert err.getvalue() == "wanted a, found b\n"


def test_everything_but_the_terminal_goes_to_the_log(tmp_path: Path):
    log = tmp_path / "logs" / "run.log"
    code = f"""
import os, subprocess, sys
from pathlib import Path
from pipeline.runtime.progress import redirect_output
print("before")
with redirect_output(Path({str(log)!r})) as terminal:
    print("chatter")
    os.write(1, b"raw\\n")
    subprocess.run(["sh", "-c", "echo child; echo loud >&2"])
    print("warning", file=sys.stderr)
    terminal.say("message")
    terminal.fail("failure")
print("after")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ),
        check=True,
    )
    assert done.stdout.split() == ["before", "message", "after"]
    assert done.stderr.split() == ["failure"]
    assert sorted(log.read_text().split()) == ["chatter", "child", "loud", "raw", "warning"]


def test_output_comes_back_after_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    def work() -> None:
        with redirect_output(tmp_path / "log"):
            os.write(1, b"hidden\n")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        work()
    os.write(1, b"shown\n")
    assert capfd.readouterr().out == "shown\n"
    assert "hidden" in (tmp_path / "log").read_text()


def test_a_log_is_continued(tmp_path: Path):
    for word in ("one", "two"):
        with redirect_output(tmp_path / "log"):
            os.write(1, f"{word}\n".encode())
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_a_stage_that_runs_anew_is_shown_anew(clock: Clock):
    lines = shown([(0, 0, 60), (3, 60, 60), (100, 0, 60), (4, 60, 60)], clock)
    assert lines == ["score: 60/60 images, 20 images/s", "score: 60/60 images, 15 images/s"]


def test_waiting_for_a_start_is_no_part_of_the_rate(clock: Clock):
    lines = shown([(0, 0, 60), (8, 0, 60), (3, 30, 60), (3, 60, 60)], clock)
    assert lines == ["score: 30/60 images, 10 images/s, 3 s left", "score: 60/60 images, 10 images/s"]


def test_a_terminal_shows_a_stage_that_says_nothing_and_nothing_that_others_print(tmp_path: Path):
    code = """
import sys, time, pathlib
from pipeline.runtime import progress
progress.QUIET_S = 0.2
with progress.redirect_output(pathlib.Path("log")) as terminal:
    terminal.update("member 0", 0, 60, "", "steps")
    time.sleep(0.6)
    print("chatter of others")
    print("more of it", file=sys.stderr)
    terminal.update("member 0", 60, 60, "", "steps")
"""
    if shutil.which("script") is None:
        pytest.skip("the program script, which makes a terminal, is not installed")
    command = f"{sys.executable} -c '{code}'"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    said = subprocess.run(
        ["script", "-qec", command, "/dev/null"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "member 0" in said.stdout
    assert "0/60 steps" in said.stdout
    assert "60/60 steps" in said.stdout
    assert "chatter" not in said.stdout
    assert "more of it" not in said.stdout
    assert "chatter of others\nmore of it" in (tmp_path / "log").read_text()
