"""YOLO v1: its loss against numbers by hand and against plain loops."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.images.boxes import iou
from pipeline.losses import total
from pipeline.losses.yolo_v1 import YoloV1Loss, cell_owners, yolo_v1
from pipeline.models.yolo_v1 import YoloOutput, decode
from tests.support.yolo_cases import SMALL, STRIDE, UNIT, cell, generator, images, loss_of


def test_the_loss_by_hand():
    # Two cells of 16 pixels side by side, two boxes each. The object: 7x7 pixels around (8, 8), label 1, so in
    # the left cell it is x = y = 1/2 and both roots are sqrt(7 / 112) = 1/4.
    left = cell(
        # Centre (12, 8), 7 wide, 112 / 64 = 1.75 high: overlap 3 * 1.75 = 5.25, union 49 + 12.25 - 5.25 = 56,
        # IoU 3/32, the only overlap: responsible.
        (0.75, 0.5, 0.25, 0.125, 0.75),
        # Centre (24, 8): 16 pixels away, no overlap.
        (1.5, 0.5, 0.25, 0.25, 0.5),
        classes=(0.25, 0.5),
    )
    # The right cell has no object: its places and classes do not count.
    right = cell((9, 9, 9, 9, -0.25), (0, 0, 0, 0, 1), classes=(7, 7))
    # A second image without any object.
    empty = [cell((1, 1, 1, 1, 0.5), (1, 1, 1, 1, 0), classes=(5, 5))] + [cell((1, 1, 1, 1, 0), (1, 1, 1, 1, 0))]
    out = decode(torch.tensor([[left, right], empty]), 1, 2, STRIDE, 2)
    boxes = torch.tensor([[[4.5, 4.5, 11.5, 11.5]], [[0, 0, 0, 0]]])
    labels = torch.tensor([[1], [-1]])
    terms = YoloV1Loss()(out, boxes, labels, None)
    assert {name: (weight, value.item(), count.item()) for name, (weight, value, count) in terms.items()} == {
        "coord": (5.0, (1 / 4) ** 2 + (1 / 8) ** 2, 2),
        "confidence": (1.0, (3 / 4 - 3 / 32) ** 2, 2),
        "noobj": (0.5, (1 / 4 + 1 / 16 + 1) + 1 / 4, 2),
        "cls": (1.0, (1 / 4) ** 2 + (1 / 2) ** 2, 2),
    }
    # (5 * 5/64 + 441/1024 + 0.5 * 25/16 + 5/16) / 2 images
    wanted = (0.390625 + 0.4306640625 + 0.78125 + 0.3125) / 2
    assert total(terms, YoloV1Loss().counts(labels, None)).item() == pytest.approx(wanted, rel=1e-6)
    doubled = loss_of(out, boxes.tolist(), labels.tolist(), lambda_coord=10, lambda_noobj=2)
    assert doubled["coord"] == 2 * 5 * terms["coord"][1].item()
    assert doubled["noobj"] == 4 * 0.5 * terms["noobj"][1].item()


def by_loops(out: YoloOutput, boxes: torch.Tensor, labels: torch.Tensor, crowd: torch.Tensor) -> dict[str, float]:
    """The sums in plain loops, object by object as darknet goes, from the largest object down."""
    sums = dict.fromkeys(YoloV1Loss.terms, 0.0)
    each = out.confidence.shape[1] // out.classes.shape[1]
    corners = [(x - STRIDE / 2, y - STRIDE / 2) for x, y in out.centres[::each].tolist()]
    for n in range(len(boxes)):
        real = [b for b in range(boxes.shape[1]) if labels[n, b] >= 0 and not crowd[n, b]]
        crowds = [boxes[n, b].tolist() for b in range(boxes.shape[1]) if labels[n, b] >= 0 and crowd[n, b]]
        sides = {b: (boxes[n, b, 2:] - boxes[n, b, :2]).tolist() for b in real}
        taught: dict[int, int] = {}
        for b in sorted(real, key=lambda b: -sides[b][0] * sides[b][1]):
            x, y = ((boxes[n, b, :2] + boxes[n, b, 2:]) / 2).tolist()
            at = [s for s, (left, top) in enumerate(corners) if 0 <= x - left < STRIDE and 0 <= y - top < STRIDE]
            taught.setdefault(at[0], b)
        for s, (left, top) in enumerate(corners):
            mine = list(range(s * each, s * each + each))
            if s in taught:
                b = taught[s]
                overlaps = [float(iou(out.boxes[n, [j]], boxes[n, [b]])) for j in mine]
                best = mine[max(range(each), key=lambda j: overlaps[j])]
                if max(overlaps) == 0:
                    best = min(mine, key=lambda j: _distance(out.boxes[n, j], boxes[n, b]))
                x, y = ((boxes[n, b, :2] + boxes[n, b, 2:]) / 2).tolist()
                wanted = [(x - left) / STRIDE, (y - top) / STRIDE, *(math.sqrt(side / UNIT) for side in sides[b])]
                sums["coord"] += math.dist(out.places[n, best].tolist(), wanted) ** 2
                sums["confidence"] += (out.confidence[n, best].item() - max(overlaps)) ** 2
                one_hot = [float(k == labels[n, b]) for k in range(out.classes.shape[2])]
                sums["cls"] += math.dist(out.classes[n, s].tolist(), one_hot) ** 2
                mine.remove(best)
            reached = any(
                min(right, left + STRIDE) > max(x, left) and min(bottom, top + STRIDE) > max(y, top)
                for x, y, right, bottom in crowds
            )
            sums["noobj"] += 0 if reached else sum(out.confidence[n, j].item() ** 2 for j in mine)
    return sums


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    shape = [torch.cat([(box[:2] + box[2:]) / 2, box[2:] - box[:2]]) for box in (a, b)]
    return (shape[0] - shape[1]).norm().item()


@given(seed=st.integers(0, 10**6), each=st.integers(1, 3), num_boxes=st.integers(0, 8))
@settings(max_examples=40, derandomize=True)
def test_the_loss_equals_plain_loops(seed, each, num_boxes):
    random = generator(seed)
    raw = torch.randn(2, 6, 5 * each + 3, generator=random)
    raw[..., : 5 * each].unflatten(-1, (each, 5))[..., 2:4] *= 0.3
    low = torch.rand(2, num_boxes, 2, generator=random) * torch.tensor([40.0, 24])
    boxes = torch.cat([low, low + 0.5 + torch.rand(2, num_boxes, 2, generator=random) * 7], -1)
    labels = torch.randint(-1, 3, (2, num_boxes), generator=random)
    crowd = torch.rand(2, num_boxes, generator=random) < 0.2
    out = decode(raw, 2, 3, STRIDE, each)
    found = yolo_v1(out, boxes, labels, crowd)
    assert {name: value.item() for name, (_, value, _) in found.items()} == pytest.approx(
        by_loops(out, boxes, labels, crowd), rel=1e-4, abs=1e-4
    )


def one_cell(*boxes: tuple[float, ...]) -> YoloOutput:
    return decode(torch.tensor([[cell(*boxes)]], requires_grad=True), 1, 1, STRIDE, len(boxes))


def taught_box(out: YoloOutput, box: list[float]) -> int:
    """Which box of the one cell gets a gradient of its place."""
    out.places.retain_grad()
    yolo_v1(out, torch.tensor([[box]]), torch.tensor([[0]]))["coord"][1].backward()
    assert out.places.grad is not None
    (index,) = out.places.grad[0].abs().sum(-1).nonzero()[:, 0].tolist()
    return index


def test_the_box_of_highest_iou_is_responsible_else_the_nearest():
    box = [4.5, 4.5, 11.5, 11.5]
    # Confidence has no say: IoU of the first is about 0.45, of the second about 0.64.
    assert taught_box(one_cell((0.5, 0.5, 0.3, 0.375, 0.9), (0.5, 0.5, 0.25, 0.2, 0.0)), box) == 1
    # An overlap, however small, beats a near box of the right size that just misses.
    assert taught_box(one_cell((0.5, 0.95, 0.25, 0.25, 0), (0.5, 0.5, 0.01, 0.01, 0)), box) == 1
    # No overlap: nearer in the root mean square of x, y, width and height.
    assert taught_box(one_cell((2.5, 0.5, 0.25, 0.25, 0), (1.5, 0.5, 0.25, 0.25, 0)), box) == 1
    assert taught_box(one_cell((1.5, 0.5, 0.25, 0.25, 0), (1.5, 0.5, 0.25, 0.1, 0)), box) == 0


def test_the_same_error_in_pixels_weighs_more_in_a_small_box():
    # Widths 28 and 7 pixels (roots 1/2 and 1/4), each predicted 1 pixel too wide.
    wide, narrow = (math.sqrt((side + 1) / UNIT) for side in (28, 7))
    costs = [
        loss_of(one_cell((0.5, 0.5, root, exact, 0)), [[[8 - w / 2, 8 - w / 2, 8 + w / 2, 8 + w / 2]]], [[0]])["coord"]
        for root, exact, w in ((wide, 0.5, 28.0), (narrow, 0.25, 7.0))
    ]
    assert costs == pytest.approx([5 * (wide - 0.5) ** 2, 5 * (narrow - 0.25) ** 2], rel=1e-3)
    assert costs[1] > 3.5 * costs[0]


def owners(boxes: list[list[float]], labels: list[int], size: tuple[int, int] = (2, 3)):
    centres = decode(torch.zeros(1, size[0] * size[1], 6), *size, STRIDE, 1).centres
    given_labels = torch.tensor([labels])
    stride = torch.tensor(float(STRIDE))
    return cell_owners(centres, stride, torch.tensor([boxes]), given_labels, given_labels >= 0)


def test_the_larger_of_two_objects_in_a_cell_is_taught_whatever_their_order():
    small, large = [5.0, 5, 9, 9], [0.0, 0, 12, 12]
    for boxes, labels in (([small, large], [0, 1]), ([large, small], [1, 0])):
        got = owners(boxes, labels)
        assert got.taken[0].tolist() == [True] + [False] * 5
        assert got.boxes[0, 0].tolist() == large
        assert got.labels[0, 0] == 1
    equal = owners([[1.0, 1, 5, 5], [2, 2, 6, 6], [9, 9, 13, 13]], [2, 1, 0])
    assert (equal.labels[0, 0].item(), equal.taken.sum().item()) == (2, 1)


def test_an_object_belongs_to_the_cell_of_its_centre():
    # Centres: in (row 1, column 2); on the edge between the first two columns; on the image's far corner.
    got = owners([[40.0, 20, 44, 24], [12, 4, 20, 8], [44, 28, 52, 36]], [0, 1, 2])
    assert got.taken[0].nonzero()[:, 0].tolist() == [1, 5]
    assert got.labels[0, [1, 5]].tolist() == [1, 2]
    # Outside the image: the nearest cell. Padding: none.
    assert owners([[-20.0, 50, -10, 60], [1, 1, 9, 9]], [0, -1]).taken[0].nonzero()[:, 0].tolist() == [3]


def test_a_crowd_is_neither_taught_nor_punished():
    raw = torch.zeros(1, 6, 12)
    raw[..., [4, 9]] = 0.5
    raw = raw.requires_grad_()
    out = decode(raw, 2, 3, STRIDE, 2)
    # The crowd covers much of the last column and reaches into the middle one by a pixel; an object lies in the
    # last cell.
    boxes, labels = torch.tensor([[[31.0, 8, 48, 17], [36, 20, 44, 28]]]), torch.tensor([[0, 1]])
    terms = yolo_v1(out, boxes, labels, torch.tensor([[True, False]]))
    total(terms, YoloV1Loss().counts(labels, None)).backward()
    assert raw.grad is not None
    pushed = (raw.grad[0][:, [4, 9]] != 0).sum(-1).tolist()
    assert pushed == [2, 0, 0, 2, 0, 1]
    assert (raw.grad[0][:, :4] != 0).any(-1).tolist() == [False] * 5 + [True]
    assert terms["noobj"][1].item() == 4 * 0.25
    # As an object of its own, without the flag, it would be: two cells taught, ten boxes pushed.
    assert yolo_v1(out, boxes, labels)["noobj"][1].item() == 10 * 0.25


@pytest.mark.parametrize("model", SMALL, ids=lambda model: model.head)
@pytest.mark.parametrize("num_boxes", [0, 2])
def test_a_boxless_batch_is_finite_with_gradient_to_every_parameter(model, num_boxes):
    network = model.build(3).train()
    boxes, labels = torch.zeros(2, num_boxes, 4), torch.full((2, num_boxes), -1)
    terms = yolo_v1(network(images()), boxes, labels, torch.zeros(2, num_boxes, dtype=torch.bool))
    assert terms["coord"][1].item() == terms["confidence"][1].item() == terms["cls"][1].item() == 0
    value = total(terms, YoloV1Loss().counts(labels, None))
    value.backward()
    assert 0 < value.item() < math.inf
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert (network.last.bias.grad != 0).any()  # pyright: ignore[reportOptionalMemberAccess]


def test_two_shards_give_the_gradient_of_the_whole_batch():
    torch.manual_seed(0)
    network = SMALL[0].model_copy(update={"dropout": 0.0}).build(3)
    twin = copy.deepcopy(network)
    x = images(n=4)
    boxes = torch.tensor([[[2.0, 2, 20, 20], [10, 8, 30, 31]], [[0, 0, 0, 0]] * 2]).repeat(2, 1, 1)
    labels = torch.tensor([[0, 2], [-1, -1], [1, 1], [-1, -1]])
    crowd = torch.tensor([[False, False], [False, False], [True, False], [False, False]])
    loss = YoloV1Loss()
    whole = loss(network(x), boxes, labels, crowd)
    total(whole, loss.counts(labels, crowd)).backward()
    parts = [loss(twin(x[at]), boxes[at], labels[at], crowd[at]) for at in (slice(0, 1), slice(1, 4))]
    for name, (_, value, count) in whole.items():
        torch.testing.assert_close(value, sum(part[name][1] for part in parts))
        assert count.item() == sum(part[name][2].item() for part in parts) == 4
    for part in parts:
        total(part, loss.counts(labels, crowd)).backward()
    for a, b in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


# --- what outputs mean
