"""Augmentation: one draw, one warp and one colour matrix on the batch's device.

settings: what training images may go through, and presets
draw: every random parameter, a pure function of (seed, epoch, position)
geometry: drawn parameters -> Kornia's matrices -> one affine matrix; boxes moved by it
colour: brightness, contrast, saturation, hue and normalisation as one matrix
pixels: warp and colour of a batch's pixels, compiled on a GPU
mix: mosaic and mix-up, images and labels of several rows in one
effects: blur, noise and erasing, which have no matrix
apply: Augment, which makes of all these a batch for the network

The draw and the matrices are made on the host and travel by one copy.
"""

from pipeline.augment.apply import Augment
from pipeline.augment.draw import crop_offsets, draw_mix_partners, draw_parameters
from pipeline.augment.settings import PRESETS, AugmentSettings
from pipeline.images.input_settings import InputSettings

__all__ = [
    "PRESETS",
    "Augment",
    "AugmentSettings",
    "InputSettings",
    "crop_offsets",
    "draw_parameters",
    "draw_mix_partners",
]
