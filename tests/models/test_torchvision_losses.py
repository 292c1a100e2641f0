"""torchvision's detectors: the terms that they are trained by, by hand and against torchvision's."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from pipeline import losses
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.losses.two_stage import TwoStageLoss
from pipeline.models import DetectionOutput, SoftmaxOutput
from pipeline.models.anchor_free import grid_centres
from tests.support.torchvision_cases import (
    BOXES,
    FASTER,
    FASTER_320,
    LABELS,
    NOTHING,
    batch,
    build,
    lively,
)


def test_proposals_are_padded_with_background_outside():
    module = lively(build(FASTER))
    module.network.rpn.score_thresh = 0.5
    images = batch()
    images[1] *= 0.2
    with torch.no_grad():
        out, alone = module(images), [module(image[None]) for image in images]
    numbers = [single.boxes.shape[1] for single in alone]
    assert len(set(numbers)) == 2
    few = min(range(2), key=numbers.__getitem__)
    torch.testing.assert_close(out.probs[few, : numbers[few]], alone[few].probs[0], rtol=1e-4, atol=1e-5)
    rest = slice(numbers[few], None)
    assert (out.probs[few, rest, -1] == 1).all()
    assert (out.probs[few, rest, :-1] == 0).all()
    assert (out.boxes[few, rest] == 0).all()
    assert (out.centres[few, rest] == -1).all()
    assert (out.centres[few, : numbers[few]] >= 0).all()
    assert ((out.boxes >= 0) & (out.boxes <= 64)).all()
    assert out.terms is None


def test_the_terms_are_torchvisions_losses_in_train_and_eval_mode():
    module = build({**FASTER, "norm": "group"})
    network = copy.deepcopy(module.network)
    network.transform = GeneralizedRCNNTransform(64, 64, [0.0] * 3, [1.0] * 3)
    network.transform.torch_choice = lambda k: k[0]  # which draws a number, even of one size
    targets = [{"boxes": b[v], "labels": k[v] + 1} for b, k, v in zip(BOXES, LABELS, LABELS >= 0, strict=True)]
    torch.manual_seed(3)
    wanted = network.train()(list(batch()), targets)
    for mode in (True, False):
        torch.manual_seed(3)
        out = module.train(mode)(batch(), BOXES, LABELS)
        names = {"loss_box_reg": "box_reg", "loss_classifier": "cls", "loss_objectness": "objectness",
                 "loss_rpn_box_reg": "rpn_box"}  # fmt: skip
        for their, our in names.items():
            torch.testing.assert_close(out.terms[our], 2 * wanted[their])
        assert module.training == module.network.rpn.training == module.network.roi_heads.training == mode
        assert (out.boxes.shape[1] == 0) == mode
    with torch.no_grad():
        plain = module.train()(batch())
    assert plain.boxes.shape == out.boxes.shape
    assert module.network.rpn.training
    loss = TwoStageLoss(cls_weight=0.5)
    terms = loss(out, BOXES, LABELS, None)
    assert {name: (weight, count.item()) for name, (weight, _, count) in terms.items()} == {
        "box_reg": (1.0, 2), "cls": (0.5, 2), "objectness": (1.0, 2), "rpn_box": (1.0, 2)
    }  # fmt: skip
    assert len({id(count) for count in loss.counts(LABELS, None).values()}) == 4


def test_sampling_follows_the_seed():
    module = build({**FASTER, "norm": "group"})
    module.network.rpn.fg_bg_sampler.batch_size_per_image = 8
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(module(batch(), BOXES, LABELS).terms["objectness"].item())
    assert values[0] == values[1] != values[2]


def test_nothing_proposed_and_nothing_there_is_finite():
    module = build({**FASTER_320, "norm": "group"})
    nn.init.constant_(module.network.rpn.head.cls_logits.bias, -20.0)
    assert module.network.rpn.score_thresh == 0.05
    terms = module(batch(), *NOTHING).terms
    assert all(value.isfinite() for value in terms.values())
    assert module.network.rpn.score_thresh == 0.05
    with torch.no_grad():
        out = module.eval()(batch())
    assert out.boxes.shape == (2, 0, 4)
    assert out.probabilities().shape == (2, 0, 4)


def test_boxes_without_area_teach_nothing():
    module = build({**FASTER, "norm": "group"})
    flat = torch.tensor([[[5.0, 5, 5, 20]], [[0, 0, 0, 0]]])
    values = []
    for targets in ((flat, torch.tensor([[0], [1]])), NOTHING):
        torch.manual_seed(0)
        values.append(module(batch(), *targets).terms)
    assert values[0] == values[1]


# --- SoftmaxLoss


def softmax_output(n: int = 2, seed: int = 0, classes: int = 3) -> SoftmaxOutput:
    centres = grid_centres(8, 8, 8, torch.device("cpu"))
    random = torch.randn(n, 64, classes + 5, generator=torch.Generator().manual_seed(seed))
    far = random[..., :4].mul(0.3).exp() * 12
    boxes = torch.cat([centres - far[..., :2], centres + far[..., 2:]], -1).requires_grad_()
    return SoftmaxOutput(random[..., 4:].clone().requires_grad_(), boxes, centres, torch.full((64,), 8.0))


def test_softmax_terms_by_hand():
    # Three places: the first answers for the box of class 1; of the others only the harder is mined.
    p = torch.tensor([[[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.2, 0.2, 0.6]]])
    predicted = torch.tensor([[[0.0, 0, 8, 4], [8, 0, 16, 8], [16, 0, 24, 8]]])
    centres = torch.tensor([[4.0, 4], [12, 4], [20, 4]])
    out = SoftmaxOutput(p.log() + 7, predicted, centres, torch.full((3,), 8.0))
    boxes, labels = torch.tensor([[[0.0, 0, 8, 8]]]), torch.tensor([[1]])
    terms = SoftmaxLoss(negatives=1)(out, boxes, labels, None)
    assert terms["cls"][1].item() == pytest.approx(-math.log(0.5) - math.log(0.3), rel=1e-5)
    assert terms["box"][1].item() == pytest.approx(0.5, rel=1e-5)
    assert terms["cls"][2].item() == terms["box"][2].item() == 1
    both = SoftmaxLoss(negatives=3)(out, boxes, labels, None)["cls"][1].item()
    assert both == pytest.approx(-math.log(0.5) - math.log(0.3) - math.log(0.6), rel=1e-5)
    crowded = torch.tensor([[[0.0, 0, 8, 8], [8, 0, 16, 8]]])
    crowd = torch.tensor([[False, True]])
    ignoring = SoftmaxLoss(negatives=3)(out, crowded, torch.tensor([[1, 0]]), crowd)["cls"]
    assert ignoring[1].item() == pytest.approx(-math.log(0.5) - math.log(0.6), rel=1e-5)
    assert ignoring[2].item() == 1


def test_softmax_cross_entropy_is_torchs():
    out = softmax_output(1)
    boxes, labels = BOXES[:1], LABELS[:1]
    # One location an object, and all others are negatives: each weighs 1.
    terms = SoftmaxLoss(topk=1, negatives=64)(out, boxes, labels, None)
    target = torch.full((64,), 3)
    overlaps = [box_iou(out.boxes[0].detach(), box) for box in boxes[0]]
    score = out.logits[0].detach().softmax(-1)
    for overlap, box, label in zip(overlaps, boxes[0], labels[0], strict=True):
        x, y = out.centres.T
        inside = (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])
        target[(score[:, label] ** 0.5 * overlap**4 * inside).argmax()] = label
    assert (target < 3).sum() == 2
    wanted = F.cross_entropy(out.logits[0], target, reduction="sum")
    torch.testing.assert_close(terms["cls"][1], wanted)


def box_iou(boxes: Tensor, box: Tensor) -> Tensor:
    from torchvision.ops import box_iou as reference

    return reference(boxes, box[None])[:, 0]


def test_negatives_are_the_hardest_of_each_image():
    out = softmax_output(2)
    SoftmaxLoss()(out, BOXES, LABELS, None)["cls"][1].backward()
    assert out.logits.grad is not None
    moved = (out.logits.grad != 0).any(-1)
    hardness = -out.logits.detach().log_softmax(-1)[..., -1]
    # The second image has no object: three negatives all the same.
    assert moved[1].nonzero()[:, 0].tolist() == hardness[1].topk(3).indices.sort().values.tolist()
    positive = out.logits.grad[0, :, -1] > 0
    assert 2 <= positive.sum() <= 8
    negative = moved[0] & ~positive
    assert negative.sum() == 3 * positive.sum()
    assert hardness[0][negative].min() >= hardness[0][~moved[0]].max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_boxes", [0, 2])
def test_a_batch_without_objects_is_finite_with_gradient(num_boxes, dtype):
    leaf = softmax_output(2)
    out = leaf._replace(logits=leaf.logits.to(dtype))
    boxes, labels = torch.zeros(2, num_boxes, 4), torch.full((2, num_boxes), -1)
    loss = SoftmaxLoss()
    terms = loss(out, boxes, labels, torch.zeros(2, num_boxes, dtype=torch.bool))
    assert terms["box"][1].item() == 0
    assert all(count.item() == 0 and value.isfinite() for _, value, count in terms.values())
    losses.total(terms, loss.counts(torch.zeros(1, 1, dtype=torch.int64), None)).backward()
    assert leaf.logits.grad is not None
    assert leaf.logits.grad.isfinite().all()
    assert (leaf.logits.grad != 0).any(-1).sum() == 2 * 3
    assert losses.total(terms, loss.counts(labels, None)).item() == 0


def test_two_shards_of_a_batch_add_up_to_it():
    loss = SoftmaxLoss(cls_weight=0.7)
    boxes = torch.cat([BOXES, BOXES.flip(1) + 2])
    labels = torch.cat([LABELS, torch.tensor([[1, -1], [2, 2]])])
    crowd = torch.zeros(4, 2, dtype=torch.bool)
    crowd[3, 0] = True
    whole = softmax_output(4)
    counts = loss.counts(labels, crowd)
    losses.total(loss(whole, boxes, labels, crowd), counts).backward()
    shards = [slice(0, 1), slice(1, 4)]
    logits, predicted = whole.logits.detach(), whole.boxes.detach()
    parts = [whole._replace(logits=logits[s].requires_grad_(), boxes=predicted[s].requires_grad_()) for s in shards]
    each = [loss.counts(labels[s], crowd[s]) for s in shards]
    summed = {name: torch.stack([counts[name] for counts in each]).sum() for name in loss.terms}
    assert summed == counts
    for part, s in zip(parts, shards, strict=True):
        losses.total(loss(part, F.pad(boxes[s], (0, 0, 0, 1)), F.pad(labels[s], (0, 1), value=-1),
                          F.pad(crowd[s], (0, 1))), summed).backward()  # fmt: skip
    for name in ("logits", "boxes"):
        joined = torch.cat([getattr(part, name).grad for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name).grad)


# --- one-stage without quality, transfer, settings


def test_without_quality_its_term_is_zero_with_its_count():
    out = softmax_output(2)
    logits = out.logits[..., :-1]
    quality = torch.zeros(2, 64)
    with_quality = losses.detection(DetectionOutput(logits, out.boxes, quality, *out[2:]), BOXES, LABELS)
    without = losses.detection(DetectionOutput(logits, out.boxes, None, *out[2:]), BOXES, LABELS)
    assert with_quality["quality"][1] > 0
    assert without["quality"][1].item() == 0
    assert without["quality"][2].item() == 2
    for name in ("cls", "box"):
        assert without[name] == with_quality[name]
