"""Two workers give the gradient of one on both batches: every loss, both heads, uneven void and boxes."""

import socket
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from pipeline import losses
from pipeline.losses import LOSSES, total
from pipeline.models.anchor_free import AnchorFree
from pipeline.models.unet import UNet
from pipeline.schema import VOID

BOUNDARY = {"boundary": 2.0, "boundary_width": 1.5}
MIXES = {
    "multiclass": {
        "cross_entropy": {"weights": (1.0, 0.5, 2.0), "smoothing": 0.1, **BOUNDARY},
        "focal": {"weights": (1.0, 0.5, 2.0)},
        "dice": {},
        "tversky": {"gamma": 0.75, "skip": (2,)},
        "jaccard": {},
        "lovasz": {},
    },
    "binary": {name: BOUNDARY if name.endswith("cross_entropy") else {} for name in LOSSES},
}
CASES = (*MIXES, "detection")


def _case(task: str) -> tuple[torch.nn.Module, list[tuple[torch.Tensor, ...]]]:
    """A group-norm network and two uneven batches: one all void or box-less image, other padding."""
    torch.manual_seed(7)
    images = torch.randn(4, 3, 32, 32)
    if task in MIXES:
        classes = 3 if task == "multiclass" else 2
        model = UNet(width=4, depth=3, norm="group", stem=True, heads=True).build(classes)
        # A one-channel head, whatever makes it.
        model = model if task == "multiclass" else torch.nn.Sequential(model, torch.nn.Conv2d(2, 1, 1))
        target = torch.randint(0, classes, (4, 32, 32), dtype=torch.uint8)
        target[1, :20] = VOID
        target[0] = VOID
        return model, [(images[:2], target[:2]), (images[2:], target[2:])]
    model = AnchorFree(width=4, strides=(8, 16), norm="group").build(3)
    boxes = torch.tensor([[[2.0, 2, 20, 20], [10, 8, 30, 31], [0, 0, 0, 0]]]).repeat(2, 1, 1)
    labels = torch.tensor([[0, 2, -1], [1, 1, 1]])
    nothing = (torch.zeros(2, 1, 4), torch.full((2, 1), -1))
    return model, [(images[:2], *nothing), (images[2:], boxes, labels)]


def _terms(task: str, outputs, target: tuple[torch.Tensor, ...]):
    if task in MIXES:
        return {
            name: (1.0 + number / 7, *LOSSES[name](outputs, *target, **settings))
            for number, (name, settings) in enumerate(MIXES[task].items())
        }
    boxes, labels = target
    return losses.detection(outputs, boxes, labels)


def _counts(task: str, target: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    if task in MIXES:
        return {name: LOSSES[name].count(*target) for name in MIXES[task]}
    return losses.counts(target[1])


def _without_boxes() -> list[torch.Tensor | None]:
    """Gradients of a step in which no rank has a box."""
    model, shards = _case("detection")
    images, boxes, labels = shards[0]
    counts = losses.counts(labels)
    for count in counts.values():
        torch.distributed.all_reduce(count)
    terms = losses.detection(DistributedDataParallel(model)(images), boxes, labels)
    assert all(bool(value.isfinite()) for _, value, _ in terms.values())
    total(terms, counts, world_size=2).backward()
    return [p.grad for p in model.parameters()]


def _worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        for task in CASES:
            model, shards = _case(task)
            parallel = DistributedDataParallel(model)
            images, *target = shards[rank]
            counts = _counts(task, tuple(target))
            for count in counts.values():
                torch.distributed.all_reduce(count)
            total(_terms(task, parallel(images), tuple(target)), counts, world_size=2).backward()
            torch.save([p.grad for p in model.parameters()], f"{folder}/{task}-{rank}.pt")
        torch.save(_without_boxes(), f"{folder}/boxless-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def _union(task: str) -> list[torch.Tensor]:
    """Gradient of one worker on both batches at once, by autograd of the plain quotients."""
    model, shards = _case(task)
    images = torch.cat([shard[0] for shard in shards])
    if task in MIXES:
        target = (torch.cat([shard[1] for shard in shards]),)
    else:
        pads = [3 - shard[1].shape[1] for shard in shards]
        pairs = list(zip(shards, pads, strict=True))
        boxes = torch.cat([F.pad(shard[1], (0, 0, 0, pad)) for shard, pad in pairs])
        target = (boxes, torch.cat([F.pad(shard[2], (0, pad), value=-1) for shard, pad in pairs]))
    terms = _terms(task, model(images), target)
    torch.stack([weight * value / count for weight, value, count in terms.values()]).sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_the_gradient_of_two_workers_is_that_of_one_on_both_batches(tmp_path: Path):
    assert {name for mix in MIXES.values() for name in mix} == set(LOSSES)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(port, str(tmp_path)), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    for rank in range(2):
        for grad in torch.load(tmp_path / f"boxless-{rank}.pt", weights_only=True):
            assert grad is not None, "DDP would wait for ever"
            assert grad.isfinite().all()
    for task in CASES:
        wanted = _union(task)
        for rank in range(2):
            found = torch.load(tmp_path / f"{task}-{rank}.pt", weights_only=True)
            assert len(found) == len(wanted)
            scale = max(grad.abs().max().item() for grad in wanted)
            assert scale > 1e-3
            for a, b in zip(found, wanted, strict=True):
                assert (a - b).abs().max().item() <= 1e-5 * max(scale, 1.0)
