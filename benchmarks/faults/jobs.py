"""Jobs as a user starts them, on an S3 server of their own, and what may be done to them while they run."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

HANG_S = 240.0
"""A job that takes longer hangs."""
NOBODY = "nobody"
TARGETS = {
    "driver": r"jobs\.cli",
    "task worker": r"^ray::(MapBatches|ReadRange|IDLE)",
    "actor": r"^ray::MapWorker",
    "train worker": r"^ray::.*(RayTrainWorker|TrainWorker)",
    "raylet": r"/raylet/raylet ",
}
"""What is killed: pattern of the command line."""


@dataclass
class Ended:
    """How a job ended."""

    code: int | None
    """None: it hung, and was killed."""
    seconds: float
    said: str
    """Standard output and error."""

    @property
    def crashed(self) -> bool:
        """It showed a traceback instead of a sentence."""
        return "Traceback (most recent call last)" in self.said


class Job:
    """``dubito <verb>`` in a session of its own."""

    def __init__(self, folder: Path, env: Mapping[str, str], *args: str) -> None:
        self.began = time.monotonic()
        self._out = folder / f"job-{time.time_ns()}.txt"
        plain = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        root = str(Path(__file__).resolve().parents[2])
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *args], cwd=folder, start_new_session=True,
                stdout=out, stderr=subprocess.STDOUT, env={**plain, "PYTHONPATH": root, **env},
            )  # fmt: skip
        self.seen: set[int] = set()

    def processes(self) -> dict[int, str]:
        """Command lines of this process and of all that it started."""
        parents, titles = {}, {}
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            try:
                parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
                titles[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
            except (OSError, IndexError):  # it has just ended
                continue
        mine = {self.process.pid, *(pid for pid in self.seen if pid in parents)}
        while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
            mine |= more
        self.seen |= mine
        return {pid: titles[pid] for pid in mine if pid in titles}

    def kill(self, target: str, rng: random.Random, wait_s: float = 5.0) -> str:
        """SIGKILL to one process of that kind, as soon as there is one; its title, "nobody" where there was none."""
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and self.process.poll() is None:
            found = {pid: title for pid, title in self.processes().items() if re.search(TARGETS[target], title)}
            if found:
                pid = rng.choice(sorted(found))
                try:
                    os.kill(pid, signal.SIGKILL)
                    return found[pid][:40]
                except ProcessLookupError:
                    continue
            time.sleep(0.02)
        return NOBODY

    def wait(self, limit: float = HANG_S) -> Ended:
        """Until it ends; what it leaves running is killed."""
        self.processes()
        code: int | None = None
        while time.monotonic() - self.began < limit:
            code = self.process.poll()
            if code is not None:
                break
            self.processes()
            time.sleep(0.1)
        seconds = time.monotonic() - self.began
        for pid in {*self.processes(), self.process.pid}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        return Ended(code, seconds, self._out.read_text(errors="replace"))


def run(folder: Path, env: Mapping[str, str], *args: str, limit: float = HANG_S) -> Ended:
    """One job from start to end."""
    return Job(folder, env, *args).wait(limit)


def until_done(folder: Path, env: Mapping[str, str], again: list[str], tries: int = 4) -> Iterator[Ended]:
    """Run a job until it succeeds; each end."""
    for _ in range(tries):
        ended = run(folder, env, *again)
        yield ended
        if ended.code == 0:
            return
