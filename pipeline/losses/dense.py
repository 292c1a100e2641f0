"""What the losses of dense labels share: counts, the two kinds of head, and checks of settings.

Shapes, here and in ``pixel`` and ``region``: logits (N, C, H, W) raw, or (N, 1, H, W) of a binary head, whose z is
the logit of class 0 against class 1; target (N, H, W) uint8 class ids, VOID = 255 counted by nothing.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.schema import VOID


def valid_pixels(target: Tensor) -> Tensor:
    """Labelled pixels of (N, H, W) uint8: a float32 scalar."""
    return (target != VOID).sum().float()


def labelled_images(target: Tensor) -> Tensor:
    """Images of (N, H, W) uint8 with at least one labelled pixel: a float32 scalar."""
    return (target != VOID).flatten(1).any(dim=1).sum().float()


def categorical(logits: Tensor) -> Tensor:
    """Logits of all classes: (N, C, ...) as they are; (N, 1, ...) -> (N, 2, ...), ``[z, 0]``.

    The softmax of ``[z, 0]`` is ``[sigmoid(z), sigmoid(-z)]``.
    """
    return torch.cat([logits, torch.zeros_like(logits)], dim=1) if logits.shape[1] == 1 else logits


def binary_logit(logits: Tensor, loss: str, instead: str) -> Tensor:
    """Logit of class 0 against class 1, (N, ...): z of (N, 1, ...), z0 - z1 of (N, 2, ...).

    Args:
        logits: Of two classes.
        loss: Name for the error.
        instead: The loss to advise for more classes.

    Raises:
        InputError: More than two channels.
    """
    if logits.shape[1] > 2:
        raise InputError(
            f"loss.{loss}: wanted logits of two classes, found {logits.shape[1]} channels; use {instead}, "
            "or a dataset of one class and its background"
        )
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 0] - logits[:, 1]


def as_float32(logits: Tensor) -> Tensor:
    """In float32, or in float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def one_hot(target: Tensor, num_classes: int) -> Tensor:
    """(N, H, W) uint8 -> (N, C, H, W) bool; all False where void."""
    # A byte an entry, where F.one_hot takes eight.
    return target[:, None] == torch.arange(num_classes, device=target.device)[:, None, None]


def check_number(loss: str, low: float, high: float = math.inf, **values: Any) -> None:
    """Each of ``values`` (key = value) is a finite number from ``low`` to ``high``.

    Raises:
        InputError: One is not.
    """
    for key, value in values.items():
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not low <= value <= high
            or math.isinf(value)
        ):
            allowed = f"of at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
            raise InputError(f"loss.{loss}.{key}: wanted a number {allowed}, found {value!r}; mend the config")


def class_weights(loss: str, weights: Sequence[float] | None, scores: Tensor) -> Tensor | None:
    """``weights`` as a tensor (C,) beside ``scores`` (N, C, ...).

    Raises:
        InputError: Not one finite number >= 0 a class.
    """
    if weights is None:
        return None
    if not isinstance(weights, Sequence) or isinstance(weights, str) or len(weights) != scores.shape[1]:
        raise InputError(
            f"loss.{loss}.weights: wanted one number for each of {scores.shape[1]} classes, found {weights!r}; "
            "list them in the order of the classes"
        )
    for number, weight in enumerate(weights):
        check_number(loss, 0, **{f"weights[{number}]": weight})
    return _weights_row(tuple(map(float, weights)), scores.device, scores.dtype)


@lru_cache(maxsize=64)
def _weights_row(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Kept, since a copy to the device waits for it; usable by autograd whoever asked first."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype)


def without_classes(loss: str, present: Tensor, skip: Sequence[int]) -> Tensor:
    """``present`` (R, C) bool, False for the classes of ``skip``.

    Raises:
        InputError: ``skip`` is not a list of some, but not all, labels.
    """
    if not skip and skip != 0:
        return present
    classes = range(present.shape[1])
    labels = skip if isinstance(skip, Sequence) and not isinstance(skip, str) else None
    if labels is None or any(isinstance(c, bool) or not isinstance(c, int) or c not in classes for c in labels):
        raise InputError(
            f"loss.{loss}.skip: wanted a list of labels from 0 to {len(classes) - 1}, found {skip!r}; "
            "write it as [1], say"
        )
    if len(set(labels)) == len(classes):
        raise InputError(f"loss.{loss}.skip: wanted at least one class to be left, found all; skip fewer")
    kept = present.clone()
    for label in labels:
        kept[:, label] = False
    return kept


def check_per(loss: str, per: str) -> None:
    """``per`` is ``image`` or ``batch``.

    Raises:
        InputError: It is not.
    """
    if per not in ("image", "batch"):
        raise InputError(f"loss.{loss}.per: wanted image or batch, found {per!r}; the default is image")
