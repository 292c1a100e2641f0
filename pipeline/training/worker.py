"""One data-parallel process: its model, optimiser, task and augmentation, and which rows it has trained on."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import models
from pipeline.augment import Augment
from pipeline.datasets.dataset import DatasetInfo
from pipeline.errors import InputError
from pipeline.images.batch import Batch
from pipeline.images.gpu_decode import DeviceDecoder
from pipeline.models import transfer
from pipeline.models.device import Compiled, autocast, to_device_channels_last, use_fused_kernels, wants_compile
from pipeline.stream import run_stream
from pipeline.tasks.base import Task
from pipeline.training import checkpoint
from pipeline.training.optimizer import Ema, build_optimizer
from pipeline.training.train_config import Scale, TrainConfig


@dataclass
class Worker:
    """Everything one data-parallel process holds."""

    config: TrainConfig
    info: DatasetInfo
    task: Task
    module: nn.Module
    """The bare network."""
    model: nn.Module
    """``module``, or DDP around it."""
    train_forward: Any
    """``model``, or its compiled call."""
    average: Ema | None
    """Exponential moving average of the weights, if asked for."""
    optimizer: torch.optim.Optimizer
    augment: Augment
    """Prepares training batches on the device, with random effects."""
    eval_augment: Augment
    """Prepares validation batches on the device, without random effects."""
    device: torch.device
    decoder: DeviceDecoder | None = None
    """Decodes on the device; None: the task's CPU threads do."""
    rank: int = 0
    world_size: int = 1
    ledger: run_stream.Ledger = field(default_factory=run_stream.Ledger)
    """Stream positions of the rows that this worker's optimiser steps have used."""

    @property
    def evaluated_module(self) -> nn.Module:
        """The bare module that is validated and bundled."""
        return self.module if self.average is None else self.average.module

    def forward_pass(self, model: Any, batch: Batch) -> Any:
        """Raw outputs of a model for a batch, in the run's precision."""
        with autocast(self.device, self.config.train.precision):
            return self.task.forward(model, batch)

    @property
    def scale(self) -> Scale:
        """Batches and images of an optimiser step, for a group of this many workers."""
        return self.config.train.scaled(self.world_size)


def build_worker(
    config: TrainConfig,
    info: DatasetInfo,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 1,
) -> Worker:
    """Model, optimiser, task and augmentation of one process; the same weights on every rank."""
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams and pinned memory that name no device use the current one

    # The model first, under a seed that all ranks share: they start from the same weights.
    checkpoint.seed_all(config.seed, 0)
    module = config.model_for(info).build(config.num_outputs(info))
    transfer.load_pretrained(config.transfer, module)
    module = to_device_channels_last(module, device)
    # The task again, now that the model's stride is known: it frames images to multiples of it.
    task = config.build_task(info, threads, multiple=int(module.stride))  # type: ignore[arg-type]
    if config.train.sync_batch_norm:
        if device.type == "cpu":
            raise InputError("train.sync_batch_norm needs GPUs; set it to false, or use the model's norm: group")
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)

    # From here on each rank draws its own random numbers, such as dropout's.
    checkpoint.seed_all(config.seed, rank + 1)
    device_ids = [device.index] if device.type == "cuda" else None
    model = DistributedDataParallel(module, device_ids=device_ids) if world_size > 1 else module
    compiles = wants_compile(device, config.train.compile, config.num_steps(info))
    # A two-stage detector reads numbers from its tensors on the way: compiling it gains nothing.
    compiles_model = compiles and not getattr(module, "takes_targets", False)
    worker = Worker(
        config=config, info=info, task=task, module=module, model=model,
        train_forward=Compiled(model) if compiles_model else model,
        average=Ema(module, config.optim.ema) if config.optim.ema else None,
        optimizer=build_optimizer(config.optim, module, models.backbone_layers(module)),
        augment=Augment(config.augment, config.input, config.seed, config.passes(info), compile=compiles),
        eval_augment=Augment(None, config.input, config.seed, compile=compiles),
        device=device, decoder=_decoder(config, device, threads), rank=rank, world_size=world_size,
    )  # fmt: skip
    use_fused_kernels(worker.optimizer, device)
    return worker


def _decoder(config: TrainConfig, device: torch.device, threads: int) -> DeviceDecoder | None:
    """The decoder on this device, if ``stream.decode`` asks for one or leaves the choice; None: the CPU decodes."""
    if config.stream.decode == "device" and device.type != "cuda":
        raise InputError(
            f"stream.decode: device wants a GPU in every worker, and this one has {device.type}; set it to host or auto"
        )
    on_device = device.type == "cuda" and config.stream.decode in ("auto", "device")
    return DeviceDecoder(device, threads) if on_device else None
