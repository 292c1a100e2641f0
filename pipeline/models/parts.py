"""Parts of a network that others ask for: its dropout layers, and its backbone's layers in order."""

import re
from collections.abc import Iterator

from torch import nn

from pipeline.errors import InputError

DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def dropout_layers(module: nn.Module) -> list[nn.Module]:
    """Every layer that drops something in train mode: of torch's own classes, with p > 0.

    Stochastic depth (``DropPath``) is no dropout here: Monte-Carlo dropout (Gal & Ghahramani 2016,
    https://arxiv.org/abs/1506.02142) samples units, not blocks.
    """
    return [layer for layer in module.modules() if isinstance(layer, DROPOUT) and layer.p > 0]


def enable_dropout(module: nn.Module, on: bool) -> None:
    """Put a network in eval mode, but with ``on`` its dropout layers in train mode: batch norm stays as learnt.

    Without dropout layers ``on`` changes nothing; ask ``dropout_layers`` first.
    """
    module.eval()
    for layer in dropout_layers(module) if on else ():
        layer.train()


def backbone_layers(module: nn.Module) -> list[list[str]]:
    """Names of the backbone's parameters by layer, input first; each name once, as ``module`` names it.

    A layer is what shares the first component of its name, and the second where that is a number: ``conv1``,
    ``layer1.0``, ``layer1.1``. A norm belongs to the layer before it; a bare parameter (a position embedding)
    to the first one. Order is that of definition, but ``patch_embed1..4, block1..4`` are taken stage by stage.

    Args:
        module: A network of ``pipeline.models``, which lists its ``backbone``.
    """
    names = {id(child): name for name, child in module.named_modules()}
    layers: list[list[str]] = []
    for part in module.backbone:  # pyright: ignore[reportGeneralTypeIssues]
        prefix = f"{names[id(part)]}."
        for layer in _layers(part):
            matrices = any(part.get_parameter(name).ndim > 1 for name in layer)
            full = [prefix + name for name in layer]
            if matrices or not layers:
                layers.append(full)
            else:
                layers[-1] += full
    return layers


def _layers(part: nn.Module) -> Iterator[list[str]]:
    """One part's parameter names, grouped by name alone; bare ones lead the first group."""
    names = [name for name, _ in part.named_parameters()]
    cut = _shared(names)
    bare: list[str] = []
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        modules = name.split(".")[cut:-1]
        if not modules:
            bare.append(name)
            continue
        numbered = len(modules) > 1 and modules[1].isdigit()
        groups.setdefault(tuple(modules[: 2 if numbered else 1]), []).append(name)
    first, *rest = [groups[key] for key in _by_stage(list(groups))] or [[]]
    yield from (layer for layer in [bare + first, *rest] if layer)


def _shared(names: list[str]) -> int:
    """Leading modules, none of them a number, that all names share: ``model.`` around a timm encoder."""
    count = 0
    for column in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(column)) > 1 or column[0].isdigit():
            break
        count += 1
    return count


def _by_stage(keys: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Sort by stage where every family of names has the same stages.

    smp's MiT defines all its patch embeddings before its first block, yet runs embedding and blocks by turns.
    """
    stages: dict[str, set[int]] = {}
    for key in keys:
        match = re.fullmatch(r"(\D+)(\d+)", key[0])
        if match is None:
            return keys
        stages.setdefault(match[1], set()).add(int(match[2]))
    if len(stages) < 2 or len({frozenset(numbers) for numbers in stages.values()}) > 1:
        return keys
    return sorted(keys, key=lambda key: int(re.sub(r"\D", "", key[0])))


def require_dropout(module: nn.Module, passes: int, where: str) -> None:
    """Refuse Monte-Carlo dropout of a network that drops nothing; ``where`` (bundle, config) begins the InputError."""
    if passes and not dropout_layers(module):
        raise InputError(
            f"{where}: predict.dropout_passes is {passes}, but its model has no dropout to sample; train one with "
            f"model.dropout, or set dropout_passes to 0"
        )
