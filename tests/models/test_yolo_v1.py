"""YOLO v1: what its outputs mean, and its loss against numbers by hand and against plain loops."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.images.boxes import iou
from pipeline.losses import total
from pipeline.losses.yolo_v1 import YoloV1Loss, cell_owners, yolo_v1
from pipeline.models.parts import backbone_layers, dropout_layers
from pipeline.models.yolo_v1 import UNIT_CELLS, YoloOutput, YoloV1, YoloV1Module, decode

STRIDE = 16
UNIT = UNIT_CELLS * STRIDE  # 112 pixels: a root of 0.25 is 7 pixels, one of 0.5 is 28
SMALL = [
    YoloV1(stride=8, width=4, convs=1, norm="group"),
    YoloV1(stride=8, width=4, convs=1, norm="group", head="dense", size=(32, 48), hidden=32, boxes=3),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(height: int = 32, width: int = 48, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, height, width, generator=generator())


def cell(*boxes: tuple[float, ...], classes: tuple[float, ...] = (0, 0)) -> list[float]:
    return [value for box in boxes for value in box] + list(classes)


def loss_of(out: YoloOutput, boxes, labels, crowd=None, **changes: float) -> dict[str, float]:
    """Weighted sums by term."""
    crowd = None if crowd is None else torch.tensor(crowd)
    terms = yolo_v1(out, torch.tensor(boxes), torch.tensor(labels), crowd, YoloV1Loss(**changes))
    return {name: weight * value.item() for name, (weight, value, _) in terms.items()}


# --- the loss


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


@given(
    x=st.floats(0, 47.9),
    y=st.floats(0, 31.9),
    w=st.floats(0.1, 100),
    h=st.floats(0.1, 100),
    sign=st.sampled_from([1, -1]),
)
@settings(max_examples=50, derandomize=True)
def test_a_perfect_prediction_gives_the_box_back(x, y, w, h, sign):
    s = int(y // STRIDE) * 3 + int(x // STRIDE)
    raw = torch.zeros(1, 6, 13)
    roots = [sign * math.sqrt(w / UNIT), sign * math.sqrt(h / UNIT)]
    raw[0, s, 5:10] = torch.tensor([x / STRIDE - s % 3, y / STRIDE - s // 3, *roots, 1.0])
    raw[0, s, 10:] = torch.tensor([0.0, 1.0, 0.0])
    out = decode(raw, 2, 3, STRIDE, 2)
    scores = out.scores()
    assert scores.nonzero().tolist() == [[0, 2 * s + 1, 1]]
    assert scores.max() == 1
    wanted = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    assert out.boxes[0, 2 * s + 1].tolist() == pytest.approx(wanted, abs=1e-3)
    if sign > 0:
        found = yolo_v1(out, torch.tensor([[wanted]]), torch.tensor([[1]]))
        assert sum(value.item() for _, value, _ in found.values()) == pytest.approx(0, abs=1e-5)


def test_scores_are_confidence_times_class_within_0_and_1():
    raw = [
        cell((0, 0, 0, 0, 0.5), (0, 0, 0, 0, 1.5), classes=(0.8, 0.2)),
        cell(*[(0, 0, 0, 0, -1)] * 2, classes=(-1, 2)),
    ]
    out = decode(torch.tensor([raw]), 1, 2, STRIDE, 2)
    torch.testing.assert_close(out.scores()[0], torch.tensor([[0.4, 0.1], [0.8, 0.2], [0, 0], [0, 0]]))
    p = out.probabilities()[0]
    torch.testing.assert_close(p[:2], torch.tensor([[0.32, 0.08, 0.6], [0.64, 0.16, 0.2]]))
    assert p[2:].tolist() == [[0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("model", SMALL, ids=lambda model: model.head)
def test_output_is_cell_by_cell_and_a_fresh_box_lies_in_the_middle_of_its_cell(model):
    torch.manual_seed(0)
    network, each = model.build(3).eval(), model.boxes
    with torch.no_grad():
        out = network(images())
    assert out.places.shape == out.boxes.shape == (2, 24 * each, 4)
    assert out.confidence.shape == (2, 24 * each)
    assert out.classes.shape == (2, 24, 3)
    assert out.centres[::each].tolist() == [[8 * c + 4, 8 * r + 4] for r in range(4) for c in range(6)]
    assert (out.strides == 8).all()
    middle, size = (out.boxes[..., :2] + out.boxes[..., 2:]) / 2, out.boxes[..., 2:] - out.boxes[..., :2]
    assert (middle - out.centres).abs().mean() < 1.5
    # A box slot starts with a size of its own: its share of 0..1, squared.
    mean = size.unflatten(1, (24, each)).mean((0, 1, 3)) / (UNIT_CELLS * 8)
    assert mean.tolist() == pytest.approx([((j + 1) / (each + 1)) ** 2 for j in range(each)], abs=0.08)
    assert out.scores().mean() < 0.1


def test_a_convolutional_head_takes_any_size_and_a_dense_one_its_own():
    network = SMALL[0].build(3)
    assert network(images(64, 16)).boxes.shape == (2, 32, 4)
    assert network(images(64, 16)).unit == network(images()).unit == 56
    with pytest.raises(InputError, match=r"multiples of 8, found 33x48"):
        network(images(33))
    with pytest.raises(InputError, match=r"dense head wants images of 32x48 .*found 48x32; set input.size"):
        SMALL[1].build(3)(images(48, 32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head": "dense"}, r"a dense head wants size, .*multiples of stride 64, found None"),
        ({"head": "dense", "size": [448, 450]}, r"multiples of stride 64, found \(448, 450\)"),
        ({"size": [448, 448]}, r"size is of a dense head alone, found \(448, 448\)"),
        ({"stride": 24}, r"'stride' = 24"),
    ],
)
def test_settings_that_fit_no_grid_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        YoloV1.parse(values, "config.yaml: model")


def test_the_papers_grid_gives_7x7x30_outputs_behind_4096_units():
    # A 64th of the paper's width, so of its 4096 units too.
    network = YoloV1(head="dense", size=(448, 448), width=1, convs=1).build(20)
    assert isinstance(network, YoloV1Module)
    assert tuple(network.last.weight.shape) == (7 * 7 * 30, 4096 // 64)


@pytest.mark.parametrize("model", SMALL, ids=lambda model: model.head)
def test_dropout_is_one_that_monte_carlo_dropout_finds(model):
    network = model.build(2)
    (layer,) = dropout_layers(network)
    assert layer.p == 0.5
    assert dropout_layers(model.model_copy(update={"dropout": 0.0}).build(2)) == []
    assert len(backbone_layers(network)) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_stay_float32_at_half_precision(dtype):
    network = SMALL[0].build(2).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        out = network(images())
    assert {tensor.dtype for tensor in out} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(out.boxes, network(images()).boxes, rtol=0, atol=1.0)


def test_it_learns_two_images_by_heart():
    torch.manual_seed(0)
    network = YoloV1(stride=16, width=8, convs=1, norm="group", dropout=0.0).build(2).train()
    x = torch.rand(2, 3, 32, 48, generator=generator()) * 0.1
    boxes = torch.tensor([[[2.0, 4, 14, 12], [20, 18, 44, 30]], [[17, 1, 31, 27], [0, 0, 0, 0]]])
    labels = torch.tensor([[0, 1], [1, -1]])
    for n, b in (labels >= 0).nonzero().tolist():
        left, top, right, bottom = boxes[n, b].int().tolist()
        x[n, labels[n, b], top:bottom, left:right] = 1.0
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    loss = YoloV1Loss()
    for _ in range(150):
        optimizer.zero_grad()
        total(loss(network(x), boxes, labels, None), loss.counts(labels, None)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
    out = network.eval()(x)
    scores = out.scores()
    for n, wanted in enumerate((2, 1)):
        found, classes = (scores[n] > 0.5).nonzero().unbind(1)
        assert len(found) == wanted
        best, match = iou(out.boxes[n, found], boxes[n, :wanted]).max(1)
        assert (best > 0.8).all()
        assert torch.equal(labels[n, match], classes)
