"""What every benchmark shares: sides in turns, medians and spread, a table, and one JSON line last."""

import importlib.metadata
import json
import multiprocessing
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record


def machine() -> dict[str, Any]:
    """Processor and cores this process may use, GPU (None: none), and the versions that speed depends on."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS
    return {
        "cpu": _cpu_model(),
        "cores": len(allowed(0)) if allowed else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{package: _version(package) for package in ("torch", "torchvision", "ray", "kornia")},
    }


def in_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every side once a round, so that whatever else the machine does falls on all of them alike.

    Args:
        sides: Name -> one turn, which returns its rate in items a second.
        rounds: Turns of each side; every other round goes through the sides backwards.

    Returns:
        Name -> ``rounds`` rates.
    """
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            rates[name].append(sides[name]())
    return rates


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, lower quartile and upper quartile."""
    low, median, high = np.percentile(values, [25, 50, 75])
    return float(median), float(low), float(high)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys as a Markdown table; text to the left, numbers to the right."""
    if not rows:
        return ""
    names = list(rows[0])
    cells = [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(name), 3, *(len(row[n]) for row in cells)) for n, name in enumerate(names)]
    numbers = [all(isinstance(row[name], int | float) for row in rows) for name in names]
    columns = list(zip(widths, numbers, strict=True))

    def line(texts: list[str]) -> str:
        padded = [
            text.rjust(width) if right else text.ljust(width)
            for text, (width, right) in zip(texts, columns, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in columns]
    return "\n".join([line(names), line(rule), *map(line, cells)])


def profile(call: Callable[[], Any], times: int = 5) -> str:
    """Where some calls spend their time, by operation of torch: on the GPU where there is one."""
    cuda = torch.cuda.is_available()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with record(activities=kinds) as found:
        for _ in range(times):
            call()
    return found.key_averages().table(sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=12)


def finish(name: str, figures: dict[str, Any], ratios: dict[str, float]) -> None:
    """Print the machine, and last of all everything as one JSON line."""
    here = machine()
    print("machine: " + ", ".join(f"{key} {value}" for key, value in here.items()))
    print(json.dumps({"benchmark": name, "machine": here, "figures": figures, "ratios": ratios}), flush=True)


def _cell(value: Any) -> str:
    """Four digits of a number that has decimals; None as a dash."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def apart(work: Callable[..., None], *args: Any) -> Any:
    """Run ``work(*args, pipe)`` in a fresh process; what it sends through the pipe.

    Raises:
        RuntimeError: It ended without.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*args, there))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{work.__name__} ended with exit code {process.exitcode}; see above") from None
    finally:
        process.join()
