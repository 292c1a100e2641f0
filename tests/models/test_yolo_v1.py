"""YOLO v1: what its outputs mean."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.images.boxes import iou
from pipeline.losses import total
from pipeline.losses.yolo_v1 import YoloV1Loss, yolo_v1
from pipeline.models.parts import backbone_layers, dropout_layers
from pipeline.models.yolo_v1 import UNIT_CELLS, YoloV1, YoloV1Module, decode
from tests.support.yolo_cases import SMALL, STRIDE, UNIT, cell, generator, images


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
