"""Losses: closed-form values, void and box-less batches, half precision, and the law of sums and counts."""

import math
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import generalized_box_iou_loss

from pipeline import losses
from pipeline.losses import LOSSES, DetectionLoss, total
from pipeline.losses.assign import assign, candidates, iou_matrix
from pipeline.losses.detection import _giou
from pipeline.models import DetectionOutput
from pipeline.models.anchor_free import AnchorFree, grid_centres
from pipeline.models.unet import UNet
from pipeline.schema import VOID


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(n: int = 3, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, classes, 8, 9) and a target with void; the last image is all void."""
    logits = torch.randn(n, classes, 8, 9, generator=generator())
    target = torch.randint(0, classes, (n, 8, 9), generator=generator(), dtype=torch.uint8)
    target[:, 2:4] = VOID
    target[-1] = VOID
    return logits, target


# --- segmentation


def test_cross_entropy_is_torchs_mean_over_labelled_pixels():
    logits, target = scene()
    value, count = LOSSES["cross_entropy"](logits, target)
    assert count.item() == 2 * 6 * 9
    wanted = F.cross_entropy(logits, target.long(), ignore_index=VOID)
    torch.testing.assert_close(value / count, wanted)


def test_focal_follows_its_formula_and_is_cross_entropy_at_gamma_0():
    logits, target = scene()
    plain, _ = LOSSES["cross_entropy"](logits, target)
    torch.testing.assert_close(LOSSES["focal"](logits, target, gamma=0.0)[0], plain)
    one = torch.tensor([[0.0, math.log(3.0)]])[:, :, None, None]
    value, count = LOSSES["focal"](one, torch.ones(1, 1, 1, dtype=torch.uint8), gamma=2.0)
    assert (value / count).item() == pytest.approx(-(0.25**2) * math.log(0.75), rel=1e-5)


def test_dice_by_hand():
    # One image, four pixels, p(class 1) = .25 .75 .75 and a void one; truth 0 1 0.
    p = torch.tensor([0.25, 0.75, 0.75, 0.9])
    logits = torch.stack([(1 - p).log(), p.log()])[None, :, None, :]
    target = torch.tensor([[[0, 1, 0, VOID]]], dtype=torch.uint8)
    value, count = LOSSES["dice"](logits, target, smooth=0.0)
    one = 2 * 0.75 / (1.75 + 1)
    zero = 2 * (0.75 + 0.25) / (1.25 + 2)
    assert count.item() == 1
    assert value.item() == pytest.approx(1 - (one + zero) / 2, rel=1e-5)
    assert LOSSES["dice"](logits, target, smooth=0.0, skip=(0,))[0].item() == pytest.approx(1 - one, rel=1e-5)


def test_dice_is_per_image():
    logits, target = scene(4)
    whole = LOSSES["dice"](logits, target)
    parts = [LOSSES["dice"](logits[i : i + 1], target[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(whole[0], torch.stack([value for value, _ in parts]).sum())
    assert whole[1].item() == sum(count.item() for _, count in parts) == 3


@pytest.mark.parametrize("name", LOSSES)
def test_perfect_is_near_zero_and_worse_is_more(name):
    _, target = scene()
    truth = F.one_hot(target.long().clamp(max=3), 4).movedim(-1, 1).float()
    value = [float(LOSSES[name](truth * scale, target)[0]) for scale in (30.0, 3.0, 0.0, -3.0)]
    assert value[0] < 1e-3
    assert value == sorted(value)


@pytest.mark.parametrize("name", LOSSES)
def test_void_pixels_change_nothing(name):
    logits, target = scene()
    other = torch.where((target == VOID)[:, None], torch.randn(logits.shape) * 9, logits)
    first, second = LOSSES[name](logits, target), LOSSES[name](other, target)
    torch.testing.assert_close(first, second)
    logits.requires_grad_()
    LOSSES[name](logits, target)[0].backward()
    assert logits.grad is not None
    assert (logits.grad.movedim(1, -1)[target == VOID] == 0).all()
    assert (logits.grad.movedim(1, -1)[target != VOID] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_an_all_void_batch_gives_a_finite_zero_with_gradient(name, dtype):
    logits = (torch.randn(2, 4, 8, 8) * 50).to(dtype).requires_grad_()
    target = torch.full((2, 8, 8), VOID, dtype=torch.uint8)
    value, count = LOSSES[name](logits, target)
    loss = total({name: (1.0, value, count)}, {name: count})
    loss.backward()
    assert (value.item(), count.item(), loss.item()) == (0, 0, 0)
    assert logits.grad is not None
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_sums_do_not_overflow(name, dtype):
    # 512 x 512 pixels of a loss near 20: the plain sum is 5e6, beyond float16.
    target = torch.zeros(1, 512, 512, dtype=torch.uint8)
    logits = torch.zeros(1, 2, 512, 512, dtype=dtype)
    logits[:, 1] = 20.0
    logits.requires_grad_()
    value, count = LOSSES[name](logits, target)
    (value / count).backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_match_finite_differences_and_counts_need_no_logits(name):
    logits, target = scene(2, 3)
    sample = logits[:, :, :3, :3].clone().requires_grad_()
    part = target[:, :3, :3].contiguous()
    assert LOSSES[name](sample, part)[1] == LOSSES[name].count(part)
    grad = torch.autograd.grad(LOSSES[name](sample, part)[0], sample)[0]
    step = torch.randn(sample.shape, generator=generator(3)) * 1e-2
    with torch.no_grad():
        slope = LOSSES[name](sample + step, part)[0] - LOSSES[name](sample - step, part)[0]
    assert (grad * step).sum().item() == pytest.approx(slope.item() / 2, rel=2e-2)


# --- the arithmetic that joins terms


def test_total_divides_each_term_by_its_own_count():
    terms = {
        "a": (2.0, torch.tensor(6.0), torch.tensor(1.0)),
        "b": (1.0, torch.tensor(5.0), torch.tensor(1.0)),
    }
    counts = {"a": torch.tensor(4.0), "b": torch.tensor(10.0)}
    assert total(terms, counts).item() == pytest.approx(2 * 6 / 4 + 5 / 10)
    assert total(terms, counts, world_size=3).item() == pytest.approx(3 * (2 * 6 / 4 + 5 / 10))


def test_a_term_without_count_is_zero_with_gradient():
    value = torch.tensor(3.0, requires_grad=True)
    loss = total({"a": (1.0, value, torch.tensor(0.0))}, {"a": torch.tensor(0.0)}, world_size=2)
    loss.backward()
    assert loss.item() == 0
    assert value.grad is not None
    assert value.grad.item() == 0


def test_class_weights_scale_the_pixels_of_their_class():
    logits, target = scene()
    parts = [torch.where(target == c, target, torch.full_like(target, VOID)) for c in range(4)]
    weights = [0.5, 1.0, 2.0, 0.0]
    each = [LOSSES["cross_entropy"](logits, part)[0] for part in parts]
    wanted = sum(w * value.item() for w, value in zip(weights, each, strict=True))
    value, count = LOSSES["cross_entropy"](logits, target, weights=weights)
    assert value.item() == pytest.approx(wanted, rel=1e-5)
    assert count.item() == 2 * 6 * 9


# --- detection


def grid_output(size: int = 64, classes: int = 3, n: int = 1, seed: int = 0) -> DetectionOutput:
    centres = grid_centres(size // 8, size // 8, 8, torch.device("cpu"))
    random = torch.randn(n, len(centres), classes + 5, generator=generator(seed))
    far = random[..., :4].mul(0.3).exp() * 12
    return DetectionOutput(
        logits=random[..., 4:-1].clone().requires_grad_(),
        boxes=torch.cat([centres - far[..., :2], centres + far[..., 2:]], -1).requires_grad_(),
        quality=random[..., -1].clone().requires_grad_(),
        centres=centres,
        strides=torch.full((len(centres),), 8.0),
    )


BOXES = torch.tensor([[[4.0, 4, 30, 30], [28, 10, 60, 50], [1, 40, 3, 42], [0, 0, 0, 0]]])
LABELS = torch.tensor([[0, 2, 1, -1]])


def run_assign(out: DetectionOutput, boxes: torch.Tensor, labels: torch.Tensor, topk: int = 9):
    return assign(*out[:2], *out[3:], boxes, labels, labels >= 0, topk=topk, alpha=0.5, beta=4.0)


def test_giou_equals_torchvisions():
    a, b = (torch.rand(50, 4, generator=generator(s)) * 20 for s in (1, 2))
    a[:, 2:] += a[:, :2]
    b[:, 2:] += b[:, :2]
    torch.testing.assert_close(1 - _giou(a, b)[1], generalized_box_iou_loss(a, b), rtol=1e-4, atol=1e-5)
    empty = torch.zeros(3, 4, requires_grad=True)
    _giou(empty, torch.zeros(3, 4))[1].sum().backward()
    assert empty.grad is not None
    assert empty.grad.isfinite().all()


def test_iou_matrix_by_hand():
    a = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 0, 0]]])
    b = torch.tensor([[[5.0, 0, 15, 10], [0, 0, 10, 10]]])
    torch.testing.assert_close(iou_matrix(a, b), torch.tensor([[[1 / 3, 1.0], [0, 0]]]))


def test_assignment_keeps_its_promises():
    out = grid_output()
    given = run_assign(out, BOXES, LABELS, topk=5)
    inside = candidates(out.centres, out.strides, BOXES)
    for box in range(3):
        mine = given.positive[0] & (given.box[0] == box)
        assert 1 <= mine.sum() <= 5
        assert inside[0, box][mine].all()
        assert given.share[0][mine].sum().item() == pytest.approx(1.0)
        best = (given.target[0] * mine).max().item()
        assert best == pytest.approx((iou_matrix(BOXES, out.boxes)[0, box] * mine).max().item(), abs=1e-6)
    assert not (given.positive[0] & (given.box[0] == 3)).any()
    assert (given.share[~given.positive] == 0).all()
    assert (given.target[~given.positive] == 0).all()


def test_a_box_between_the_locations_is_taught_too():
    out = grid_output()
    tiny = torch.tensor([[[7.5, 7.5, 8.5, 8.5]]])
    assert run_assign(out, tiny, torch.tensor([[1]])).positive.sum() == 4


def test_a_location_serves_the_box_it_overlaps_most():
    out = grid_output()
    boxes = torch.tensor([[[0.0, 0, 64, 64], [18, 18, 46, 46]]])
    given = run_assign(out, boxes, torch.tensor([[0, 1]]), topk=64)
    wanted = iou_matrix(boxes, out.boxes)[0]
    both = candidates(out.centres, out.strides, boxes)[0].all(dim=0)
    assert both.sum() == 16
    assert (given.box[0][both] == wanted[:, both].argmax(0)).all()


def test_detection_terms_by_hand():
    centres = torch.tensor([[4.0, 4.0], [12.0, 4.0]])
    logits = torch.tensor([[[0.0, math.log(3)], [-math.log(3), 0.0]]])
    predicted = torch.tensor([[[0.0, 0, 8, 4], [9, 0, 16, 8]]])
    out = DetectionOutput(logits, predicted, torch.zeros(1, 2), centres, torch.full((2,), 8.0))
    boxes, labels = torch.tensor([[[0.0, 0, 8, 8]]]), torch.tensor([[1]])
    settings = DetectionLoss(target="hard", gamma=2.0, balance=0.25)
    terms = losses.detection(out, boxes, labels, None, settings)
    negative = [0.5**2 * math.log(2), 0.25**2 * -math.log(0.75), 0.5**2 * math.log(2)]
    positive = 0.25**2 * -math.log(0.75)
    assert terms["cls"][1].item() == pytest.approx(0.75 * sum(negative) + 0.25 * positive, rel=1e-5)
    assert terms["box"][1].item() == pytest.approx(0.5, rel=1e-5)
    assert terms["quality"][1].item() == pytest.approx(math.log(2), rel=1e-5)
    aligned = losses.detection(out, boxes, labels, None, DetectionLoss(target="aligned", gamma=2.0))["cls"][1]
    soft = 0.25**2 * -(0.5 * math.log(0.75) + 0.5 * math.log(0.25))
    assert aligned.item() == pytest.approx(sum(negative) + soft, rel=1e-5)


def _image(out: DetectionOutput, i: int) -> DetectionOutput:
    part = slice(i, i + 1)
    return out._replace(logits=out.logits[part], boxes=out.boxes[part], quality=out.quality[part])


@pytest.mark.parametrize("target", ["hard", "aligned"])
def test_terms_add_over_images_and_ignore_padding(target):
    settings = DetectionLoss(target=target)
    out = grid_output(n=2, seed=3)
    boxes = torch.cat([BOXES, BOXES.flip(1)])
    labels = torch.cat([LABELS, torch.tensor([[-1, -1, 2, -1]])])
    whole = losses.detection(out, boxes, labels, None, settings)
    for name, (_, value, count) in whole.items():
        parts = [
            losses.detection(
                _image(out, i),
                F.pad(boxes[i : i + 1], (0, 0, 0, i)),
                F.pad(labels[i : i + 1], (0, i), value=-1),
                None,
                settings,
            )[name]
            for i in range(2)
        ]
        torch.testing.assert_close(value, parts[0][1] + parts[1][1])
        assert count.item() == losses.counts(labels)[name].item() == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_boxes", [0, 3])
def test_a_boxless_batch_is_finite_with_gradient(num_boxes, dtype):
    out = grid_output(n=2)
    leaf = out.logits
    out = out._replace(logits=leaf.to(dtype), quality=out.quality.to(dtype))
    boxes, labels = torch.zeros(2, num_boxes, 4), torch.full((2, num_boxes), -1)
    terms = losses.detection(out, boxes, labels, torch.zeros(2, num_boxes, dtype=torch.bool))
    assert all(count.item() == 0 and value.isfinite() for _, value, count in terms.values())
    assert terms["box"][1].item() == terms["quality"][1].item() == 0
    # Where another rank has objects, this rank's locations are still pushed down.
    total(terms, losses.counts(torch.zeros(1, 1, dtype=torch.int64))).backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert (leaf.grad > 0).all()
    assert total(terms, losses.counts(labels)).item() == 0


def test_crowds_are_regions_that_nobody_is_punished_for():
    out = grid_output()
    boxes = torch.tensor([[[0.0, 0, 16, 16], [32, 32, 64, 64]]])
    labels, crowd = torch.tensor([[0, 2]]), torch.tensor([[False, True]])
    terms = losses.detection(out, boxes, labels, crowd)
    assert terms["cls"][2].item() == losses.counts(labels, crowd)["cls"].item() == 1
    terms["cls"][1].backward()
    assert out.logits.grad is not None
    inside = ((out.centres > 32) & (out.centres < 64)).all(dim=1)
    assert (out.logits.grad[0, inside, 2] == 0).all()
    assert (out.logits.grad[0, inside, :2] > 0).all()
    assert (out.logits.grad[0, ~inside] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_detection_at_half_precision_is_close_to_float32(dtype):
    out = grid_output(n=1)
    half = out._replace(logits=out.logits.detach().to(dtype), quality=out.quality.detach().to(dtype))
    full = half._replace(logits=half.logits.float(), quality=half.quality.float())
    for a, b in zip(_sums(half), _sums(full), strict=True):
        torch.testing.assert_close(a, b)


def _sums(out: DetectionOutput) -> list[torch.Tensor]:
    return [value for _, value, _ in losses.detection(out, BOXES, LABELS).values()]


# --- two workers are one


def _case(task: str) -> tuple[torch.nn.Module, list[tuple[torch.Tensor, ...]]]:
    """A group-norm network and two uneven batches: one all void or box-less image, other padding."""
    torch.manual_seed(7)
    images = torch.randn(4, 3, 32, 32)
    if task == "segmentation":
        model = UNet(width=4, depth=3, norm="group", stem=True, heads=True).build(3)
        target = torch.randint(0, 3, (4, 32, 32), dtype=torch.uint8)
        target[1, :20] = VOID
        target[0] = VOID
        return model, [(images[:2], target[:2]), (images[2:], target[2:])]
    model = AnchorFree(width=4, strides=(8, 16), norm="group").build(3)
    boxes = torch.tensor([[[2.0, 2, 20, 20], [10, 8, 30, 31], [0, 0, 0, 0]]]).repeat(2, 1, 1)
    labels = torch.tensor([[0, 2, -1], [1, 1, 1]])
    nothing = (torch.zeros(2, 1, 4), torch.full((2, 1), -1))
    return model, [(images[:2], *nothing), (images[2:], boxes, labels)]


def _terms(task: str, outputs, target: tuple[torch.Tensor, ...]):
    if task == "segmentation":
        mix = {"cross_entropy": 1.0, "dice": 0.5, "focal": 0.3}
        return {name: (weight, *LOSSES[name](outputs, *target)) for name, weight in mix.items()}
    boxes, labels = target
    return losses.detection(outputs, boxes, labels)


def _counts(task: str, target: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    if task == "segmentation":
        return {name: LOSSES[name].count(*target) for name in ("cross_entropy", "dice", "focal")}
    return losses.counts(target[1])


def _worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    try:
        for task in ("segmentation", "detection"):
            model, shards = _case(task)
            parallel = DistributedDataParallel(model)
            images, *target = shards[rank]
            counts = _counts(task, tuple(target))
            for count in counts.values():
                torch.distributed.all_reduce(count)
            total(_terms(task, parallel(images), tuple(target)), counts, world_size=2).backward()
            torch.save([p.grad for p in model.parameters()], f"{folder}/{task}-{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def _union(task: str) -> list[torch.Tensor]:
    """Gradient of one worker on both batches at once, by autograd of the plain quotients."""
    model, shards = _case(task)
    images = torch.cat([shard[0] for shard in shards])
    if task == "segmentation":
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(port, str(tmp_path)), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    for task in ("segmentation", "detection"):
        wanted = _union(task)
        for rank in range(2):
            found = torch.load(tmp_path / f"{task}-{rank}.pt", weights_only=True)
            assert len(found) == len(wanted)
            scale = max(grad.abs().max().item() for grad in wanted)
            assert scale > 1e-3
            for a, b in zip(found, wanted, strict=True):
                assert (a - b).abs().max().item() <= 1e-5 * max(scale, 1.0)
