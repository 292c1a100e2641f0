"""The loss of segmentation: a weighted sum of terms."""

import inspect
import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from pipeline import schema
from pipeline.errors import InputError, nearest
from pipeline.losses import LOSSES, Term


@dataclass(frozen=True)
class LossTerm:
    """One term of the sum."""

    weight: float
    settings: dict[str, Any]
    """Keyword arguments of the loss function of this name."""


@dataclass(frozen=True)
class SegmentationLoss:
    """A weighted sum of ``pipeline.losses.LOSSES``."""

    terms: dict[str, LossTerm]

    @classmethod
    def parse(cls, values: dict[str, Any], where: str) -> Self:
        """From ``{"dice": 1.0, "focal": {"weight": 0.5, "gamma": 2}}``; {} = cross entropy alone.

        Raises:
            InputError: An unknown loss or setting, or a weight that is not positive; ``where`` is named in it.
        """
        values = values or {"cross_entropy": 1.0}
        return cls({name: _parse_term(name, value, where) for name, value in values.items()})

    def check(self, num_classes: int) -> None:
        """Refuse settings that the loss functions would refuse at the first step.

        Raises:
            InputError: A setting is out of its range, or does not fit the number of classes.
        """
        logits = torch.zeros(1, num_classes, 1, 1)
        void = torch.full((1, 1, 1), schema.VOID, dtype=torch.uint8)
        for name, term in self.terms.items():
            LOSSES[name](logits, void, **term.settings)

    def counts(self, masks: Tensor) -> dict[str, Tensor]:
        """Term -> labelled pixels or images of (N, H, W) masks, a float32 scalar."""
        return {name: LOSSES[name].count(masks) for name in self.terms}

    def __call__(self, logits: Tensor, masks: Tensor) -> dict[str, Term]:
        """Term -> (weight, sum, count) of (N, C, H, W) logits against (N, H, W) uint8 masks."""
        return {name: (term.weight, *LOSSES[name](logits, masks, **term.settings)) for name, term in self.terms.items()}


def _parse_term(name: str, value: Any, where: str) -> LossTerm:
    """A term from ``1.0`` or ``{"weight": 1.0, "gamma": 2}``."""
    if name not in LOSSES:
        raise InputError(f"{where}: unknown name '{name}'.{nearest(name, LOSSES)}")
    settings = dict(value) if isinstance(value, dict) else {"weight": value}
    weight = settings.pop("weight", 1.0)
    # YAML's true is an int in Python, and would pass as weight 1.
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise InputError(f"{where}.{name}: wanted a positive weight, found {weight!r}; write {name}: 1.0")
    # The settings of a loss are the keyword-only parameters of its function.
    parameters = inspect.signature(LOSSES[name].function).parameters.values()
    accepted = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    for key in settings:
        if key not in accepted:
            raise InputError(f"{where}.{name}: unknown key '{key}'.{nearest(key, ['weight', *accepted])}")
    values = {key: tuple(setting) if isinstance(setting, list) else setting for key, setting in settings.items()}
    return LossTerm(float(weight), values)
