"""The whole tree of settings of a training run, and what it resolves to."""

from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import (
    Field,
    FieldSerializationInfo,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from pipeline import models
from pipeline.augment import AugmentSettings
from pipeline.config import Settings
from pipeline.datasets.dataset import DatasetInfo
from pipeline.errors import InputError
from pipeline.images.input_settings import InputSettings
from pipeline.losses import BoxLoss
from pipeline.models import ModelSettings, transfer
from pipeline.models.device import Compile, Precision
from pipeline.models.outputs import num_outputs
from pipeline.models.transfer import TransferSettings
from pipeline.storage import absolute
from pipeline.stream.run_stream import StreamSettings
from pipeline.tasks import TASKS
from pipeline.tasks.base import Task
from pipeline.tasks.build import build_task
from pipeline.tasks.detection import DetectionPredict
from pipeline.tasks.segmentation import SegmentationPredict
from pipeline.tasks.segmentation_loss import SegmentationLoss
from pipeline.training.optimizer import OptimSettings
from pipeline.uncertainty.calibration.settings import CalibrateSettings


@dataclass(frozen=True)
class Scale:
    """An optimiser step of a worker group, beside one of the group that was asked for."""

    accumulate: int
    """Batches that each worker accumulates."""
    images: int
    """Images of the optimiser step, over all workers."""
    ratio: float
    """``images`` over those of the group that was asked for."""
    lr: float
    """Factor of the learning rate."""


class LoopSettings(Settings):
    """How long a run is, on how many workers, and when it validates."""

    batch_size: int = Field(default=8, ge=1)
    """Images per worker and forward pass."""
    accumulate: int = Field(default=1, ge=1)
    """Forward passes per optimiser step."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training split; this or ``steps``."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps; this or ``epochs``."""
    validate_every: int | None = Field(default=None, ge=1)
    """Optimiser steps between validations; null = an epoch's worth."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many validations in a row without a fall of the validation loss by ``min_delta``."""
    min_delta: float = Field(default=0.0, ge=0)
    workers: int = Field(default=1, ge=1)
    """Data-parallel processes; with a GPU, one GPU each."""
    min_workers: int | None = Field(default=None, ge=1)
    """Elastic training: go on with so few workers where the cluster has no room for all, and with more once it has;
    null: wait for all of them."""
    elastic_batch: Literal["global", "local"] = "global"
    """With other than ``workers`` workers: keep the images of an optimiser step, by accumulating more batches (as
    nearly as whole batches allow), or those of a worker."""
    elastic_lr: Literal["linear", "sqrt", "none"] = "linear"
    """How the learning rate follows the images of an optimiser step where they change (linear: Goyal et al. 2017,
    1706.02677; sqrt: Krizhevsky 2014, 1404.5997)."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of a worker; null = its share of the machine's cores."""
    log_every: int = Field(default=10, ge=1)
    """Optimiser steps between lines of metrics.jsonl."""
    max_failures: int = Field(default=2, ge=0)
    """Restarts of the worker group before the run is given up."""
    precision: Precision = "auto"
    """Type of the network's arithmetic in training and validation; losses and weights are float32 always.
    ``auto``: bf16 on a GPU that
    has it."""
    compile: Compile = "auto"
    """Whether network and augmentation are compiled; ``auto``: on a GPU, in runs of a thousand steps and more."""
    sync_batch_norm: bool = False
    """Batch statistics over all workers; GPUs only."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        return self

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers = {self.min_workers} is more than workers = {self.workers}")
        return self

    def scaled(self, world: int) -> "Scale":
        """What an optimiser step is with ``world`` workers."""
        nominal = self.batch_size * self.accumulate * self.workers
        exact = self.accumulate * self.workers / world if self.elastic_batch == "global" else self.accumulate
        accumulate = max(1, round(exact))
        images = self.batch_size * accumulate * world
        power = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}[self.elastic_lr]
        return Scale(accumulate, images, images / nominal, (images / nominal) ** power)


class EnsembleSettings(Settings):
    """What happens to members whose training fails."""

    retries: int = Field(default=2, ge=0)
    """How often a member that failed is taken up again, from its last checkpoint."""
    min_members: int | None = Field(default=None, ge=1)
    """A bundle is made of so many members at least, and names those that failed; null: of all."""


class TrainConfig(Settings):
    """Everything that decides a run, except the data behind ``data``."""

    task: Literal["segmentation", "detection"]
    data: str
    """URI of a dataset made by ``dubito ingest``."""
    out: str
    """URI of the folder to write: config.json, members/, bundle/."""
    seed: int = 0
    model: ModelSettings
    """``name`` (see pipeline.models.MODELS) and that model's own settings."""
    transfer: TransferSettings = Field(default_factory=TransferSettings)
    """Where the first weights come from."""
    loss: SegmentationLoss | BoxLoss = Field(default={}, validate_default=True)
    """Segmentation: weight of each term by name. Detection: settings of its loss, and its ``name`` where the model
    can be trained by several."""
    input: InputSettings
    augment: AugmentSettings = Field(default_factory=AugmentSettings)
    optim: OptimSettings = Field(default_factory=OptimSettings)
    train: LoopSettings
    ensemble: EnsembleSettings = Field(default_factory=EnsembleSettings)
    stream: StreamSettings = Field(default_factory=StreamSettings)
    calibrate: CalibrateSettings = Field(default_factory=CalibrateSettings)
    predict: SegmentationPredict | DetectionPredict = Field(default={}, validate_default=True)
    """Settings of the task's predictions (both: tta, dropout_passes, uncertainty; segmentation: windows, maps...;
    detection: fuse, score_threshold, nms_iou, max_boxes)."""
    _written: dict[str, dict[str, Any]] = PrivateAttr(default_factory=dict)
    """``loss`` and ``predict`` as they were written, without defaults: that is how they are stored."""

    @field_validator("model", mode="before")
    @classmethod
    def _parse_model(cls, values: Any, info: ValidationInfo) -> ModelSettings:
        """The settings class that ``name`` tells, checked against the task."""
        settings = models.parse(_mapping(values), "model")
        # Where the task itself is wrong, pydantic reports that.
        task = info.data.get("task", settings.task)
        if settings.task != task:
            fitting = ", ".join(sorted(name for name, kind in models.MODELS.items() if kind.task == task))
            raise InputError(
                f"model '{values['name']}' is for {settings.task}, but task is {task}; choose one of {fitting}"
            )
        return settings

    @field_validator("loss", mode="before")
    @classmethod
    def _parse_loss(cls, values: Any, info: ValidationInfo) -> Any:
        """The loss of the task; of a detector, one that its model can be trained by."""
        values = _mapping(values)
        if "task" not in info.data or "model" not in info.data:
            return SegmentationLoss({})  # never seen: the error is that of the field that is missing
        return TASKS[info.data["task"]].parse_loss(_with_loss_name(values, info.data["model"]), "loss")

    @field_validator("predict", mode="before")
    @classmethod
    def _parse_predict(cls, values: Any, info: ValidationInfo) -> Any:
        """The settings of the task's predictions."""
        values = _mapping(values)
        if "task" not in info.data:
            return SegmentationPredict()  # never seen: the error is that of the field that is missing
        return TASKS[info.data["task"]].parse_predict(values, "predict")

    @model_validator(mode="wrap")
    @classmethod
    def _keep_written(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        config = handler(values)
        if isinstance(values, dict):
            loss = _with_loss_name(values.get("loss", {}), config.model)
            config._written = {"loss": loss, "predict": values.get("predict", {})}
        return config

    @field_serializer("model")
    def _describe_model(self, model: ModelSettings) -> dict[str, Any]:
        return models.describe(model)

    @field_serializer("loss", "predict")
    def _as_written(self, _: Any, info: FieldSerializationInfo) -> dict[str, Any]:
        # Runs and bundles keep these as they were written, so that a default that changes, or a number written 1 for
        # 1.0, does not make a run of before another run.
        return self._written[info.field_name]

    @model_validator(mode="after")
    def _weights_to_transfer(self) -> Self:
        transfer.check_transfer(self.transfer, pretrained=getattr(self.model, "encoder_weights", None) is not None)
        return self

    @model_validator(mode="after")
    def _blended_labels(self) -> Self:
        if self.task == "segmentation" and self.augment.mixup:
            raise ValueError("augment.mixup blends two images, and masks cannot be blended; set it to 0")
        return self

    @model_validator(mode="after")
    def _cached_frames(self) -> Self:
        if self.stream.cache == "decoded" and self.input.fit == "crop":
            raise ValueError(
                "stream.cache: decoded keeps one frame of each image, and input.fit: crop takes another window in "
                "every epoch; set cache to none, or fit to letterbox or stretch"
            )
        return self

    def model_for(self, info: DatasetInfo) -> ModelSettings:
        """The model's settings, with the class frequencies of the train split as its ``prior`` if it wants one."""
        settings = self.model
        pixels = info.counts.get("train", {}).get("pixels")
        if pixels is None or "prior" not in type(settings).model_fields or getattr(settings, "prior", None):
            return settings
        return settings.model_copy(update={"prior": tuple(float(max(count, 1)) for count in pixels.values())})

    def num_outputs(self, info: DatasetInfo) -> int:
        """Classes of this dataset that the model tells apart."""
        return num_outputs(self.task, info.classes, info.background)

    def build_task(self, info: DatasetInfo, threads: int, multiple: int = 32) -> Task:
        """The task over this dataset's classes; whole images are framed to a ``multiple`` of the model's stride.

        Raises:
            InputError: The dataset has no labels for this task.
        """
        if self.task not in info.tasks:
            raise InputError(
                f"'{info.uri}' has no labels for {self.task}; it can serve {', '.join(info.tasks) or 'no task'}"
            )
        return build_task(
            self.task,
            classes=list(info.classes),
            background=info.background,
            input=self.input,
            loss=self.loss,
            predict=self.predict,
            threads=threads,
            multiple=multiple,
        )

    def with_absolute_uris(self) -> Self:
        """``data`` and ``out`` as every process of a cluster can read them."""
        return self.model_copy(update={"data": absolute(self.data), "out": absolute(self.out)})

    def resolved(self) -> dict[str, Any]:
        """The tree as it is stored and compared: every default filled in, but ``loss`` and ``predict`` as written."""
        return self.to_dict()

    def length(self, rows: int) -> tuple[int, int]:
        """(stream positions of the whole run, images of one optimiser step) for a split of ``rows`` images."""
        global_batch = self.train.batch_size * self.train.accumulate * self.train.workers
        if self.train.steps is not None:
            return self.train.steps * global_batch, global_batch
        return max(1, round(rows * float(self.train.epochs or 0))), global_batch

    def num_steps(self, info: DatasetInfo) -> int:
        """Optimiser steps of the whole run."""
        end, global_batch = self.length(info.counts.get("train", {}).get("images", 0))
        return -(-end // global_batch)

    def passes(self, info: DatasetInfo) -> float:
        """Length of the whole run in passes over the train split."""
        rows = info.counts.get("train", {}).get("images", 0)
        return self.length(rows)[0] / max(1, rows)

    def validate_every(self, rows: int, global_batch: int) -> int:
        """Optimiser steps between validations, for a train split of ``rows`` images."""
        return self.train.validate_every or max(1, rows // global_batch)


def _mapping(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError("Input should be a valid dictionary")
    return values


def _with_loss_name(values: dict[str, Any], model: ModelSettings) -> dict[str, Any]:
    """``loss`` as written; of a detector with the name of its kind, the model's first where none is written."""
    fitting: tuple[str, ...] = getattr(model, "losses", ())
    # Models of segmentation name no losses: any fits them.
    if not fitting:
        return values
    name = values.get("name", fitting[0])
    if name not in fitting:
        raise InputError(
            f"loss.name: {name!r} does not fit model '{models.describe(model)['name']}', which is trained by "
            f"{' or '.join(fitting)}; leave loss.name out"
        )
    return {**values, "name": name}
