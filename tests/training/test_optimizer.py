"""Optimiser, schedule, clipping, averaged weights."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.models import backbone_layers
from pipeline.models.unet import UNet
from pipeline.training.optimizer import (
    Ema,
    OptimSettings,
    add_penalties,
    build_optimizer,
    clip_gradients,
    lr_at,
    set_lr,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_only_matrices_decay_and_nothing_is_left_out(name, kind):
    module = network()
    module[2].weight.requires_grad_(False)
    built = build_optimizer(OptimSettings(name=name, lr=0.1, weight_decay=0.5), module)
    assert isinstance(built, kind)
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    wanted = {id(p): (0.5 if p.ndim > 1 else 0.0) for p in module.parameters() if p.requires_grad}
    assert decay == wanted


def test_sgd_with_momentum_follows_its_recursion():
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    built = build_optimizer(OptimSettings(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.2), module)
    weight, velocity = 1.0, 0.0
    for _ in range(4):
        module.weight.grad = torch.full((1, 1), 2.0)
        built.step()
        velocity = 0.5 * velocity + 2.0 + 0.2 * weight
        weight -= 0.1 * velocity
    assert module.weight.item() == pytest.approx(weight, rel=1e-6)


def test_warm_up_then_half_a_cosine():
    settings = OptimSettings(lr=2.0, warmup_steps=4, final_lr_fraction=0.1)
    rates = [lr_at(settings, step, 15) for step in range(15)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[9] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2))
    assert rates[-1] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert lr_at(settings, 99, 15) == pytest.approx(0.2)


def test_the_schedule_survives_short_runs():
    settings = OptimSettings(lr=1.0, warmup_steps=100)
    for steps in (0, 1, 2, 3):
        rates = [lr_at(settings, step, steps) for step in range(max(steps, 1))]
        assert all(0 < rate <= 1 for rate in rates)
    assert lr_at(OptimSettings(lr=1.0, schedule="constant"), 50, 60) == 1.0


def test_set_lr_reaches_every_group():
    built = build_optimizer(OptimSettings(lr=0.1), network())
    set_lr(built, 0.025)
    assert [group["lr"] for group in built.param_groups] == [0.025, 0.025]


class Backboned(nn.Module):
    """Three backbone layers of two tensors each, and a head."""

    LAYERS = (("a.weight", "a.bias"), ("b.weight", "b.bias"), ("c.weight", "c.bias"))

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Linear(2, 2) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.c(self.b(self.a(x))))


def rates(built: torch.optim.Optimizer, module: nn.Module) -> dict[str, float]:
    lr = {id(p): group["lr"] for group in built.param_groups for p in group["params"]}
    return {name.removesuffix(".weight"): lr[id(p)] for name, p in module.named_parameters() if id(p) in lr}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_learning_rates_fall_layer_by_layer_down_the_backbone(name):
    module = Backboned()
    settings = OptimSettings(name=name, lr=0.1, backbone_lr=0.5, layer_decay=0.4)
    built = build_optimizer(settings, module, module.LAYERS)
    factors = {"a": 0.5 * 0.16, "b": 0.5 * 0.4, "c": 0.5, "head": 1.0}
    wanted = {each: factor for name, factor in factors.items() for each in (name, f"{name}.bias")}
    assert rates(built, module) == pytest.approx({key: 0.1 * value for key, value in wanted.items()}, rel=1e-12)
    set_lr(built, 0.02)
    assert rates(built, module) == pytest.approx({key: 0.02 * value for key, value in wanted.items()}, rel=1e-12)
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert decay == {id(p): settings.weight_decay if p.ndim > 1 else 0.0 for p in module.parameters()}


def test_one_factor_for_the_backbone_makes_few_groups():
    module = Backboned()
    assert len(build_optimizer(OptimSettings(), module, module.LAYERS).param_groups) == 2
    built = build_optimizer(OptimSettings(backbone_lr=0.1), module, module.LAYERS)
    assert sorted((group["scale"], len(group["params"])) for group in built.param_groups) == [
        (0.1, 3),
        (0.1, 3),
        (1.0, 1),
        (1.0, 1),
    ]


def test_frozen_layers_do_not_count_when_rates_fall():
    module = Backboned()
    module.c.requires_grad_(False)
    built = build_optimizer(OptimSettings(lr=1.0, layer_decay=0.5), module, module.LAYERS)
    found = rates(built, module)
    assert (found["a"], found["b"], found["head"]) == (0.5, 1.0, 1.0)
    assert "c" not in found


def test_the_layers_of_a_real_network_are_taken():
    module = UNet(width=4, depth=3).build(2)
    built = build_optimizer(OptimSettings(lr=1.0, layer_decay=0.5), module, backbone_layers(module))
    found = rates(built, module)
    assert [found[f"encoder.{level}.first.0"] for level in range(3)] == [0.25, 0.5, 1.0]
    assert found["heads.0"] == found["decoder.0.first.0"] == 1.0


def test_rates_by_layer_want_the_layers():
    with pytest.raises(ValueError, match="want the names of the backbone's layers"):
        build_optimizer(OptimSettings(backbone_lr=0.1), Backboned())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimisers_state_goes_round(name):
    settings = OptimSettings(name=name, lr=0.1, backbone_lr=0.5, layer_decay=0.4)
    torch.manual_seed(0)
    first = Backboned()
    second = copy.deepcopy(first)
    one = build_optimizer(settings, first, first.LAYERS)
    x = torch.randn(4, 2)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer, lr: float) -> None:
        optimizer.zero_grad()
        module(x).square().mean().backward()
        set_lr(optimizer, lr)
        optimizer.step()

    step(first, one, 0.05)
    second.load_state_dict(first.state_dict())
    two = build_optimizer(settings, second, second.LAYERS)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    two.load_state_dict(torch.load(buffer, weights_only=True))
    assert [group["scale"] for group in two.param_groups] == [group["scale"] for group in one.param_groups]
    step(first, one, 0.03)
    step(second, two, 0.03)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_from_before_there_were_scales_still_loads():
    module = network()
    built = build_optimizer(OptimSettings(), module)
    state = built.state_dict()
    for group in state["param_groups"]:
        del group["scale"]
    built.load_state_dict(state)
    set_lr(built, 0.5)
    assert [group["lr"] for group in built.param_groups] == [0.5, 0.5]


def test_penalties_are_the_gradient_of_their_formula():
    module, plain = network(), network()
    x = torch.randn(2, 3, 8, 8)
    settings = OptimSettings(l1=0.03, l2=0.2)
    module(x).square().mean().backward()
    add_penalties(settings, module)
    matrices = [p for p in plain.parameters() if p.ndim > 1]
    penalty = 0.03 * sum(p.abs().sum() for p in matrices) + 0.1 * sum(p.square().sum() for p in matrices)
    (plain(x).square().mean() + penalty).backward()
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8)


def test_penalties_spare_vectors_and_what_is_frozen():
    module = network()
    module[2].weight.requires_grad_(False)
    weights = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    add_penalties(OptimSettings(l1=1.0, l2=1.0), module)
    touched = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched == {"0.weight"}
    assert all(torch.equal(p, weights[name]) for name, p in module.named_parameters())
    add_penalties(OptimSettings(l1=1.0), nn.Linear(1, 1))  # nothing has a gradient yet


def test_l2_is_weight_decay_to_sgd():
    decayed, penalised = network(), network()
    x = torch.randn(2, 3, 8, 8)
    for module, settings in (
        (decayed, OptimSettings(name="sgd", lr=0.1, weight_decay=0.2)),
        (penalised, OptimSettings(name="sgd", lr=0.1, weight_decay=0.0, l2=0.2)),
    ):
        built = build_optimizer(settings, module)
        for _ in range(3):
            built.zero_grad()
            module(x).square().mean().backward()
            add_penalties(settings, module)
            built.step()
    for a, b in zip(decayed.parameters(), penalised.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_l1_drives_what_does_not_help_to_zero():
    torch.manual_seed(0)
    x = torch.randn(256, 2)
    module = nn.Linear(2, 1, bias=False)
    settings = OptimSettings(name="sgd", lr=0.02, momentum=0.0, weight_decay=0.0, l1=0.3)
    built = build_optimizer(settings, module)
    for _ in range(400):
        built.zero_grad()
        (module(x)[:, 0] - x[:, 0]).square().mean().backward()
        add_penalties(settings, module)
        built.step()
    useful, useless = module.weight[0].tolist()
    assert abs(useless) < 0.02
    assert useful == pytest.approx(1 - 0.15, abs=0.05)  # soft threshold: l1 / (2 E x^2)


@pytest.mark.parametrize(("clip", "after"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_clipping_scales_the_whole_gradient(clip, after):
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    for parameter, value in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([value])
    norm = clip_gradients(OptimSettings(clip=clip), parameters)
    assert norm.item() == pytest.approx(5.0)
    left = math.hypot(*(p.grad.item() for p in parameters if p.grad is not None))
    assert left == pytest.approx(after, rel=1e-5)


def test_ema_is_the_weighted_mean_of_what_it_saw():
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    ema = Ema(module, decay=0.15)
    wanted = 1.0
    for step, value in enumerate((2.0, 3.0, 5.0), start=1):
        nn.init.constant_(module.weight, value)
        ema.update(module)
        decay = min(0.15, (1 + step) / (10 + step))
        wanted = decay * wanted + (1 - decay) * value
    assert ema.module.get_parameter("weight").item() == pytest.approx(wanted, rel=1e-6)
    assert module.weight.item() == 5.0
    assert not ema.module.get_parameter("weight").requires_grad


def test_ema_takes_buffers_along():
    module = network().train()
    ema = Ema(module, decay=0.999)
    module(torch.randn(4, 3, 8, 8) + 5)
    ema.update(module)
    assert int(ema.module.get_buffer("1.num_batches_tracked")) == 1
    assert not torch.equal(ema.module.get_buffer("1.running_mean"), torch.zeros(4))
    assert not ema.module.training


def test_bad_settings_are_refused_by_name():
    with pytest.raises(InputError, match=r"c.yaml: optim: 'lr' = -1: .*greater than 0"):
        OptimSettings.parse({"lr": -1}, "c.yaml: optim")
    with pytest.raises(InputError, match=r"unknown key 'momentun'. Did you mean 'momentum'\?"):
        OptimSettings.parse({"momentun": 0.5}, "c.yaml: optim")
    with pytest.raises(InputError, match=r"'layer_decay' = 1.5: .*less than or equal to 1"):
        OptimSettings.parse({"layer_decay": 1.5}, "c.yaml: optim")
    with pytest.raises(InputError, match=r"'backbone_lr' = 0: .*greater than 0"):
        OptimSettings.parse({"backbone_lr": 0}, "c.yaml: optim")
