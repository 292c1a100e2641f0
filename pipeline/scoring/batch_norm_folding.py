"""Batch normalisation folded into the convolution before it: the same function, one pass over the maps less."""

import dataclasses
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

TOLERANCE = 1e-3
"""Largest difference of outputs, as a share of their largest value, at which a folded network is the same one: float32
rounds otherwise in another order (4e-4 of 41 in a U-Net with a ResNet-34)."""


def fold_batch_norms(module: nn.Module, side: int) -> nn.Module:
    """A copy of a network in eval mode whose batch norms are folded; the network itself where that cannot be.

    Which convolution feeds which norm is seen by running it once. What is folded are plain ``Conv2d`` whose output
    goes to one plain ``BatchNorm2d``, always the same; then the outputs are compared.

    Args:
        module: (N, 3, H, W) -> tensors, in any tuples, lists, dicts or dataclasses.
        side: Of the square input to try it on, in pixels.
    """
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn((2, 3, side, side), generator=generator).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        outputs = list(_tensors(module(sample)))
        folded = deepcopy(module)
        for conv, norm in _pairs(folded, lambda: folded(sample)):
            fused = fuse_conv_bn_eval(folded.get_submodule(conv), folded.get_submodule(norm))  # pyright: ignore
            folded.set_submodule(conv, fused)
            folded.set_submodule(norm, nn.Identity())
        folded = folded.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        folded_outputs = list(_tensors(folded(sample)))
    return folded if len(outputs) == len(folded_outputs) and all(map(_close, outputs, folded_outputs)) else module


def _pairs(module: nn.Module, run: Callable[[], Any]) -> list[tuple[str, str]]:
    """Names of (convolution, norm) where the norm always takes what that convolution alone gave."""
    conv_outputs: dict[int, tuple[str, Tensor]] = {}  # keeps the outputs, so that no other can have their identity
    norms: dict[str, set[str | None]] = {}
    convs: dict[str, set[str]] = {}

    def record(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            conv_outputs[id(output)] = (name, output)
            return
        source = conv_outputs.get(id(inputs[0]), (None, None))[0]
        norms.setdefault(name, set()).add(source)
        if source is not None:
            convs.setdefault(source, set()).add(name)

    def hook(name: str) -> Callable[..., None]:
        return lambda layer, inputs, output: record(name, layer, inputs, output)

    layers = [(name, layer) for name, layer in module.named_modules() if type(layer) in (nn.Conv2d, nn.BatchNorm2d)]
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    single = {norm: sources.pop() for norm, sources in norms.items() if len(sources) == 1}
    return [(conv, norm) for norm, conv in single.items() if conv is not None and len(convs[conv]) == 1]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)


def _close(output: Tensor, folded_output: Tensor) -> bool:
    if output.shape != folded_output.shape:
        return False
    if not output.numel():
        return True
    output, folded_output = output.float(), folded_output.float()
    return bool((output - folded_output).abs().amax() <= TOLERANCE * output.abs().amax().clamp(min=1e-6))
