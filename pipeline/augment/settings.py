"""Settings of the network's input frame and of augmentation."""

from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from pipeline.config import Settings

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, lt=1)]


class AugmentSettings(Settings):
    """What training images may go through; everything is off by default.

    Only ops that move image, mask and boxes by one and the same affine matrix, or that move nothing, are
    here, and mosaic and mix-up, which are made of such. Others (elastic, thin plate, fisheye) would leave
    boxes or masks behind, so their names are unknown keys.

    An image's parameters depend on the seed, its epoch and its position alone. Mosaic and mix-up are the
    exception: they take their other images from the local batch, so what an image is mixed with changes
    with ``train.batch_size`` and ``train.workers``.
    """

    hflip: Probability = 0.0
    """Probability of a left-right flip."""
    vflip: Probability = 0.0
    """Probability of an up-down flip."""
    quarter_turns: Probability = 0.0
    """Probability of a turn by 90, 180 or 270 degrees; by 180 alone unless the input is square."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Largest angle in degrees, either way round."""
    translate: Strength = 0.0
    """Largest shift either way, as a fraction of the input's width and height."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest magnification, drawn evenly in its logarithm; above 1 crops into the image."""
    shear: Annotated[float, Field(ge=0, lt=80)] = 0.0
    """Largest shear along x in degrees, either way."""
    brightness: Strength = 0.0
    """Largest value added or taken away, on the 0..1 scale."""
    contrast: Strength = 0.0
    """Values are multiplied by 1 - contrast to 1 + contrast."""
    saturation: Strength = 0.0
    """Distances from grey are multiplied by 1 - saturation to 1 + saturation."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    """Largest turn of the hue either way, as a fraction of the full circle; luma stays."""
    blur: Probability = 0.0
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.3, 1.5)
    """Smallest and largest standard deviation of the blur in pixels of the input."""
    noise: Probability = 0.0
    """Probability of Gaussian noise."""
    noise_std: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest standard deviation of the noise on the 0..1 scale; drawn from 0 up."""
    erase: Probability = 0.0
    """Probability of erasing a rectangle of the image (Zhong et al. 2017); its labels stay."""
    erase_area: tuple[float, float] = (0.02, 0.2)
    """Smallest and largest share of the input's area that is erased."""
    min_visible: Annotated[float, Field(ge=0, le=1)] = 0.25
    """A box is dropped when less than this fraction of its area stays in the input."""
    mosaic: Probability = 0.0
    """Probability that four images of the local batch share the input (Bochkovskiy et al. 2020, 2004.10934):
    each fills a quadrant at its own scale, from its inner corner outwards, so that seams cut no object and the
    edge of the input does; ``scale`` below 1 shows more of all four. A batch of one is left alone."""
    mosaic_centre: tuple[float, float] = (0.2, 0.8)
    """Smallest and largest place of the point where the four meet, as a fraction of width and of height."""
    mixup: Probability = 0.0
    """Probability that an image is blended with another of the local batch and the boxes of both are kept
    (Zhang et al. 2018, 1710.09412; Zhang et al. 2019, 1902.04103). Not for masks: labels cannot be blended."""
    mixup_alpha: Annotated[float, Field(gt=0, le=1000)] = 8.0
    """The image's share of a blend is drawn from Beta(alpha, alpha). 1902.04103 found 1.5 best with losses
    weighted by the share; here boxes of both images count in full, so both should be seen: with 8, 95 % of
    the shares lie within 0.27 and 0.73."""
    mix_close: Annotated[float, Field(ge=0)] = 1.0
    """Passes at the end of the run without mosaic and mix-up: epochs that begin within them have none. Seams and
    faint objects are not what the network will meet: its last steps, and the running statistics of its layers,
    come from whole images (as YOLOX ends, Ge et al. 2021, 2107.08430)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, low, high in [
            ("scale", 0.05, 20),
            ("blur_sigma", 0.05, 20),
            ("erase_area", 0, 1),
            ("mosaic_centre", 0, 1),
        ]:
            first, last = getattr(self, name)
            if not low <= first <= last <= high:
                raise ValueError(f"{name} wants two rising numbers within {low}..{high}, found {first}, {last}")
        return self

    @property
    def moves(self) -> bool:
        """Whether any op needs a warp."""
        return bool(self.flips or self.affine)

    @property
    def flips(self) -> bool:
        """Whether any flip or quarter turn is on."""
        return bool(self.hflip or self.vflip or self.quarter_turns)

    @property
    def affine(self) -> bool:
        """Whether rotation, translation, scale or shear is on."""
        return bool(self.rotate or self.translate or self.shear) or self.scale != (1.0, 1.0)

    @property
    def colours(self) -> bool:
        """Whether any linear colour op is on."""
        return bool(self.brightness or self.contrast or self.saturation or self.hue)

    @property
    def mixes(self) -> bool:
        """Whether mosaic or mix-up is on."""
        return bool(self.mosaic or self.mixup)


PRESETS: Final[dict[str, AugmentSettings]] = {
    "none": AugmentSettings(),
    "light": AugmentSettings(hflip=0.5, brightness=0.1, contrast=0.1),
    "natural": AugmentSettings(
        hflip=0.5,
        rotate=10,
        translate=0.1,
        scale=(0.75, 1.5),
        brightness=0.15,
        contrast=0.2,
        saturation=0.3,
        hue=0.03,
    ),
    "any_direction": AugmentSettings(
        hflip=0.5,
        vflip=0.5,
        quarter_turns=0.75,
        scale=(0.8, 1.25),
        brightness=0.1,
        contrast=0.2,
        saturation=0.2,
        hue=0.05,
    ),
}
"""Starting points: upright photographs are ``natural``, microscopy and aerial images ``any_direction``."""
