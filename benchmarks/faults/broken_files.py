"""Broken files by the thousand, read in processes of their own: one that dies takes its own with it, and is counted."""

import multiprocessing
import queue
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults import hostile_files


def judge_images(start: int, count: int, folder: str | None, out: Any) -> None:
    """Broken images through the decoder; how many ended how."""
    rng, good, words = random.Random(start), hostile_files.good_images(Path(folder) if folder else None), Counter()
    for _ in range(count):
        data, began = hostile_files.image(rng, good), time.monotonic()
        words[hostile_files.count(partial(hostile_files.judge_image, data))] += 1
        words["slow"] += time.monotonic() - began > 10
    out.put(words)


def judge_labels(start: int, count: int, format: str, out: Any) -> None:
    """Broken label files through ingest's readers; how many ended how."""
    rng, good, words = random.Random(start), hostile_files.good_labels(format), Counter()
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count):
            images, labels = hostile_files.write_case(Path(folder), hostile_files.label(rng, format, good))
            began = time.monotonic()
            words[hostile_files.count(partial(_fine, format, images, labels))] += 1
            words["slow"] += time.monotonic() - began > 10
    out.put(words)


def _fine(format: str, images: Path, labels: Path) -> str:
    hostile_files.judge_labels(format, images, labels)
    return "fine"


def read(work: Callable[..., None], plans: list[tuple[Any, ...]], limit_s: float = 600) -> Counter[str]:
    """Each plan in a process of its own, side by side; one that dies is a crash, one not done in time a hang."""
    context, words = multiprocessing.get_context("spawn"), Counter[str]()
    died, hung, running, deadline = 0, 0, [], time.monotonic() + limit_s
    for plan in plans:
        out = context.Queue()
        running.append((context.Process(target=work, args=(*plan, out)), out))
        running[-1][0].start()
    for process, out in running:
        while process.is_alive() and out.empty() and time.monotonic() < deadline:
            time.sleep(0.1)
        if process.is_alive() and out.empty():
            hung += 1
            process.kill()
            continue
        try:
            words += out.get(timeout=2)
        except queue.Empty:
            died += 1
        process.join(5)
    crashes = {word: count for word, count in words.items() if word.startswith("crash")}
    kinds = {word: count for word, count in words.items() if not word.startswith("crash")}
    print(
        f"  files: {dict(sorted(kinds.items()))}",
        *(f"\n  {key} ({count})" for key, count in crashes.items()),
        flush=True,
    )
    return Counter(
        crashes=sum(crashes.values()) + died, hangs=words["slow"] + hung, files=words.total() - words["slow"]
    )
