"""Training the members of an ensemble side by side, as many at once as there is room for; failed ones are retried."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from pipeline import storage
from pipeline.errors import one_line, root_input_error
from pipeline.runtime import progress, prometheus
from pipeline.training.member_run import MemberRun
from pipeline.training.train_config import TrainConfig

POLL_S = 0.5
"""Seconds between two looks at the members that are trained."""
TrainMember = Callable[[MemberRun], dict[str, Any]]
"""Trains one member to its end: ``pipeline.training.ray_train.train_member``, or what stands in for it in a test."""


def members_at_once(members: int, workers: int, cpus: float, gpus: float) -> int:
    """How many members are trained at a time: each takes ``workers`` CPUs (or GPUs), and a CPU for its data."""
    room = int(gpus // workers) if gpus >= workers else int(cpus // (workers + 1))
    return max(1, min(members, room))


@dataclass
class FailedMember:
    """A member that was given up, as the bundle's manifest lists it."""

    member: int
    seed: int
    error: str


class MemberScheduler:
    """Trains the members: each in a Ray task without a CPU of its own, which waits for the workers that it starts.

    A member that failed, or whose task, worker or node died, is taken up again from its last checkpoint: the folder of
    its run is its own.

    Args:
        config: Member k gets seed ``config.seed + k``.
        members: How many.
        steps: Optimiser steps of one member, for the progress shown.
        sink: Shows the progress of every member.
        train_member: Trains one.
    """

    def __init__(
        self, config: TrainConfig, members: int, steps: int, sink: progress.ProgressSink, train_member: TrainMember
    ) -> None:
        self.results: dict[int, dict[str, Any]] = {}
        """What ``train_member`` returned, by member."""
        self.failed: list[FailedMember] = []
        """Members that were given up."""
        self._config, self._members, self._steps, self._sink = config, members, steps, sink
        self._board = progress.start_board()
        self._recorder = prometheus.MetricsRecorder(prometheus.stage_tags("members"))
        self._task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="SPREAD")(train_member)
        self._waiting = list(range(members))
        self._failures = Counter[int]()
        self._running: dict[ray.ObjectRef, int] = {}

    def run(self) -> None:
        """Train until every member is done or given up.

        Raises:
            Exception: That of the member with which fewer than ``ensemble.min_members`` remain; an InputError at once.
        """
        while self._waiting or self._running:
            self._start()
            done, _ = ray.wait(list(self._running), timeout=POLL_S)
            self._show()
            for ref in done:
                self._collect(self._running.pop(ref), ref)
        self._show()

    def _start(self) -> None:
        """Start waiting members as far as there is room."""
        # The room is asked for each time: nodes come and go.
        resources, workers = ray.cluster_resources(), self._config.train.workers
        at_once = members_at_once(self._members, workers, resources.get("CPU", 1), resources.get("GPU", 0))
        threads = self._config.train.threads or max(1, (os.cpu_count() or 1) // (at_once * workers))
        while self._waiting and len(self._running) < at_once:
            member = self._waiting.pop(0)
            run = _member_run(self._config, member, self._members, threads, self._board)
            self._sink.update(run.stage, 0, self._steps, _retry_note(self._failures[member]), "steps")
            self._running[self._task.remote(run)] = member

    def _collect(self, member: int, ref: Any) -> None:
        """Keep a member's result; or put it into the queue again, or give it up."""
        try:
            self.results[member] = ray.get(ref)
        except Exception as error:
            # An error of the user's input comes again however often it is tried.
            if root_input_error(error) is not None:
                raise
            self._failures[member] += 1
            self._recorder.count("dubito_restarts_total", 1, "member")
            self._recorder.flush()
            if self._failures[member] <= self._config.ensemble.retries:
                self._waiting.append(member)
                return
            # Given up; with too few members left there will be no ensemble, so the rest is not trained either.
            min_members = self._config.ensemble.min_members or self._members
            self.failed.append(FailedMember(member, self._config.seed + member, one_line(error)))
            if self._members - len(self.failed) < min_members:
                raise

    def _show(self) -> None:
        """Hand the members' progress on to the sink."""
        stages: dict[str, Any] = ray.get(self._board.read.remote())
        for stage, update in sorted(stages.items()):
            self._sink.update(stage, *update)


def _retry_note(failures: int) -> str:
    return f"taken up again after {failures} failure(s)" if failures else ""


def _member_run(config: TrainConfig, member: int, members: int, threads: int, board: Any) -> MemberRun:
    stage = "train" if members == 1 else f"member {member}"
    return MemberRun(
        config={**config.to_dict(), "seed": config.seed + member},
        uri=storage.join(config.out, "members", str(member)),
        stage=stage,
        threads=threads,
        board=board,
        tensorboard=storage.join(config.out, "tensorboard", str(member)),
        tags=prometheus.stage_tags(stage),
    )
