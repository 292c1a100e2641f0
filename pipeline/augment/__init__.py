"""Augmentation of images, masks and boxes together: one draw, one warp and one colour matrix on the batch's device.

Batch (uint8 canvases) -> draw -> Kornia's matrices -> warp, mix -> colour -> effects. The draw and the matrices are
made on the host and travel by one copy.

settings: what may happen to an image, and the presets
draw: every parameter as a pure function of seed, epoch and position
geometry: drawn parameters -> Kornia's matrices -> one affine matrix; boxes moved by it
colour: brightness, contrast, saturation, hue and normalisation as one matrix
mix: mosaic and mix-up of a local batch
effects: blur, noise and erasing, after the warp
pixels: what touches every pixel, compiled on a GPU, in chunks of rows on a CPU
apply: ``Augment``, all of it in order
"""

from pipeline.augment.apply import Augment
from pipeline.augment.draw import crop_offsets, draw_mix_partners, draw_parameters
from pipeline.augment.settings import PRESETS, AugmentSettings

__all__ = [
    "PRESETS",
    "Augment",
    "AugmentSettings",
    "crop_offsets",
    "draw_parameters",
    "draw_mix_partners",
]
