"""What every job needs around it: a Ray session, one place for its chatter, and exit codes."""

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

THREADS_END_S = 3.0
_OF_RAY_DATA = ("StreamingExecutor", "Prefetcher", "iter_threaded")
"""Names of threads."""
OBJECT_STORE_BYTES = 2 * 2**30
RAY_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Ray Train takes one report a look, every 2 s by itself: each validation of a short run would cost that.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment variables of a job, where it has no others."""


@contextlib.contextmanager
def ray_session(workers: int = 1) -> Iterator[None]:
    """A Ray session: the cluster at RAY_ADDRESS, else one on this machine.

    The local one counts two logical CPUs a core: its stages wait for one another more than they compute,
    and consumers that hold every CPU would starve Ray Data.
    """
    # Before Ray is imported: it reads most of these variables then.
    environment.set_defaults(RAY_DEFAULTS)
    import ray

    if ray.is_initialized():  # somebody's session, and theirs to end
        yield
        return
    if environment.has_ray_address():
        ray.init(log_to_driver=False)
    else:
        cpus = max(2 * (os.cpu_count() or 1), 4, workers + 2)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        ray.init(
            address="local",  # not a cluster that somebody else started on this machine
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
        _let_finish()
        ray.shutdown()


def _let_finish() -> None:
    """Wait for Ray Data's threads: one that asks Ray after its end makes Ray end the process, before a word is said."""
    for thread in threading.enumerate():
        if thread.name.startswith(_OF_RAY_DATA) and thread is not threading.current_thread():
            thread.join(THREADS_END_S)


@contextlib.contextmanager
def _last_word(verb: str, log: Path) -> Iterator[None]:
    """Somebody who speaks for this process if it ends without a word: Ray ends a driver whose raylet died."""
    text = (
        f"dubito {verb}: ended from outside (Ray on this machine died, or a signal came); the same command goes on "
        f"(train and ensemble: --resume); the story so far is in {log}\n"
    )
    speaker = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _SPEAK, text], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield
    finally:
        speaker.communicate(b"done")


_SPEAK = "import sys; sys.stdin.buffer.read() == b'done' or sys.stderr.write(sys.argv[1])"


def run_job(verb: str, story: Callable[[JobOutput], int | None], here: bool = True) -> int:
    """Run a job's story; returns its exit code.

    0 done (or done already, or what the story returns) · 1 the machine failed: where the log is · 2 wrong input: one
    sentence. ``here``: the work is done by this machine, not by a cluster that goes on without it.
    """
    log = Path("runs") / "logs" / f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    PROCESS_PATIENCE.shorten_first_wait()
    with (
        prometheus.CURRENT_RUN.named(verb, run_of(log)),
        _last_word(verb, log) if here else contextlib.nullcontext(),
        redirect_output(log, job_output(verb)) as terminal,
    ):
        try:
            pinned_versions.check()
            return story(terminal) or 0
        except DoneError as done:
            terminal.close()
            terminal.say(str(done))
            return 0
        except KeyboardInterrupt:
            goes_on = "; the same command goes on (train and ensemble: --resume)" if here else ""
            terminal.fail(f"dubito {verb}: interrupted{goes_on}")
            return 130
        except Exception as error:
            wrong = root_input_error(error)
            if wrong is not None:
                terminal.fail(f"dubito {verb}: {wrong}")
                return 2
            first = one_line(error)
            terminal.fail(f"dubito {verb}: {type(error).__name__}: {first}", traceback.format_exc())
            return 1
