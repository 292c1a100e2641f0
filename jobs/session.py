"""What every job needs around it: a Ray session, a log for everything that is not its own output, and exit codes."""

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from jobs.submission import pinned_versions
from pipeline import environment
from pipeline.errors import DoneError, one_line, root_input_error
from pipeline.runtime import prometheus
from pipeline.runtime.json_log import job_output, run_of
from pipeline.runtime.progress import JobOutput, redirect_output
from pipeline.storage.retry import PROCESS_PATIENCE

THREAD_JOIN_S = 3.0
"""Seconds for which a thread of Ray Data is waited for when a session ends."""
_RAY_DATA_THREADS = ("StreamingExecutor", "Prefetcher", "iter_threaded")
"""How the names of Ray Data's threads begin."""
OBJECT_STORE_BYTES = 2 * 2**30
"""Object store of a local session, where a quarter of the memory is not less."""
RAY_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Ray Train takes one report at each of its health checks, every 2 s by default: so long would a validation wait.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment variables that a job sets for Ray, where the person did not set them otherwise."""


@contextlib.contextmanager
def ray_session(workers: int = 1) -> Iterator[None]:
    """A Ray session: the cluster at RAY_ADDRESS, else one on this machine.

    The local one counts two logical CPUs for each core: its stages wait for one another more than they compute, and
    consumers that hold every CPU would starve Ray Data.

    Args:
        workers: Training workers that the session must have CPUs for, besides two for reading.
    """
    # Before Ray is imported: it reads most of these variables then.
    environment.set_defaults(RAY_DEFAULTS)
    import ray

    if ray.is_initialized():  # the caller's session, which the caller ends
        yield
        return
    if environment.has_ray_address():
        ray.init(log_to_driver=False)
    else:
        cpus = max(2 * (os.cpu_count() or 1), 4, workers + 2)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        ray.init(
            address="local",  # never a cluster that somebody else started on this machine
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            object_store_memory=min(OBJECT_STORE_BYTES, memory // 4),
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        _join_ray_data_threads()
        ray.shutdown()


def _join_ray_data_threads() -> None:
    """Wait for Ray Data's threads: one that calls Ray after its end makes Ray end the process, without a message."""
    for thread in threading.enumerate():
        if thread.name.startswith(_RAY_DATA_THREADS) and thread is not threading.current_thread():
            thread.join(THREAD_JOIN_S)


@contextlib.contextmanager
def _report_sudden_end(verb: str, log: Path) -> Iterator[None]:
    """A second process that says so if this one ends without a message, as Ray makes a driver do whose raylet died.

    It waits for the end of its standard input: the word "done" comes from this process, and nothing if it died.
    """
    text = (
        f"dubito {verb}: ended from outside (Ray on this machine died, or a signal came); the same command goes on "
        f"(train and ensemble: --resume); the story so far is in {log}\n"
    )
    reporter = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _REPORTER, text], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        reporter.communicate(b"done")


_REPORTER = "import sys; sys.stdin.buffer.read() == b'done' or sys.stderr.write(sys.argv[1])"


def run_job(verb: str, story: Callable[[JobOutput], int | None], on_this_machine: bool = True) -> int:
    """Run a job's story; returns its exit code.

    Args:
        verb: The command's verb, for messages, log lines and metrics.
        story: What the job does, given its output; it may return an exit code.
        on_this_machine: The work is done here, not by a cluster that goes on without this process.

    Returns:
        0: done, or done already, or what the story returned; 1: the machine failed, and the message names the log;
        2: wrong input, said in one sentence; 130: interrupted.
    """
    log = Path("runs") / "logs" / f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    PROCESS_PATIENCE.shorten_first_wait()
    with (
        prometheus.CURRENT_RUN.named(verb, run_of(log)),
        _report_sudden_end(verb, log) if on_this_machine else contextlib.nullcontext(),
        redirect_output(log, job_output(verb)) as terminal,
    ):
        try:
            pinned_versions.require_pinned_versions()
            return story(terminal) or 0
        except DoneError as done:
            terminal.close()
            terminal.say(str(done))
            return 0
        except KeyboardInterrupt:
            hint = "; the same command goes on (train and ensemble: --resume)" if on_this_machine else ""
            terminal.fail(f"dubito {verb}: interrupted{hint}")
            return 130
        except Exception as error:
            # Ray wraps what a worker raises: an error of the person's input may lie deep inside.
            input_error = root_input_error(error)
            if input_error is not None:
                terminal.fail(f"dubito {verb}: {input_error}")
                return 2
            terminal.fail(f"dubito {verb}: {type(error).__name__}: {one_line(error)}", traceback.format_exc())
            return 1
