"""segmentation_models_pytorch behind our interface: every architecture, dropout, heads, and what it can not do."""

import math

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.errors import InputError
from pipeline.models import build_untrained, describe, dropout_layers, parse
from pipeline.models.smp import Smp, SmpModule

ARCHS = sorted(cls.__name__ for cls in smp.MODEL_ARCHITECTURES_MAPPING.values())
ENCODERS = ["resnet18", "mit_b0", "tu-tf_efficientnet_lite0"]
VIT = "tu-vit_tiny_patch16_224"
REFUSED = {("UnetPlusPlus", "mit_b0"), ("Linknet", "mit_b0")}
"""What the library itself does not offer."""
FEW = [
    *((arch, VIT if arch == "DPT" else "resnet18") for arch in ARCHS),
    ("Segformer", "mit_b0"),
    ("DeepLabV3Plus", "tu-tf_efficientnet_lite0"),
]
EVERY = [*((a, e) for a in ARCHS if a != "DPT" for e in ENCODERS if (a, e) not in REFUSED), ("DPT", VIT)]


def build(settings: Smp, num_classes: int) -> SmpModule:
    torch.manual_seed(0)
    model = settings.build(num_classes)
    assert isinstance(model, SmpModule)
    return model


def images(height: int, width: int, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("arch", "encoder"), FEW)
def test_every_architecture_answers_at_the_images_size_and_learns(arch, encoder):
    check(arch, encoder)


@pytest.mark.long
@pytest.mark.parametrize(("arch", "encoder"), EVERY)
def test_every_architecture_with_every_encoder(arch, encoder):
    check(arch, encoder)


def check(arch: str, encoder: str) -> None:
    model = build(Smp(arch=arch, encoder=encoder), 3)
    assert model.training
    side = max(64, model.smallest)
    with torch.no_grad():
        model.eval()
        for height, width in ((side + model.stride, side), (model.smallest, side + 2 * model.stride)):
            assert model(images(height, width, 1)).shape == (1, 3, height, width)
    model.train()
    model(images(side, side)).square().mean().backward()
    # DDP waits for ever for the gradient of a parameter that learns but takes no part.
    assert [name for name, p in model.named_parameters() if (p.grad is None) == p.requires_grad] == []


@pytest.mark.parametrize(("arch", "encoder"), [("DeepLabV3Plus", "resnet18"), ("Segformer", "mit_b0")])
def test_it_overfits_a_small_batch(arch, encoder):
    x = images(64, 64) / 4
    target = torch.zeros(2, 64, 64, dtype=torch.long)
    target[0, 8:40, 16:48] = 1
    target[1, 32:, :24] = 1
    x += target[:, None] - 0.5
    model = build(Smp(arch=arch, encoder=encoder, dropout=0.0), 2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    with torch.no_grad():
        found = model(x).argmax(dim=1)
    iou = ((found == 1) & (target == 1)).sum() / ((found == 1) | (target == 1)).sum()
    assert iou.item() > 0.9


@pytest.mark.parametrize(("arch", "side"), [("DeepLabV3Plus", 64), ("UPerNet", 64), ("Unet", 32)])
def test_a_batch_of_one_that_batch_norm_can_not_take_is_said_in_a_sentence(arch, side):
    model = build(Smp(arch=arch), 2)
    with pytest.raises(
        InputError, match=rf"model {arch} with .*at least 2 images a worker, found 1; raise train.batch"
    ):
        model.train()(images(side, side, 1))
    assert model.eval()(images(side, side, 1)).shape == (1, 2, side, side)


def test_images_too_small_for_the_architecture_are_refused():
    model = build(Smp(arch="PAN"), 2).eval()
    with pytest.raises(InputError, match=r"PAN with .* sides of at least 128 pixels, found 96x128 .*larger input.size"):
        model(images(96, 128))


@pytest.mark.parametrize(
    ("arch", "options", "stride"),
    [("Unet", {"encoder_depth": 3, "decoder_channels": [16, 8, 4]}, 8), ("PSPNet", {}, 8)],
)
def test_the_stride_is_that_of_the_encoder_in_use(arch, options, stride):
    settings = Smp(arch=arch.lower(), dropout=0.1, options=options)
    model = build(settings, 4)
    assert model.stride == stride
    assert parse(describe(settings), "x") == settings
    with pytest.raises(InputError, match=rf"multiples of {stride}, found 64x{64 + stride // 2} "):
        model(images(64, 64 + stride // 2))


def test_stages_that_pspnet_does_not_use_do_not_learn():
    model = build(Smp(arch="PSPNet"), 2)
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"layer3", "layer4"}


def test_options_that_change_the_outputs_size_still_give_the_images():
    assert build(Smp(arch="FPN", options={"upsampling": 1}), 2).eval()(images(64, 96)).shape == (2, 2, 64, 96)


@pytest.mark.parametrize("arch", ["FPN", "DeepLabV3Plus", "DPT"])
def test_dropout_none_is_the_architectures_own(arch):
    encoder = VIT if arch == "DPT" else "resnet18"
    own = [layer.p for layer in dropout_layers(build(Smp(arch=arch, encoder=encoder), 2))]
    assert own == {"FPN": [0.2], "DeepLabV3Plus": [0.5], "DPT": [0.1]}[arch]
    assert dropout_layers(build(Smp(arch=arch, encoder=encoder, dropout=0.0), 2)) == []
    set_to = dropout_layers(build(Smp(arch=arch, encoder=encoder, dropout=0.35), 2))
    assert [layer.p for layer in set_to] == [0.35]


@pytest.mark.parametrize(("arch", "encoder"), [("Unet", "resnet18"), ("Segformer", "mit_b0"), ("UPerNet", "resnet18")])
def test_dropout_is_put_before_a_head_that_has_none_and_renames_nothing(arch, encoder):
    without, with_it = (build(Smp(arch=arch, encoder=encoder, dropout=p), 2).eval() for p in (None, 0.4))
    assert dropout_layers(without) == []
    (layer,) = dropout_layers(with_it)
    assert isinstance(layer, nn.Dropout2d)
    assert next(with_it.network.segmentation_head.children()) is layer
    with_it.load_state_dict(without.state_dict())
    x = images(64, 64)
    with torch.no_grad():
        assert torch.equal(without(x), with_it(x))


@pytest.mark.parametrize(("head", "num_classes", "outputs"), [("multiclass", 3, 3), ("binary", 2, 1)])
@pytest.mark.parametrize("arch", ["Unet", "DPT"])
def test_the_prior_is_the_bias_of_the_last_convolution(arch, head, num_classes, outputs):
    encoder = VIT if arch == "DPT" else "resnet18"
    prior = (1.0, 3.0, 4.0)[:num_classes]
    settings = Smp(arch=arch, encoder=encoder, head=head, prior=prior)
    model = build(settings, num_classes).eval()
    bias = [m for m in model.network.segmentation_head.modules() if isinstance(m, nn.Conv2d)][-1].bias
    total = sum(prior)
    wanted = [math.log(p / total) for p in prior] if head == "multiclass" else [math.log(1 / 3)]
    assert bias is not None
    assert bias.tolist() == pytest.approx(wanted)
    assert model(images(64, 64, 1)).shape == (1, outputs, 64, 64)
    assert parse(describe(settings), "x") == settings


def test_it_never_fetches_weights_for_a_skeleton(monkeypatch):
    asked = []
    real = smp.create_model
    monkeypatch.setattr(smp, "create_model", lambda *a, **k: asked.append(k["encoder_weights"]) or real(*a, **k))
    build_untrained(Smp(encoder_weights="imagenet"), 2)
    assert asked == [None]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arch": "Unett"}, r"no architecture 'Unett'. Did you mean 'Unet'\?"),
        ({"encoder": "resnet81"}, r"no encoder 'resnet81'. Did you mean 'resnet\d+'\?"),
        ({"options": {"encoder_dept": 3}}, r"Unet has no 'encoder_dept'. Did you mean 'encoder_depth'\?"),
        ({"options": {"encoder_depth": 9}}, r"options \{'encoder_depth': 9\} cannot be built"),
        ({"options": {"activation": "sigmoid"}}, r"'activation' is not to be given here; the output is raw logits"),
        ({"encoder": "tu-resnet18", "options": {"aux_params": {"classes": 2}}}, r"'aux_params' is not to be given"),
        ({"arch": "DPT"}, r"cannot be built: Only Timm encoders are supported for DPT"),
        ({"arch": "Linknet", "encoder": "mit_b0"}, r"cannot be built: Encoder `mit_b0` is not supported for Linknet"),
    ],
)
def test_what_it_does_not_know_or_can_not_do_is_named(values, message):
    with pytest.raises(InputError, match=message):
        Smp(**values).build(2)


def test_a_vit_of_one_size_names_it():
    model = build(Smp(arch="DPT", encoder=VIT, options={"dynamic_img_size": False}), 2).eval()
    assert model.smallest == 224
    with pytest.raises(InputError, match=r"Input height \(256\) doesn't match model \(224\).*input.size"):
        model(images(256, 256, 1))


def test_a_network_that_answers_no_image_is_refused_when_it_is_built(monkeypatch):
    def fail(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the sizes do not match")

    monkeypatch.setattr(smp.Unet, "forward", fail)
    wanted = (
        r"Unet with encoder 'resnet18' takes no image: the sizes do not match \(at 256x256 pixels\); choose another"
    )
    with pytest.raises(InputError, match=wanted):
        Smp().build(2)
