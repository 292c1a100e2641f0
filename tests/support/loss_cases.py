"""Logits and masks for the tests of the losses of dense labels."""

from collections.abc import Iterator

import torch

from pipeline.losses import LOSSES
from pipeline.schema import VOID

TWO_CLASSES = ("binary_cross_entropy", "binary_focal", "lovasz_hinge")
"""Losses that refuse more."""
CASES = [(name, head) for name in LOSSES for head in (1, 2, 4) if head < 3 or name not in TWO_CLASSES]
"""(loss, channels of the head)."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(n: int = 3, channels: int = 4, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, channels, 8, 9) and a target with void; the last image is all void."""
    logits = torch.randn(n, channels, 8, 9, generator=generator(), dtype=dtype)
    target = torch.randint(0, max(2, channels), (n, 8, 9), generator=generator(), dtype=torch.uint8)
    target[:, 2:4] = VOID
    target[-1] = VOID
    return logits, target


def truth_logits(target: torch.Tensor, channels: int, scale: float) -> torch.Tensor:
    """Logits that say the truth, ``scale`` sure."""
    if channels == 1:
        return scale * (1 - 2 * target.clamp(max=1).float())[:, None]
    return scale * (target[:, None] == torch.arange(channels)[:, None, None]).float()


def variants(name: str) -> Iterator[dict]:
    """Settings that change how a loss is computed; the defaults first."""
    yield {}
    if name.endswith("cross_entropy"):
        yield {"boundary": 3.0, "boundary_width": 1.5, "smoothing": 0.1}
    if name in ("dice", "tversky", "jaccard"):
        yield {"smooth": 0.0, "skip": (1,)}
        yield {"smooth": 0.0, "per": "batch"}
    if name == "tversky":
        yield {"gamma": 0.5, "alpha": 0.0, "smooth": 0.0}
    if name == "lovasz":
        yield {"per": "batch"}
        yield {"skip": [0]}
    if name in ("focal", "binary_focal"):
        yield {"gamma": 0.5}
