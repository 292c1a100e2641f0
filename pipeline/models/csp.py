"""What current one-stage detectors are made of: cross-stage-partial blocks, pooling, path aggregation, timm levels.

Sources: CSPNet (Wang et al. 2019, https://arxiv.org/abs/1911.11929), spatial pyramid pooling (He et al. 2014,
https://arxiv.org/abs/1406.4729), PANet (Liu et al. 2018, https://arxiv.org/abs/1803.01534); their proportions
after RTMDet (Lyu et al. 2022, https://arxiv.org/abs/2212.07784) and PP-YOLOE (Xu et al. 2022,
https://arxiv.org/abs/2203.16250). Plain 3x3 convolutions, not depthwise ones: those save operations, which
training on a GPU has in plenty, and cost memory traffic, which it has not.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import InputError, nearest, one_line
from pipeline.models.layers import Norm, norm_layer


def conv_silu(inputs: int, outputs: int, norm: Norm, *, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution (odd kernel, same size; no bias: the norm has one), norm, SiLU (1710.05941)."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, norm_layer(norm, outputs), nn.SiLU(inplace=True))


class Inner(nn.Module):
    """``x + f(x)`` with two 3x3 convolutions in f, nothing after the sum; (N, c, H, W) -> (N, c, H, W)."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.first = conv_silu(channels, channels, norm)
        self.second = conv_silu(channels, channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c, H, W) -> (N, c, H, W)."""
        return x + self.second(self.first(x))


class Csp(nn.Module):
    """One half of the channels passes by, the other goes through ``depth`` inner blocks; a 1x1 joins them.

    (N, inputs, H, W) -> (N, outputs, H, W).
    """

    def __init__(self, inputs: int, outputs: int, depth: int, norm: Norm) -> None:
        super().__init__()
        half = max(1, outputs // 2)
        # One convolution for both halves: half the launches, and the input is read once.
        self.split = conv_silu(inputs, 2 * half, norm, kernel=1)
        self.blocks = nn.Sequential(*(Inner(half, norm) for _ in range(depth)))
        self.join = conv_silu(2 * half, outputs, norm, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W)."""
        bypass, through = self.split(x).chunk(2, dim=1)
        return self.join(torch.cat([bypass, self.blocks(through)], dim=1))


class PyramidPooling(nn.Module):
    """A location's maximum over itself and 5, 9 and 13 locations around, joined by a 1x1; the same shape.

    5x5 maxima of 5x5 maxima are those of 9x9, and so on: the wide windows cost what narrow ones do.
    """

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        half = max(1, channels // 2)
        self.before = conv_silu(channels, half, norm, kernel=1)
        self.join = conv_silu(4 * half, channels, norm, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, c, H, W) -> (N, c, H, W)."""
        levels = [self.before(x)]
        for _ in range(3):
            levels.append(F.max_pool2d(levels[-1], 5, stride=1, padding=2))
        return self.join(torch.cat(levels, dim=1))


def csp_stage(inputs: int, outputs: int, depth: int, norm: Norm, *, pool: bool = False) -> nn.Sequential:
    """Halves the sides: 3x3 convolution of stride 2, pyramid pooling where asked for, a CSP block."""
    pooling = [PyramidPooling(outputs, norm)] if pool else []
    return nn.Sequential(conv_silu(inputs, outputs, norm, stride=2), *pooling, Csp(outputs, outputs, depth, norm))


class Pan(nn.Module):
    """Path aggregation: a top-down pass, then a bottom-up one, each with concatenation and a CSP block a level.

    Args:
        inputs: Channels of the backbone's levels, fine to coarse.
        widths: Channels of the neck's levels.
        outputs: Channels of every level that leaves.
        depth: Inner blocks of each CSP block.
        norm: Kind of norm.
    """

    def __init__(self, inputs: Sequence[int], widths: Sequence[int], outputs: int, depth: int, norm: Norm) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(
            nn.Identity() if before == width else conv_silu(before, width, norm, kernel=1)
            for before, width in zip(inputs, widths, strict=True)
        )
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.reduce = nn.ModuleList(conv_silu(coarse, fine, norm, kernel=1) for fine, coarse in pairs)
        self.down_blocks = nn.ModuleList(Csp(2 * fine, fine, depth, norm) for fine, _ in pairs)
        self.halve = nn.ModuleList(conv_silu(fine, fine, norm, stride=2) for fine, _ in pairs)
        self.up_blocks = nn.ModuleList(Csp(2 * fine, coarse, depth, norm) for fine, coarse in pairs)
        self.out = nn.ModuleList(conv_silu(width, outputs, norm, kernel=1) for width in widths)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Fine to coarse (N, c_i, h_i, w_i) -> fine to coarse (N, outputs, h_i, w_i)."""
        levels = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        last = len(levels) - 1
        # Top-down: each level learns from the coarser one, which has seen more of the image.
        for at in range(last - 1, -1, -1):
            levels[at + 1] = self.reduce[at](levels[at + 1])
            wide = F.interpolate(levels[at + 1], scale_factor=2.0, mode="nearest")
            levels[at] = self.down_blocks[at](torch.cat([levels[at], wide], dim=1))
        # Bottom-up: each level learns from the finer one, which knows better where edges are.
        for at in range(last):
            narrow = self.halve[at](levels[at])
            levels[at + 1] = self.up_blocks[at](torch.cat([narrow, levels[at + 1]], dim=1))
        return [out(level) for out, level in zip(self.out, levels, strict=True)]


def timm_levels(name: str, strides: Sequence[int]) -> tuple[nn.Module, list[int]]:
    """A timm network that gives its features at ``strides`` only, with random weights, and their channels.

    What it does not need for them is left out, and what takes no part stops learning: data-parallel training
    would wait for its gradients for ever. Nothing is downloaded: see ``pipeline.models.transfer`` for weights.

    Raises:
        InputError: No such name, or no features (N, c, h, w) at those strides.
    """
    import timm

    if not timm.is_model(name):
        raise InputError(f"model.backbone: timm has no model '{name}'.{_nearest_name(name, timm.list_models())}")
    try:
        info: Any = timm.create_model(name, pretrained=False, features_only=True).feature_info
        all_strides = [int(stride) for stride in info.reduction()]
        if not set(strides) <= set(all_strides):
            raise InputError(
                f"model.backbone: '{name}' has features at strides {all_strides}, wanted {list(strides)}; set "
                f"model.strides to some of them, or choose another backbone"
            )
        # The last of several at one stride is the one that has seen most.
        indices = [len(all_strides) - 1 - all_strides[::-1].index(stride) for stride in strides]
        network = timm.create_model(name, pretrained=False, features_only=True, out_indices=indices)
        channels = [int(info.channels()[at]) for at in indices]
        _check_features(network, channels, strides, name)
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"model.backbone: '{name}' gives no features ({one_line(error)}); choose a "
            f"convolutional one, such as resnet18"
        ) from error
    return network, channels


def _check_features(network: nn.Module, channels: Sequence[int], strides: Sequence[int], name: str) -> None:
    """Run the network on one small image: refuse unexpected shapes, freeze parameters that take no part.

    Raises:
        InputError: The features have other shapes than ``channels`` and ``strides`` say.
    """
    side = 2 * strides[-1]
    # In eval mode, so that the statistics of batch norm stay as they were initialised or loaded.
    network.eval()
    with torch.enable_grad():
        features = network(torch.zeros(1, 3, side, side))
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        # A parameter that no feature depends on has no gradient.
        total = torch.stack([feature.sum() for feature in features]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    network.train()
    shapes = [tuple(feature.shape[1:]) for feature in features]
    expected_shapes = [(width, side // stride, side // stride) for width, stride in zip(channels, strides, strict=True)]
    if shapes != expected_shapes:
        raise InputError(
            f"model.backbone: '{name}' gives features of shapes {shapes} for {side}x{side} pixels, wanted "
            f"{expected_shapes} (channels, height, width); choose another backbone"
        )
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)


def _nearest_name(name: str, names: list[str]) -> str:
    """A hint that names the nearest of ``names``: they are thousands, too many to list."""
    return nearest(name, names).split(" Known:")[0] or " timm.list_models() lists them."
