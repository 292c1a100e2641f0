"""What a network is given: size, fit, normalisation."""

from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from pipeline.config import Settings


class InputSettings(Settings):
    """What the network sees."""

    size: tuple[int, int]
    """Height and width in pixels; one number means a square."""
    fit: Literal["crop", "letterbox", "stretch"] = "letterbox"
    """``crop`` keeps the native resolution (random windows in training, whole images otherwise)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Of red, green and blue on the 0..1 scale; also the colour outside the image. Default: ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.size) < 1:
            raise ValueError(f"size wants two positive numbers (height, width), found {self.size}")
        if min(self.std) <= 0:
            raise ValueError(f"std wants three positive numbers, found {self.std}")
        return self
