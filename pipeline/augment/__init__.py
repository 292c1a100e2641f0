"""Augmentation: frame on the CPU, then one draw, one warp and one colour matrix on the batch's device.

frame (CPU, uint8 canvases) -> Batch -> Augment (draw -> Kornia's matrices -> warp, mix -> colour -> effects)
The draw and the matrices are made on the host and travel by one copy.
unframe_maps, unframe_boxes: from the network's frame back to an image's own pixels
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
