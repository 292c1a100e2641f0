"""Any architecture and encoder of segmentation_models_pytorch (MIT), behind the common interface."""

import inspect
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.config import Settings
from pipeline.errors import InputError, nearest
from pipeline.models.layers import check_input

_OURS = {"self", "kwargs", "encoder_name", "encoder_weights", "in_channels", "classes"}
"""Arguments that are not the user's to give through ``options``."""


class Smp(Settings):
    """Settings of a segmentation_models_pytorch network; the library is imported by ``build`` only."""

    task: ClassVar[Literal["segmentation", "detection"]] = "segmentation"

    arch: str = "Unet"
    """Unet, UnetPlusPlus, MAnet, Linknet, FPN, PSPNet, DeepLabV3, DeepLabV3Plus, PAN, UPerNet, Segformer or
    DPT, in any case."""
    encoder: str = "resnet18"
    """A name of the library's own encoders, or ``tu-<timm name>``."""
    encoder_weights: str | None = None
    """None = random. A name such as ``imagenet`` DOWNLOADS weights when the network is built."""
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Probability of dropping a channel before the segmentation head (most of the library's have none)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the architecture, such as ``{encoder_depth: 4}``."""

    def build(self, num_classes: int) -> nn.Module:
        """The network; forward (N, 3, H, W) -> logits (N, num_classes, H, W)."""
        return SmpModule(self, num_classes)


class SmpModule(nn.Module):
    """Images (N, 3, H, W) -> logits (N, C, H, W), in train and eval alike; H, W multiples of ``stride``."""

    def __init__(self, settings: Smp, num_classes: int) -> None:
        super().__init__()
        self.network: Any = _create(settings, num_classes)
        # Some architectures work at any size; a multiple of the encoder's stride is right for all of them.
        depth = int(settings.options.get("encoder_depth", 5))
        self.stride = max(int(self.network.encoder.output_stride), 2**depth)
        if settings.dropout:
            head = self.network.segmentation_head
            self.network.segmentation_head = nn.Sequential(nn.Dropout2d(settings.dropout), head)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H, W)."""
        check_input(images, self.stride)
        return self.network(images)


def _create(settings: Smp, num_classes: int) -> nn.Module:
    """``create_model`` with the library's errors turned into sentences."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise InputError(
            f"model smp needs the package segmentation-models-pytorch ({error}); install it or use model unet"
        ) from None
    _check_names(smp, settings)
    try:
        return smp.create_model(
            settings.arch,
            encoder_name=settings.encoder,
            encoder_weights=settings.encoder_weights,
            in_channels=3,
            classes=num_classes,
            **settings.options,
        )
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"model: {settings.arch} with encoder '{settings.encoder}', encoder_weights "
            f"{settings.encoder_weights!r} and options {settings.options} cannot be built: {error}"
        ) from error


def _check_names(smp: Any, settings: Smp) -> None:
    """Refuse names that the library does not know: options it would swallow in silence."""
    classes = {name.lower(): cls for name, cls in smp.MODEL_ARCHITECTURES_MAPPING.items()}
    arch = settings.arch.lower()
    if arch not in classes:
        known = [cls.__name__ for cls in classes.values()]
        raise InputError(f"model.arch: no architecture '{settings.arch}'.{nearest(settings.arch, known)}")
    if settings.encoder.startswith("tu-"):
        return  # options not of the architecture are timm's
    encoders = smp.encoders.get_encoder_names()
    if settings.encoder not in encoders:
        hint = nearest(settings.encoder, encoders)
        raise InputError(f"model.encoder: no encoder '{settings.encoder}'.{hint}")
    options = set(inspect.signature(classes[arch].__init__).parameters) - _OURS
    for key in settings.options:
        if key not in options:
            raise InputError(f"model.options: {classes[arch].__name__} has no '{key}'.{nearest(key, options)}")
