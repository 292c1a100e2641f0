"""Optimiser, schedule, clipping, averaged weights."""

import math

import pytest
import torch
from torch import nn

from pipeline import optim
from pipeline.errors import InputError
from pipeline.optim import Ema, OptimSettings


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_only_matrices_decay_and_nothing_is_left_out(name, kind):
    module = network()
    module[2].weight.requires_grad_(False)
    built = optim.build(OptimSettings(name=name, lr=0.1, weight_decay=0.5), module)
    assert isinstance(built, kind)
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    wanted = {id(p): (0.5 if p.ndim > 1 else 0.0) for p in module.parameters() if p.requires_grad}
    assert decay == wanted


def test_sgd_with_momentum_follows_its_recursion():
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 1.0)
    built = optim.build(OptimSettings(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.2), module)
    weight, velocity = 1.0, 0.0
    for _ in range(4):
        module.weight.grad = torch.full((1, 1), 2.0)
        built.step()
        velocity = 0.5 * velocity + 2.0 + 0.2 * weight
        weight -= 0.1 * velocity
    assert module.weight.item() == pytest.approx(weight, rel=1e-6)


def test_warm_up_then_half_a_cosine():
    settings = OptimSettings(lr=2.0, warmup_steps=4, final_lr_fraction=0.1)
    rates = [optim.lr_at(settings, step, 15) for step in range(15)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[9] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2))
    assert rates[-1] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert optim.lr_at(settings, 99, 15) == pytest.approx(0.2)


def test_the_schedule_survives_short_runs():
    settings = OptimSettings(lr=1.0, warmup_steps=100)
    for steps in (0, 1, 2, 3):
        rates = [optim.lr_at(settings, step, steps) for step in range(max(steps, 1))]
        assert all(0 < rate <= 1 for rate in rates)
    assert optim.lr_at(OptimSettings(lr=1.0, schedule="constant"), 50, 60) == 1.0


def test_set_lr_reaches_every_group():
    built = optim.build(OptimSettings(lr=0.1), network())
    optim.set_lr(built, 0.025)
    assert [group["lr"] for group in built.param_groups] == [0.025, 0.025]


@pytest.mark.parametrize(("clip", "after"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_clipping_scales_the_whole_gradient(clip, after):
    parameters = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    for parameter, value in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([value])
    norm = optim.clip_gradients(OptimSettings(clip=clip), parameters)
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
