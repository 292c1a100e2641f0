"""Augmentation of image, mask and boxes together: ours, Kornia's AugmentationSequential and torchvision's v2.

    python -m benchmarks.speed.augment [--small] [--images FOLDER] [--device auto]

From uint8 canvases with masks and boxes, on the device, to normalised float32 images with moved masks and boxes. All
sides flip, rotate, shift, scale, and change brightness, contrast, saturation and hue within the same bounds (preset
``natural``). Rivals: outside the image they leave black and class 0, not the mean colour and void, and they drop no
box of which nothing is left; both saves them work.

Differences are those of the geometry: all sides get the same parameters, colours stay, and what lies near the edge of
the image is left out. Pixels on the 0..255 scale, masks as the share of equal pixels, sides of boxes in pixels (Kornia
mirrors boxes as if their sides were pixels, so they end up to one pixel further left). Colours differ by definition:
Kornia and torchvision turn hue and saturation in HSV, and torchvision multiplies by the brightness.
"""

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from benchmarks import harness
from pipeline.augment import PRESETS, Augment, draw_parameters
from pipeline.augment.geometry import affine_parameters
from pipeline.images.batch import Batch
from pipeline.images.input_settings import InputSettings
from pipeline.models.device import pick_device

BOXES = 12
OURS, KORNIA, TORCHVISION = "dubito", "Kornia AugmentationSequential", "torchvision v2"
NATURAL = PRESETS["natural"]
GEOMETRY = NATURAL.model_copy(update={"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0})

Side = Callable[[Batch], Any]
"""One batch: images, masks and boxes come out."""


def kornia_sequence(input: InputSettings, colours: str = "ColorJiggle") -> Any:
    """Kornia's own composition of the same operations."""
    from kornia import augmentation as K

    s = NATURAL
    colour = {
        "ColorJiggle": [K.ColorJiggle(s.brightness, s.contrast, s.saturation, s.hue, p=1.0)],
        "four classes": [
            K.RandomBrightness((1 - s.brightness, 1 + s.brightness), p=1.0),
            K.RandomContrast((1 - s.contrast, 1 + s.contrast), p=1.0),
            K.RandomSaturation((1 - s.saturation, 1 + s.saturation), p=1.0),
            K.RandomHue((-s.hue, s.hue), p=1.0),
        ],
    }[colours]
    return K.AugmentationSequential(
        K.RandomHorizontalFlip(p=s.hflip),
        K.RandomAffine(s.rotate, (s.translate, s.translate), s.scale, p=1.0),
        *colour,
        K.Normalize(torch.tensor(input.mean), torch.tensor(input.std)),
        data_keys=["input", "mask", "bbox_xyxy"],
    )


def run_kornia(sequence: Any, batch: Batch, params: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """Whole batches; a draw of its own for each image."""
    images, masks = batch.images.float().mul_(1 / 255), batch.masks[:, None].float()
    images, masks, boxes = sequence(images, masks, batch.boxes, params=params)
    return images, masks[:, 0].to(torch.uint8), boxes


def torchvision_transforms(input: InputSettings) -> Any:
    """The composition of torchvision, which draws once a call, so it is called once an image."""
    from torchvision.transforms import v2
    from torchvision.tv_tensors import Image as Picture

    s = NATURAL
    return v2.Compose([
        v2.RandomHorizontalFlip(s.hflip),
        v2.RandomAffine(s.rotate, (s.translate, s.translate), s.scale, interpolation=v2.InterpolationMode.BILINEAR),
        v2.ColorJitter(s.brightness, s.contrast, s.saturation, s.hue),
        v2.ToDtype({Picture: torch.float32, "others": None}, scale=True),
        v2.Normalize(input.mean, input.std),
    ])  # fmt: skip


def run_torchvision(transforms: Any, batch: Batch, pool: ThreadPoolExecutor | None) -> tuple[Tensor, Tensor, Tensor]:
    """One image after another, or several at a time in threads."""
    from torchvision import tv_tensors

    size = (batch.images.shape[-2], batch.images.shape[-1])

    def one(row: tuple[Tensor, Tensor, Tensor]) -> Any:
        image, mask, boxes = row
        wrapped = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
        return transforms(tv_tensors.Image(image), tv_tensors.Mask(mask), wrapped)

    rows = zip(batch.images, batch.masks, batch.boxes, strict=True)
    images, masks, boxes = zip(*(map(one, rows) if pool is None else pool.map(one, rows)), strict=True)
    return torch.stack(images), torch.stack(masks), torch.stack(boxes)


def settings(input: InputSettings, args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, Side]]:
    """Side -> setting -> how it is run; each at every size of batch, and the best of all takes part."""
    sequences = {colours: kornia_sequence(input, colours).to(device) for colours in ("ColorJiggle", "four classes")}
    if device.type == "cuda" and not args.small:
        sequences["torch.compile"] = torch.compile(sequences["ColorJiggle"])
    transforms, cores = torchvision_transforms(input), harness.machine()["cores"]
    pools = {"": None, f"{cores} threads": ThreadPoolExecutor(cores)}
    return {
        OURS: {"": Augment(NATURAL, input)},
        KORNIA: {name: functools.partial(run_kornia, sequence) for name, sequence in sequences.items()},
        TORCHVISION: {name: functools.partial(run_torchvision, transforms, pool=pool) for name, pool in pools.items()},
    }


def photographs(folder: Path | None, count: int, side: int) -> Tensor:
    """(count, 3, side, side) uint8: distinct crops of a folder's images; of none, noise as smooth as photographs."""
    random = np.random.default_rng(0)
    if folder is None:
        coarse = torch.from_numpy(random.uniform(0, 255, (8, 3, side // 8, side // 8)).astype(np.float32))
        sources = list(interpolate(coarse, scale_factor=16, mode="bicubic").clamp(0, 255).byte())
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[:100]
        sources = [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in paths]
    out = torch.empty(count, 3, side, side, dtype=torch.uint8)
    for n in range(count):
        source = sources[n % len(sources)]
        height, width = (int(random.uniform(0.5, 1) * length) for length in source.shape[1:])
        top, left = (int(random.uniform(0, a - b)) for a, b in zip(source.shape[1:], (height, width), strict=True))
        crop = source[None, :, top : top + height, left : left + width]
        out[n] = interpolate(crop, (side, side), mode="bilinear", antialias=True)[0]
    return out


def label(images: Tensor, device: torch.device) -> Batch:
    """The images on the device as one batch, with masks and boxes of ellipses."""
    random = np.random.default_rng(1)
    count, side = len(images), images.shape[-1]
    grid = torch.arange(side) + 0.5
    corners = np.sort(random.uniform(0, side, (count, BOXES, 2, 2)), axis=2).reshape(count, BOXES, 4)
    boxes = torch.from_numpy(corners).float()
    masks = torch.zeros(count, side, side, dtype=torch.uint8)
    for n, k in itertools.product(range(count), range(BOXES)):
        x1, y1, x2, y2 = boxes[n, k]
        x, y = (grid - (x1 + x2) / 2) / (x2 - x1) * 2, (grid - (y1 + y2) / 2) / (y2 - y1) * 2
        masks[n][x[None] ** 2 + y[:, None] ** 2 < 1] = k + 1
    rows = torch.arange(count)
    return Batch(
        [str(n) for n in range(count)], images, masks, boxes, (torch.arange(BOXES) + 1).repeat(count, 1),
        torch.zeros(count, BOXES, dtype=torch.bool), torch.eye(3).repeat(count, 1, 1),
        torch.full((count, 2), side), torch.zeros_like(rows), rows,
    ).to(device)  # fmt: skip


def batches(whole: Batch, size: int) -> list[Batch]:
    """Whole batches of ``size``, without a copy."""
    fields = {name: value for name, value in vars(whole).items() if value is not None}
    parts = [slice(start, start + size) for start in range(0, len(whole) - size + 1, size)]
    return [dataclasses.replace(whole, **{name: value[some] for name, value in fields.items()}) for some in parts]


def turn(side: Side, given: list[Batch], seconds: float) -> float:
    """Images a second over whole batches for about ``seconds``; a GPU may run 16 of them behind the clock."""
    cuda = given[0].images.is_cuda
    ahead = 16 if cuda else 1
    if cuda:
        torch.cuda.synchronize()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for batch in given[:ahead]:
            side(batch)
            done += len(batch)
        given = given[ahead:] + given[:ahead]
        if cuda:
            torch.cuda.synchronize()
    return done / (time.perf_counter() - start)


def tuned(
    sides: dict[str, dict[str, Side]], given: dict[int, list[Batch]], args: argparse.Namespace
) -> tuple[dict[str, Callable[[], float]], dict[str, str]]:
    """Run every setting of every side at every size of batch; the best of each, and what it is."""
    turns, chosen = {}, {}
    for name, choices in sides.items():
        rates: dict[str, tuple[float, Callable[[], float]]] = {}
        for (setting, side), (size, some) in itertools.product(choices.items(), given.items()):
            label = f"{setting}, batch {size}".removeprefix(", ")
            try:
                side(some[0])
                rate = max(turn(side, some, args.seconds / 20) for _ in range(2))
            except Exception as error:  # a rival's setting that cannot run here takes no part
                if name == OURS:
                    raise
                print(f"  {name}, {label}: does not run: {str(error).splitlines()[0][:100]}")
                continue
            rates[label] = rate, functools.partial(turn, side, some, args.seconds / args.rounds)
            print(f"  {name}, {label}: {rate:.0f} img/s", flush=True)
        chosen[name] = max(rates, key=lambda label: rates[label][0])
        turns[name] = rates[chosen[name]][1]
    return turns, chosen


def moved_by_kornia(batch: Batch, drawn: dict[str, np.ndarray], input: InputSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Kornia's sequence with our parameters and colours that stay."""
    sequence = kornia_sequence(input).to(batch.images.device)
    items = sequence.forward_parameters(batch.images.shape)
    values = {name: torch.from_numpy(np.asarray(value, np.float64)).float() for name, value in drawn.items()}
    canvas = (batch.images.shape[-2], batch.images.shape[-1])
    items[0].data["batch_prob"] = values["hflip"]
    items[1].data.update(affine_parameters(values, canvas, canvas))
    for name in ("brightness_factor", "contrast_factor", "saturation_factor"):
        items[2].data[name] = torch.ones(len(batch))
    items[2].data["hue_factor"] = torch.zeros(len(batch))
    return run_kornia(sequence, batch, items)


def moved_by_torchvision(
    batch: Batch, drawn: dict[str, np.ndarray], input: InputSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """The functions of torchvision with our parameters."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    size, rows = (batch.images.shape[-2], batch.images.shape[-1]), []
    for n in range(len(batch)):
        wrapped = tv_tensors.BoundingBoxes(batch.boxes[n], format="XYXY", canvas_size=size)
        given = tv_tensors.Image(batch.images[n].float() / 255), tv_tensors.Mask(batch.masks[n]), wrapped
        shift = (drawn["translate"][n] * [size[1], size[0]]).tolist()
        affine = {"angle": drawn["angle"][n], "translate": shift, "scale": drawn["scale"][n], "shear": [0.0, 0.0]}
        row = []
        for each in given:
            each = F.horizontal_flip(each) if drawn["hflip"][n] else each
            nearest = isinstance(each, tv_tensors.Mask)
            mode = InterpolationMode.NEAREST if nearest else InterpolationMode.BILINEAR
            row.append(F.affine(each, **affine, interpolation=mode))
        rows.append((F.normalize(row[0], list(input.mean), list(input.std)), *row[1:]))
    images, masks, boxes = zip(*rows, strict=True)
    return torch.stack(images), torch.stack(masks), torch.stack(boxes)


def difference(
    batch: Batch, input: InputSettings, moved: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> dict[str, float]:
    """Our geometry against a rival's, wherever the pixel and its neighbours come from inside the image."""
    ours = Augment(GEOMETRY, input)
    out = ours(batch)
    images, masks, boxes = moved(batch, draw_parameters(GEOMETRY, 0, batch.epochs, batch.positions), input)
    inside = ours(dataclasses.replace(batch, masks=torch.zeros_like(batch.masks))).masks == 0
    inside = avg_pool2d(inside.float()[:, None], 5, 1, 2) > 0.99  # and every neighbour is
    std = torch.tensor(input.std, device=images.device)[:, None, None]
    far = ((images - out.images) * std * 255).abs()[inside.expand_as(images)]
    kept, size = out.labels >= 0, images.shape[-1]
    return {
        "mean": float(far.mean()), "max": float(far.max()),
        "masks_equal": float((masks == out.masks)[inside[:, 0]].float().mean()),
        "boxes_max": float((boxes.clamp(0, size) - out.boxes).abs()[kept].max()),
        "inside": float(inside.float().mean()),
    }  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of photographs; default: smooth noise")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--side", type=int, default=512, help="side of the square images in pixels")
    parser.add_argument("--count", type=int, help="distinct images (1024; small: 32)")
    parser.add_argument("--batch", type=int, nargs="+", help="sizes of batches to try (4 16 64; small: 4 16)")
    parser.add_argument("--seconds", type=float, help="seconds of each side in all its turns (60; small: 9)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--profile", action="store_true", help="print where our call spends its time")
    parser.add_argument("--small", action="store_true", help="under 2 minutes on 2 cores")
    args = parser.parse_args(argv)
    whole = {"count": (1024, 32), "batch": ([4, 16, 64], [4, 16]), "seconds": (60.0, 9.0)}
    for name, values in whole.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.small])
    return args


def main(argv: list[str] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Print the table and the JSON line; return figures and ratios."""
    args = parse(argv)
    device, input = pick_device(args.device), InputSettings(size=(args.side, args.side))
    whole = label(photographs(args.images, args.count, args.side), device)
    given = {size: batches(whole, size) for size in args.batch if size <= args.count}
    sides = settings(input, args, device)
    print(f"{args.count} images of {args.side} x {args.side} with a mask and {BOXES} boxes on {device}; settings:")
    turns, chosen = tuned(sides, given, args)
    rates = {name: harness.spread(values) for name, values in harness.in_turns(turns, args.rounds).items()}
    check = given[min(given)][0]
    moved = {KORNIA: moved_by_kornia, TORCHVISION: moved_by_torchvision}
    far = {name: difference(check, input, by_rival) for name, by_rival in moved.items()}
    figures, rows = {}, []
    for name, rate in rates.items():
        figures[name] = {"img/s": rate, "setting": chosen[name], "geometry": far.get(name)}
        unlike = far.get(name, dict.fromkeys(("mean", "max", "masks_equal", "boxes_max")))
        rows.append({
            "side": name, "img/s": rate[0], "quartiles": f"{rate[1]:.0f} to {rate[2]:.0f}",
            "ratio": rates[OURS][0] / rate[0], "pixels, mean": unlike["mean"], "pixels, max": unlike["max"],
            "masks equal": unlike["masks_equal"], "boxes, max": unlike["boxes_max"], "setting": chosen[name],
        })  # fmt: skip
    print(harness.table(rows))
    if args.profile:
        print(harness.profile(functools.partial(sides[OURS][""], given[max(given)][0])))
    ratios = {f"images / {name}": rates[OURS][0] / rates[name][0] for name in (KORNIA, TORCHVISION)}
    harness.finish("augment", figures, ratios)
    return figures, ratios


if __name__ == "__main__":
    main()
