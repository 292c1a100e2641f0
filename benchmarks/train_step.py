"""How many images a second a training step takes: anchor_free beside torchvision's one-stage detectors.

    python -m benchmarks.train_step --size 640 --batch 16 --bf16 --compile
    python -m benchmarks.train_step --size 128 --batch 2 --steps 3 --device cpu

A step is forward, loss, backward and optimiser on made images that already lie on the device. The networks take
turns, a few steps each, so that a machine that slows down slows all of them; figures are medians over steps,
each timed from an idle device to an idle device. torchvision's networks run as their makers train them: a list of
images and of targets into the module in train mode, which gives the losses, and SGD. Their normalisation and
resizing are inside, set to the size that the images have. Weights are random: nothing is downloaded.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import losses
from pipeline.models.anchor_free import AnchorFree

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
            f"times {BASELINE}": base / middle if base else float("nan"),
            "peak GiB of a step": peaks[name] / 2**30 if device.type == "cuda" else float("nan"),
        })  # fmt: skip
    return rows


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=640, help="side of the square images in pixels, a multiple of 32")
    parser.add_argument("--batch", type=int, default=16, help="images a step")
    parser.add_argument("--boxes", type=int, default=8, help="objects an image")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda where there is one")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16, for all networks")
    parser.add_argument("--compile", action="store_true", help="torch.compile for anchor_free and its loss")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each network")
    parser.add_argument("--turn", type=int, default=5, help="steps before the next network's turn")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each network before the first timed one")
    parser.add_argument("--sizes", nargs="*", default=["s"], choices=("n", "s", "m"), help="sizes of anchor_free")
    parser.add_argument(
        "--against", nargs="*", default=[BASELINE, "retinanet_resnet50_fpn_v2"], help="torchvision's detectors"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Print the table, and return its rows."""
    args = parse(argv)
    cuda = torch.cuda.is_available()
    device = torch.device(args.device if args.device != "auto" else "cuda" if cuda else "cpu")
    torch.manual_seed(0)
    steps = {f"anchor_free {size}": ours(size, args, device) for size in args.sizes}
    steps |= {name: torchvisions(name, args, device) for name in args.against}
    rows = measure(steps, args, device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{where}, torch {torch.__version__}, {args.batch} images of {args.size}x{args.size}, {args.boxes} boxes each, "
        f"{'bf16' if args.bf16 else 'float32'}, anchor_free {'' if args.compile else 'not '}compiled"
    )
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(each if isinstance(each, str) else f"{each:.4g}" for each in row.values()) + " |")
    return rows


if __name__ == "__main__":
    main()
