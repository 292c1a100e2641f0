"""Models: shapes, sizes, settings, and what each output means."""

import math
import re

import pytest
import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.models import MODELS, build_untrained, describe, parse
from pipeline.models.anchor_free import FIRST_DISTANCE, PRIOR, AnchorFree, grid_centres
from pipeline.models.layers import norm_layer, set_prior
from pipeline.models.smp import Smp
from pipeline.models.unet import UNet, UNetModule

SMALL = [
    {"name": "unet", "width": 4, "depth": 3},
    {"name": "unet", "width": 4, "depth": 3, "stem": True, "heads": True, "norm": "group", "dropout": 0.3},
    {"name": "anchor_free", "width": 4, "strides": [8]},
    {"name": "anchor_free", "width": 4, "norm": "group", "dropout": 0.3},
]


def images(height: int = 64, width: int = 96, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("values", [*SMALL, {**SMALL[0], "prior": [1, 2, 3, 4, 5]}], ids=str)
def test_settings_survive_a_manifest_and_give_the_same_network(values):
    settings = parse(values, "config.yaml")
    again = parse(describe(settings), "manifest.json")
    assert again == settings
    assert describe(settings)["name"] == values["name"]
    model, empty = settings.build(5), build_untrained(again, 5)
    empty.load_state_dict(model.state_dict())
    x = images()
    with torch.no_grad():
        first, second = model.eval()(x), empty.eval()(x)
    for a, b in zip(_tensors(first), _tensors(second), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("values", SMALL, ids=str)
def test_every_parameter_gets_gradient(values):
    # DDP without find_unused_parameters hangs on a parameter that takes no part.
    model = parse(values, "config.yaml").build(3).train()
    outputs = _tensors(model(images()))[:3]
    torch.stack([tensor.float().square().mean() for tensor in outputs]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("values", SMALL, ids=str)
def test_a_bad_size_names_the_size_to_pad_to(values):
    model = parse(values, "config.yaml").build(3)
    stride = model.stride
    assert isinstance(stride, int)
    with pytest.raises(InputError, match=rf"multiples of {stride}, found 65x96 .*\[{64 + stride}, 96\]"):
        model(images(65, 96))


@pytest.mark.parametrize("values", SMALL, ids=str)
def test_group_norm_does_not_mix_images_and_train_equals_eval(values):
    model = parse({**values, "norm": "group", "dropout": 0.0}, "config.yaml").build(3)
    x = images()
    with torch.no_grad():
        together, alone = model.train()(x), model.eval()(x[1:])
    for a, b in zip(_tensors(together)[:3], _tensors(alone)[:3], strict=True):
        torch.testing.assert_close(a[1:], b, rtol=1e-4, atol=1e-4)


def _tensors(output) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output)


@pytest.mark.parametrize(("stem", "heads"), [(False, False), (True, False), (False, True), (True, True)])
def test_unet_logits_have_the_images_size(stem, heads):
    model = UNet(width=4, depth=3, stem=stem, heads=heads).build(7)
    assert model.stride == (8 if stem else 4)
    assert model(images()).shape == (2, 7, 64, 96)
    heads_found = [name for name, _ in model.named_modules() if re.fullmatch(r"heads\.\d+", name)]
    assert len(heads_found) == (3 if heads else 1)
    assert any(isinstance(layer, nn.ConvTranspose2d) for layer in model.modules())


def test_unet_coarse_heads_reach_the_logits_at_the_right_place():
    model = UNet(width=4, depth=3, heads=True).build(2).eval()
    assert isinstance(model, UNetModule)
    for head in model.heads:
        nn.init.zeros_(head.get_parameter("weight"))
    calls = []
    model.heads[0].register_forward_hook(lambda _m, _i, out: calls.append(out.shape) or _spot(out))
    with torch.no_grad():
        logits = model(images())[0, 1]
    assert calls == [(2, 2, 16, 24)]
    # One spot in cell (3, 5) of the stride-4 grid: bilinear upsampling centres it on pixels 12..15, 20..23.
    rows, cols = (logits > logits.max() / 2).nonzero().unbind(1)
    assert (rows.float() + 0.5).mean() == pytest.approx(14.0)
    assert (cols.float() + 0.5).mean() == pytest.approx(22.0)


def _spot(out: torch.Tensor) -> torch.Tensor:
    spot = torch.zeros_like(out)
    spot[:, 1, 3, 5] = 1.0
    return spot


@pytest.mark.parametrize("heads", [False, True])
def test_unet_first_answers_with_the_prior(heads):
    model = UNet(width=4, depth=3, heads=heads, prior=(1, 0, 7)).build(3).eval()
    with torch.no_grad():
        p = model(images()).softmax(dim=1).mean(dim=(0, 2, 3))
    assert p.tolist() == pytest.approx([0.125, 1e-4, 0.875], rel=0.2)


@pytest.mark.parametrize("prior", [(1, 2), (0, 0, 0), (1, -1, 1)])
def test_a_prior_that_does_not_fit_the_classes_is_refused(prior):
    with pytest.raises(InputError, match=r"model.prior wants one frequency for each of the 3 classes"):
        UNet(width=4, depth=3, prior=prior).build(3)


def test_unet_dropout_acts_in_train_mode_only():
    model = UNet(width=4, depth=3, dropout=0.5, norm="group").build(2)
    x = images()
    with torch.no_grad():
        assert not torch.equal(model.train()(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("strides", [(4,), (8,), (8, 16, 32), (16, 32, 64)])
def test_anchor_free_output(strides):
    model = AnchorFree(width=4, strides=strides).build(5)
    out = model(images(64, 128))
    locations = sum((64 // s) * (128 // s) for s in strides)
    assert model.stride == strides[-1]
    assert out.logits.shape == (2, locations, 5)
    assert out.boxes.shape == (2, locations, 4)
    assert out.quality.shape == (2, locations)
    assert out.centres.shape == (locations, 2)
    assert [(out.strides == s).sum().item() for s in strides] == [(64 // s) * (128 // s) for s in strides]
    assert (out.boxes[..., :2] < out.centres).all()
    assert (out.boxes[..., 2:] > out.centres).all()


def test_anchor_free_starts_from_the_prior_and_from_boxes_of_a_few_strides():
    out = AnchorFree(width=8).build(4)(images())
    assert out.logits.sigmoid().mean().item() == pytest.approx(PRIOR, rel=0.2)
    sides = (out.boxes[..., 2:] - out.boxes[..., :2]) / out.strides[:, None]
    assert sides.mean().item() == pytest.approx(2 * FIRST_DISTANCE, rel=0.2)


def test_a_location_sees_its_own_part_of_the_image():
    model = AnchorFree(width=4, strides=(8,), norm="group", depth=0, head_depth=0).build(1).eval()
    x = images(64, 64, 1).requires_grad_()
    index = 3 * 8 + 5
    model(x).logits[0, index].sum().backward()
    assert x.grad is not None
    # Group norm lets the whole image in weakly; convolutions concentrate the gradient around the location.
    weight = x.grad.abs().sum(1)[0]
    rows, cols = torch.arange(64) + 0.5, torch.arange(64) + 0.5
    near = weight * (weight > weight.max() / 10)
    centre = ((near.sum(0) * cols).sum() / near.sum(), (near.sum(1) * rows).sum() / near.sum())
    wanted = model(x).centres[index]
    assert math.dist([float(c) for c in centre], wanted.tolist()) < 8


def test_grid_centres_follow_the_pixel_convention():
    centres = grid_centres(2, 3, 8, torch.device("cpu"))
    assert centres.tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_stay_float32_at_half_precision(dtype):
    model = AnchorFree(width=4, strides=(8,)).build(2).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        out = model(images())
    assert out.logits.dtype == dtype
    assert out.boxes.dtype == torch.float32
    assert all(tensor.isfinite().all() for tensor in out)


@pytest.mark.parametrize("strides", [(), (3,), (8, 32), (16, 8), (2,), (64, 128, 256)])
def test_strides_that_no_pyramid_has_are_refused(strides):
    with pytest.raises(InputError, match=r"x: 'strides' = .*powers of two"):
        AnchorFree.parse({"strides": strides}, "x")


@pytest.mark.parametrize(("kind", "channels"), [("group", 12), ("group", 7), ("batch", 5)])
def test_norms_fit_any_width(kind, channels):
    assert norm_layer(kind, channels)(torch.randn(2, channels, 4, 4)).shape == (2, channels, 4, 4)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"config.yaml: .*'uet' is no model. Did you mean 'unet'\?"):
        parse({"name": "uet"}, "config.yaml")
    with pytest.raises(InputError, match=r"unknown key 'widht'. Did you mean 'width'\?"):
        parse({"name": "unet", "widht": 3}, "config.yaml")
    assert {cls.task for cls in MODELS.values()} == {"segmentation", "detection"}


@pytest.mark.parametrize("heads", [False, True])
def test_a_binary_head_has_one_logit_and_its_prior_is_the_odds_of_class_0(heads):
    settings = UNet(width=4, depth=3, head="binary", heads=heads, prior=(1, 7))
    model = settings.build(2).eval()
    with torch.no_grad():
        logits = model(images())
    assert settings.outputs(2) == 1
    assert logits.shape == (2, 1, 64, 96)
    assert logits.sigmoid().mean().item() == pytest.approx(0.125, rel=0.2)
    assert build_untrained(settings, 2).load_state_dict(model.state_dict())


@pytest.mark.parametrize("settings", [UNet(width=4, head="binary"), Smp(head="binary")])
def test_a_binary_head_refuses_other_than_two_classes(settings):
    for num_classes in (1, 3):
        with pytest.raises(
            InputError, match=rf"model.head = binary wants exactly 2 classes .*found {num_classes}; set"
        ):
            settings.build(num_classes)
        assert settings.model_copy(update={"head": "multiclass"}).outputs(num_classes) == num_classes


def test_a_binary_prior_wants_two_frequencies():
    bias = torch.zeros(1)
    set_prior(bias, (3, 1))
    assert bias.item() == pytest.approx(math.log(3))
    set_prior(bias, (0, 1))
    assert bias.item() == pytest.approx(math.log(1e-4), rel=1e-4)
    with pytest.raises(InputError, match=r"each of the 2 classes, .*found \[0.5\]"):
        set_prior(bias, (0.5,))


def test_every_model_says_how_many_outputs_it_has():
    assert {name: cls().outputs(4) for name, cls in MODELS.items()} == dict.fromkeys(MODELS, 4)
    assert set(MODELS) >= {"unet", "smp", "anchor_free", "yolo_v1"}
