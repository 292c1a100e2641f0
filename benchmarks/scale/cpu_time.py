"""CPU times of a benchmark's own process, of all that it started, and of the machine."""

import os
import resource
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale.scaling import descendants

EVERY_S = 1.0
"""Between two looks at CPU times."""
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
COORDINATOR = "ray::SplitCoordinator"
"""Title of the process that runs the execution of a dataset which is split over consumers."""


class Busy:
    """Samples CPU times while the block runs: of this process, of all that it started too, and of the machine."""

    def __init__(self) -> None:
        self._rows: list[tuple[float, float, float, float]] = []
        self._spent: dict[int, float] = {}
        self._coordinators: set[int] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Busy":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(EVERY_S if self._rows else 0):
            self._look()
        self._look()

    def _look(self) -> None:
        for pid, each in descendants().items():
            self._spent[pid] = process_cpu_s(pid) or self._spent.get(pid, 0.0)  # one that has ended keeps what it took
            if each["title"].startswith(COORDINATOR):
                self._coordinators.add(pid)
        own = resource.getrusage(resource.RUSAGE_SELF)
        looking = time.thread_time()  # what this thread takes is not the driver's
        driver = own.ru_utime + own.ru_stime - looking
        everything = driver + sum(spent for pid, spent in self._spent.items() if pid != os.getpid())
        driver += sum(self._spent[pid] for pid in self._coordinators)
        self._rows.append((time.time(), driver, everything, machine_cpu_s() - looking))

    def between(self, begin: float, end: float) -> dict[str, float]:
        """CPU seconds from one time to another: ``driver``, ``all``, and of ``others``."""
        times, *columns = np.array(self._rows).T
        driver, everything, machine = (float(np.diff(np.interp([begin, end], times, one))[0]) for one in columns)
        return {"driver": driver, "all": everything, "others": machine - everything}


def process_cpu_s(pid: int) -> float | None:
    """CPU seconds that a process took; None: it has ended (man 5 proc: utime and stime)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) * TICK_S


def machine_cpu_s() -> float:
    """CPU seconds that this machine has worked: user, nice, system, irq and softirq."""
    times = [int(part) for part in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return sum(times[at] for at in (0, 1, 2, 5, 6)) * TICK_S
