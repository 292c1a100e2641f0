"""Dropout layers that sample, and the backbone's layers in the order in which an image meets them."""

import pytest
import torch
from torch import nn

from pipeline import models
from pipeline.errors import InputError
from pipeline.models import backbone_layers, dropout_layers, enable_dropout
from pipeline.models.anchor_free import AnchorFree
from pipeline.models.parts import _by_stage
from pipeline.models.smp import Smp
from pipeline.models.unet import UNet

NETWORKS = {
    "unet": UNet(width=4, depth=3),
    "unet with stem": UNet(width=4, depth=3, stem=True),
    "anchor_free": AnchorFree(width=4, depth=2),
    "resnet18": Smp(encoder="resnet18"),
    "mit_b0": Smp(encoder="mit_b0"),
    "lite0": Smp(encoder="tu-tf_efficientnet_lite0"),
    "efficientnet": Smp(encoder="efficientnet-b0"),
    "mobilenet": Smp(encoder="mobilenet_v2"),
    "vit": Smp(arch="DPT", encoder="tu-vit_tiny_patch16_224"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_hold_the_backbones_parameters_once_in_the_order_of_the_forward(name):
    model = NETWORKS[name].build(2).eval()
    layers = backbone_layers(model)
    inside = {id(p) for part in model.backbone for p in part.parameters()}  # type: ignore[union-attr]
    every = [n for n, p in model.named_parameters() if id(p) in inside]
    assert sorted(sum(layers, [])) == sorted(every)
    assert len(layers) >= 3
    used = {n for n, p in model.named_parameters() if p.requires_grad}
    layer_of = {n: at for at, layer in enumerate(layers) for n in layer if n in used}
    met: list[int] = []

    def note(module: nn.Module, _: object, prefix: str) -> None:
        met.extend(
            layer_of[f"{prefix}.{n}"] for n, _ in module.named_parameters(recurse=False) if f"{prefix}.{n}" in layer_of
        )

    for prefix, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, i, prefix=prefix: note(m, i, prefix))
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 64))
    first = [met.index(at) for at in sorted(set(met))]
    assert first == sorted(first)
    assert set(met) == set(layer_of.values())


def test_a_norm_is_no_layer_of_its_own():
    layers = backbone_layers(Smp(encoder="resnet18").build(2))
    assert len(layers) == 9
    assert layers[0] == [f"network.encoder.{name}" for name in ("conv1.weight", "bn1.weight", "bn1.bias")]
    assert all(name.startswith("network.encoder.layer4.1.") for name in layers[-1])
    assert [len(layer) for layer in backbone_layers(UNet(width=4, depth=2, stem=True).build(2))] == [3, 6, 6]


def test_mixed_stages_are_sorted_and_others_left_alone():
    keys = [("embed1",), ("embed2",), ("block1", "0"), ("block1", "1"), ("block2", "0")]
    assert _by_stage(keys) == [("embed1",), ("block1", "0"), ("block1", "1"), ("embed2",), ("block2", "0")]
    for left in (
        [("conv1",), ("conv2",), ("block1",), ("conv3",)],
        [("stem",), ("b2",), ("b1",)],
        [("2",), ("1",)],
        [],
    ):
        assert _by_stage(left) == left


class _Network(nn.Module):
    def __init__(self, *backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(backbone)


def test_bare_parameters_belong_to_the_first_layer():
    inner = nn.Sequential()
    inner.register_parameter("position", nn.Parameter(torch.zeros(1, 4)))
    inner.add_module("embed", nn.Conv2d(3, 4, 1))
    inner.add_module("blocks", nn.Sequential(nn.Linear(4, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 4, bias=False)))
    wrapped = nn.Sequential()
    wrapped.add_module("model", inner)
    base = "backbone.0.model."
    assert backbone_layers(_Network(wrapped, nn.Identity(), nn.Conv2d(4, 4, 1))) == [
        [base + name for name in ("position", "embed.weight", "embed.bias")],
        [base + name for name in ("blocks.0.weight", "blocks.1.weight", "blocks.1.bias")],
        [base + "blocks.2.weight"],
        ["backbone.2.weight", "backbone.2.bias"],
    ]
    assert backbone_layers(_Network()) == []


@pytest.mark.parametrize(
    "settings",
    [
        UNet(width=4, depth=3, dropout=0.5),
        Smp(dropout=0.5),
        Smp(arch="DeepLabV3Plus"),
        Smp(arch="Segformer", encoder="mit_b0", dropout=0.3),
    ],
    ids=str,
)
def test_sampling_varies_the_answer_and_leaves_batch_norm_alone(settings):
    model = settings.build(2)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.train()(x)  # batch norm sees something
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert dropout_layers(model)
    with torch.no_grad():
        enable_dropout(model, True)
        assert not torch.equal(model(x), model(x))
        enable_dropout(model, False)
        certain = model(x)
        assert torch.equal(certain, model(x))
        assert torch.equal(certain, model.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(layer.training for layer in model.modules())


def test_only_dropout_that_drops_is_sampled():
    model = nn.Sequential(
        nn.Dropout(0.0), nn.BatchNorm2d(3), nn.Dropout2d(0.2), nn.AlphaDropout(0.1), nn.Conv2d(3, 1, 1)
    )
    assert dropout_layers(model) == [model[2], model[3]]
    enable_dropout(model.train(), True)
    assert [layer.training for layer in model] == [False, False, True, True, False]
    assert not model.training
    assert dropout_layers(UNet(width=4, depth=2).build(2)) == []


def test_dropout_of_a_classifier_that_is_gone_is_not_counted():
    assert dropout_layers(Smp(encoder="efficientnet-b0").build(2)) == []


def test_dropout_passes_want_dropout():
    plain, dropping = (
        models.parse({"name": "unet", "width": 4, "depth": 2, "dropout": p}, "x").build(2) for p in (0, 0.1)
    )
    models.require_dropout(plain, 0, "config")
    models.require_dropout(dropping, 8, "config")
    with pytest.raises(InputError, match="config: predict.dropout_passes is 8, but its model has no dropout"):
        models.require_dropout(plain, 8, "config")
