"""Batch norms are folded where the network stays the same function, and nowhere else."""

import pytest
import torch
from torch import Tensor, nn

from pipeline import models
from pipeline.scoring.batch_norm_folding import _tensors, fold_batch_norms


def used(model: nn.Module, seed: int = 0) -> nn.Module:
    """With batch statistics as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean = torch.randn(each.num_features, generator=generator) * 0.3
            each.running_var = torch.rand(each.num_features, generator=generator) + 0.5
            each.weight.data = torch.rand(each.num_features, generator=generator) + 0.5
            each.bias.data = torch.randn(each.num_features, generator=generator) * 0.3
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(each, nn.BatchNorm2d) for each in model.modules())


@pytest.mark.parametrize(
    ("settings", "left"),  # anchor_free: those of heads that all levels share
    [
        ({"name": "unet", "width": 8, "depth": 2}, 0),
        ({"name": "smp", "arch": "unet", "encoder": "resnet18", "encoder_weights": None}, 0),
        ({"name": "anchor_free"}, 6),
        ({"name": "torchvision", "arch": "ssdlite320_mobilenet_v3_large"}, None),
    ],
)
def test_a_folded_network_says_the_same(settings: dict[str, object], left: int | None):
    torch.manual_seed(0)
    model = used(models.parse(settings, "test").build(3))
    before = norms(model)
    folded = fold_batch_norms(model, 2 * max(32, int(getattr(model, "stride", 1))))
    assert before > 0
    assert norms(model) == before, "the network itself is left alone"
    if left is not None:
        assert norms(folded) == left
    images = torch.randn(1, 3, 128, 128)
    with torch.inference_mode():
        for one, other in zip(_tensors(model(images)), _tensors(folded(images)), strict=True):
            torch.testing.assert_close(other.float(), one.float(), rtol=1e-3, atol=1e-3)


class Shared(nn.Module):
    """One convolution whose output goes to a norm, and elsewhere; or to two norms; or which runs twice."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.other = kind, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> Tensor:
        made = self.conv(images)
        if self.kind == "elsewhere":
            return self.one(made) + made
        if self.kind == "two norms":
            return self.one(made) + self.two(made)
        if self.kind == "two convolutions":
            return self.one(made) + self.one(self.other(images))
        return self.two(self.conv(self.one(made)))


@pytest.mark.parametrize("kind", ["elsewhere", "two norms", "two convolutions", "twice"])
def test_what_cannot_be_folded_stays(kind: str):
    torch.manual_seed(0)
    model = used(Shared(kind))
    folded = fold_batch_norms(model, 32)
    assert norms(folded) == 2
    images = torch.randn(1, 3, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(folded(images), model(images))
