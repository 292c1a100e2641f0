"""Figures as plain JSON types: what ``compute`` of every metric returns."""

import math
from typing import Any

import numpy as np


def plain_json(value: Any) -> Any:
    """Arrays and numpy's scalars, nested in dicts and lists, as Python's own types; what is not finite is None."""
    if isinstance(value, dict):
        return {name: plain_json(element) for name, element in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, list):
        return [plain_json(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
