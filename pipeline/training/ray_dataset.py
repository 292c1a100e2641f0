"""The rows that remain of a training run, as one Ray Dataset, split over the workers that there are."""

from typing import Any

import ray.data
import ray.train

from pipeline.datasets.dataset import open_dataset, row_groups
from pipeline.stream import epoch_order, run_stream
from pipeline.stream.frame_cache import FrameRows
from pipeline.training import checkpoint
from pipeline.training.member_run import MemberRun


def training_dataset(run: MemberRun, world_size: int | None = None) -> ray.data.Dataset:
    """All rows that remain of the run, as of the checkpoint that the workers will get.

    Args:
        run: The member's run.
        world_size: Number of workers; None: as many as the config asks for.
    """
    config = run.settings()
    info = open_dataset(config.data)
    groups = row_groups(info, "train")
    order = epoch_order.EpochOrder.of(groups, config.seed, config.stream.window_mb * 2**20)
    # The ledger of the checkpoint decides what remains: it holds the rows that the restored weights have learned from.
    start = checkpoint.latest(run.uri)
    ledger = checkpoint.read_ledger(start) if start else run_stream.Ledger()
    end, _ = config.length(order.rows)
    return run_stream.dataset(
        order,
        epoch_order.plan_remaining_rows(ledger, end, config.train.scaled(world_size or config.train.workers).images),
        ledger,
        run_stream.training_columns(config.task, info),
        config.train.batch_size,
        start.rsplit("/", 1)[-1] if start else "",
        FrameRows(config.input, config.seed) if config.stream.frames else None,
        cached=config.stream.cache == "decoded",
    )


class RemainingRowsConfig(ray.train.DataConfig):
    """Splits what remains of the run over the workers that there are.

    Ray calls a dataset's factory before it knows the number of workers, and ``configure`` once it does, at each start
    of the group.
    """

    def __init__(self, run: MemberRun) -> None:
        super().__init__(["train"], ray.data.ExecutionOptions(preserve_order=True))
        self._run = run

    def configure(self, datasets: dict[str, Any], world_size: int, *args: Any, **kwargs: Any) -> Any:
        """An iterator of each dataset for each worker, as Ray asks for it; ``datasets`` is replaced."""
        return super().configure({"train": training_dataset(self._run, world_size)}, world_size, *args, **kwargs)
