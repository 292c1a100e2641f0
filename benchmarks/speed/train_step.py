"""How many images a second a training step takes: fed by the stream, on a batch that stays, beside torchvision's.

    python -m benchmarks.speed.train_step --bf16 --compile
    python -m benchmarks.speed.train_step --small

First U-Net r34 and anchor_free end to end (``benchmarks.speed.end_to_end``): the real stream, augmentation and step
against the same step on one augmented batch that lies on the device. Then anchor_free beside torchvision's one-stage
detectors on made images (--against without names leaves this out).

There, a step is forward, loss, backward and optimiser on made images that already lie on the device. The networks take
turns, a few steps each, so that a machine that slows down slows all of them; figures are medians over steps,
each timed from an idle device to an idle device. torchvision's networks run as their makers train them: a list of
images and of targets into the module in train mode, which gives the losses, and SGD. Their normalisation and
resizing are inside, set to the size that the images have. Weights are random: nothing is downloaded.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.speed import end_to_end, feed
from jobs.session import ray_session
from pipeline import losses
from pipeline.models.anchor_free import AnchorFree
from pipeline.models.device import pick_device

CLASSES = 80
BASELINE = "fcos_resnet50_fpn"
Step = Callable[[], Tensor]
"""One training step; the loss, not yet waited for."""


def targets(batch: int, size: int, number: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, size, size) float32, boxes (N, B, 4) xyxy of 1/16 to 1/2 of the side, labels (N, B)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator)
    sides = (torch.rand(batch, number, 2, generator=generator) * 7 + 1) / 16 * size
    corner = torch.rand(batch, number, 2, generator=generator) * (size - sides)
    labels = torch.randint(0, CLASSES, (batch, number), generator=generator)
    return images, torch.cat([corner, corner + sides], dim=-1), labels


def ours(size: str, args: argparse.Namespace, device: torch.device) -> Step:
    """A step of ``anchor_free`` of one size with the project's loss."""
    module = AnchorFree.parse({"size": size}, "--sizes").build(CLASSES)
    module = module.to(device).to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    images, boxes, labels = (tensor.to(device) for tensor in targets(args.batch, args.size, args.boxes))
    images = images.contiguous(memory_format=torch.channels_last)
    loss = losses.DetectionLoss()
    counts = loss.counts(labels, None)

    def forward(images: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            output = module(images)
        return losses.total(loss(output, boxes, labels, None), counts)

    run: Callable[..., Tensor] = torch.compile(forward) if args.compile else forward
    return lambda: _update(optimizer, run(images, boxes, labels))


def torchvisions(name: str, args: argparse.Namespace, device: torch.device) -> Step:
    """A step of one of torchvision's detectors in the form of its reference training."""
    from torchvision.models import detection

    module: nn.Module = getattr(detection, name)(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=args.size, max_size=args.size
    )
    module = module.to(device).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
    batch, boxes, labels = (tensor.to(device) for tensor in targets(args.batch, args.size, args.boxes))
    images = [image.mul(0.25).add(0.5) for image in batch]
    wanted = [{"boxes": box, "labels": label} for box, label in zip(boxes, labels, strict=True)]

    def step() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            terms = module(images, wanted)
            loss = torch.stack([term.float() for term in terms.values()]).sum()
        return _update(optimizer, loss)

    return step


def _update(optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def timed(step: Step, number: int, device: torch.device) -> list[float]:
    """Seconds of each of ``number`` steps, the device idle before and after each."""
    seconds: list[float] = []
    for _ in range(number):
        _wait(device)
        began = time.perf_counter()
        step()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(steps: dict[str, Step], args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each network: turns of ``args.turn`` steps until each has taken ``args.steps``."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, 0)
    rows: list[dict[str, Any]] = []
    for name, step in steps.items():
        print(f"warming up {name}", flush=True)
        timed(step, args.warmup, device)
    while any(len(found) < args.steps for found in seconds.values()):
        for name, step in steps.items():
            held = 0
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)  # of all networks; what a step adds is its own
            seconds[name] += timed(step, min(args.turn, args.steps - len(seconds[name])), device)
            if device.type == "cuda":
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device) - held)
    base = statistics.median(seconds[BASELINE]) if BASELINE in seconds else None
    for name, found in seconds.items():
        middle = statistics.median(found)
        quarter = statistics.quantiles(found, n=4) if len(found) > 1 else [middle] * 3
        rows.append({
            "network": name, "img/s": args.batch / middle, "ms/step": 1e3 * middle,
            "quartiles ms": f"{1e3 * quarter[0]:.1f} to {1e3 * quarter[2]:.1f}",
            f"times {BASELINE}": base / middle if base else None,
            "peak GiB of a step": peaks[name] / 2**30 if device.type == "cuda" else None,
        })  # fmt: skip
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="under two minutes on two CPU cores; sets what follows")
    parser.add_argument("--size", type=int, default=640, help="side of the made images in pixels, a multiple of 32")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--boxes", type=int, default=8, help="objects an image")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda where there is one")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16, for all networks")
    parser.add_argument("--compile", action="store_true", help="torch.compile for this project's networks")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each network beside torchvision's")
    parser.add_argument("--turn", type=int, default=5, help="steps before the next side's turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each side before the first timed one")
    parser.add_argument("--sizes", nargs="*", default=["s"], choices=("n", "s", "m"), help="sizes of anchor_free")
    parser.add_argument(
        "--against", nargs="*", default=[BASELINE, "retinanet_resnet50_fpn_v2"], help="torchvision's detectors"
    )
    whole = parser.add_argument_group("end to end")
    whole.add_argument("--models", nargs="*", default=list(end_to_end.MODELS), choices=list(end_to_end.MODELS))
    whole.add_argument("--images", type=Path, help="folder of photographs to cut the images out of")
    whole.add_argument("--count", type=int, default=1000, help="distinct images")
    whole.add_argument("--picture", default="500x375", help="their width x height")
    whole.add_argument("--input", type=int, default=512, help="side of the network's input")
    whole.add_argument("--rounds", type=int, default=10, help="turns of each side")
    whole.add_argument("--decode", default="auto", choices=("auto", "device", "host", "cluster"))
    whole.add_argument("--cache", default="none", choices=("none", "decoded"))
    whole.add_argument("--prefetch", type=int, default=2, help="batches decoded ahead")
    args = parser.parse_args(argv)
    if args.small:
        vars(args).update(size=64, batch=2, steps=4, turn=2, warmup=1, against=args.against[:1])
        vars(args).update(count=24, input=96, rounds=3)
    return args


def whole(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], dict[str, float]]:
    """Figures and ratios of the models end to end; prints their table."""
    if not args.models:
        return {}, {}
    more = {"size": args.input, "precision": "bf16" if args.bf16 else "auto"}
    inner = argparse.Namespace(**(vars(args) | more))
    width, height = (int(part) for part in args.picture.split("x"))
    with tempfile.TemporaryDirectory() as folder, ray_session():
        uri = end_to_end.make_dataset(Path(folder), feed.photographs(args.images), (width, height), args.count)
        rows, figures, ratios = end_to_end.measure(uri, inner, device)
    print(f"training, {args.batch} images of {args.picture} a step, framed to {args.input}x{args.input}")
    print(harness.table(rows))
    return figures, ratios


def beside_torchvision(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], dict[str, float]]:
    """Figures and ratios of anchor_free beside torchvision's detectors; prints their table."""
    if not args.against:
        return {}, {}
    steps = {f"anchor_free {size}": ours(size, args, device) for size in args.sizes}
    steps |= {name: torchvisions(name, args, device) for name in args.against}
    rows = measure(steps, args, device)
    print(
        f"steps on {args.batch} images of {args.size}x{args.size}, {args.boxes} boxes each, "
        f"{'bf16' if args.bf16 else 'float32'}, anchor_free {'' if args.compile else 'not '}compiled"
    )
    print(harness.table(rows))
    ratio = f"times {BASELINE}"
    ratios = {f"{row['network']}: {ratio}": row[ratio] for row in rows if row[ratio] and row["network"] != BASELINE}
    return {row["network"]: {"img_s": row["img/s"], "ms_a_step": row["ms/step"]} for row in rows}, ratios


def main(argv: list[str] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Print the tables and the JSON line; returns its figures and ratios."""
    args = parse(argv)
    device = pick_device(args.device)
    torch.manual_seed(0)
    figures, ratios = whole(args, device)
    more, others = beside_torchvision(args, device)
    harness.finish("train_step", figures | more, ratios | others)
    return figures | more, ratios | others


if __name__ == "__main__":
    main()
