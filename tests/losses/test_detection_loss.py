"""The detection loss: closed-form values, box-less batches, half precision; and the arithmetic that joins terms."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from pipeline import losses
from pipeline.losses import DetectionLoss, total
from pipeline.losses.assign import assign, candidates, iou_matrix
from pipeline.losses.detection import _giou
from pipeline.models import DetectionOutput
from pipeline.models.anchor_free import grid_centres


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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
