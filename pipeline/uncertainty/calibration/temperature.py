"""Temperature and vector scaling of the pool's probabilities, fitted by L-BFGS on a streamed sample."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.uncertainty.calibration.pixel_sample import MIN_PROBABILITY

TEMPERATURE_LIMITS = (0.05, 20.0)
"""Lowest and highest temperature, and inverse of a scale."""
_IDENTITY_PENALTY = 1e-4
"""Weight of the squared distance of a vector's log scales and biases from 0, against a mean NLL: a class that
the sample does not show would run away without."""

_OPTIMIZER_OPTIONS = {"ftol": 1e-12, "gtol": 1e-9, "maxiter": 500}
"""Of L-BFGS-B: tight, since the NLL is flat around its minimum."""

Kind = Literal["temperature", "vector"]


@dataclass(frozen=True)
class Calibration:
    """``parameters`` of ``kind``: ``temperature``, or ``scale`` and ``bias`` (C,); and the mean NLL in the sample."""

    kind: Kind
    parameters: dict[str, Any]
    nll_before: float
    nll_after: float

    def to_dict(self) -> dict[str, Any]:
        """As a bundle's manifest keeps it."""
        return asdict(self)


def fit_temperature(rows: tuple[np.ndarray, np.ndarray, np.ndarray], kind: Kind = "temperature") -> Calibration:
    """Minimise the weighted mean NLL of ``softmax(scale_c ln p_c + bias_c)`` by L-BFGS (Guo et al. 2017, 1706.04599).

    ``temperature``: one scale 1/T for all, no bias; the most probable class stays. ``vector``: one scale and one
    bias a class, biases summing to 0. Never worse than the identity, which is what it is where nothing helps.

    Args:
        rows: (log p (n, C), labels (n,), weights (n,)), as ``PixelSample.rows`` gives.
        kind: ``temperature`` or ``vector``.

    Raises:
        ValueError: No row.
    """
    log, labels, weights = rows
    if not len(labels):
        raise ValueError("a calibration cannot be fitted on no pixel")
    weights = weights / weights.sum()
    classes = log.shape[1]
    before = _nll(log, labels, weights, np.ones(classes), np.zeros(classes))[0]
    if kind == "temperature":
        parameters = _fit_single_temperature(log, labels, weights)
        identity: dict[str, Any] = {"temperature": 1.0}
    else:
        parameters = _fit_vector(log, labels, weights)
        identity = {"scale": [1.0] * classes, "bias": [0.0] * classes}
    after = _nll(log, labels, weights, *_scale_bias(parameters, classes))[0]
    # The penalty and the optimiser's tolerance can end a hair above the identity; NaN counts as worse, too.
    if not after < before:
        parameters, after = identity, before
    return Calibration(kind, parameters, float(before), float(after))


def _scale_bias(parameters: dict[str, Any], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias (C,) of either kind of parameters."""
    if "temperature" in parameters:
        return np.full(classes, 1 / parameters["temperature"]), np.zeros(classes)
    return np.array(parameters["scale"]), np.array(parameters["bias"])


def _nll(
    log: np.ndarray, labels: np.ndarray, weights: np.ndarray, scale: np.ndarray, bias: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """(weighted NLL, its gradients by scale and by bias)."""
    z = log * scale + bias
    # The largest exponent becomes 0, so that none overflows.
    z -= z.max(1, keepdims=True)
    p = np.exp(z)
    total = p.sum(1, keepdims=True)
    rows = np.arange(len(labels))
    value = float((weights * (np.log(total[:, 0]) - z[rows, labels])).sum())
    # The gradient by z is p - [c = label], weighted.
    p /= total
    p[rows, labels] -= 1
    p *= weights[:, None]
    return value, (p * log).sum(0), p.sum(0)


def _fit_single_temperature(log: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """``{"temperature": T}``; the search is over ln T, so that halving and doubling are equally far."""

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        scale = np.full(log.shape[1], np.exp(-x[0]))
        value, by_scale, _ = _nll(log, labels, weights, scale, np.zeros(log.shape[1]))
        return value, np.array([-(by_scale * scale).sum()])

    optimum = _minimise(objective, 1, [(np.log(TEMPERATURE_LIMITS[0]), np.log(TEMPERATURE_LIMITS[1]))])
    return {"temperature": float(np.exp(optimum[0]))}


def _fit_vector(log: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """``{"scale": (C,), "bias": (C,)}``; the search is over the logarithms of the scales, and the biases."""
    classes = log.shape[1]

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        scale, bias = np.exp(x[:classes]), x[classes:]
        value, by_scale, by_bias = _nll(log, labels, weights, scale, bias)
        gradient = np.concatenate([by_scale * scale, by_bias]) + 2 * _IDENTITY_PENALTY * x
        return value + _IDENTITY_PENALTY * float((x**2).sum()), gradient

    limit = np.log(TEMPERATURE_LIMITS[1])
    bounds = [(-limit, limit)] * classes + [(None, None)] * classes
    optimum = _minimise(objective, 2 * classes, bounds)
    # A constant added to all biases changes no probability: they are made to sum to 0.
    bias = optimum[classes:] - optimum[classes:].mean()
    return {"scale": np.exp(optimum[:classes]).tolist(), "bias": bias.tolist()}


def _minimise(objective: Any, size: int, bounds: Any) -> np.ndarray:
    """(size,) where ``objective``, which gives its value and gradient, is least; the search starts at 0."""
    from scipy.optimize import minimize  # here, since scipy is slow to import

    return minimize(objective, np.zeros(size), jac=True, method="L-BFGS-B", bounds=bounds, options=_OPTIMIZER_OPTIONS).x


def apply_temperature(calibration: dict[str, Any] | None, probabilities: Tensor) -> Tensor:
    """Calibrated probabilities (N, C, h, w); without a calibration, or with the identity, the input itself.

    Args:
        calibration: ``{"kind": ..., "parameters": ...}`` of a bundle's manifest, or None.
        probabilities: (N, C, h, w) float32 of the pool.
    """
    if calibration is None:
        return probabilities
    scale, bias = _scale_bias(calibration["parameters"], probabilities.shape[1])
    if (scale == 1).all() and (bias == 0).all():
        return probabilities
    logits = probabilities.clamp(min=MIN_PROBABILITY).log_()
    if "temperature" in calibration["parameters"]:
        return logits.mul_(float(scale[0])).softmax(1)
    row = torch.tensor(np.stack([scale, bias]), dtype=logits.dtype).to(logits.device)[:, :, None, None]
    return logits.mul_(row[0]).add_(row[1]).softmax(1)
