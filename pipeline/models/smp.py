"""Any architecture and encoder of segmentation_models_pytorch (MIT), behind the common interface."""

import inspect
import math
from collections import OrderedDict
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import Settings
from pipeline.errors import InputError, nearest
from pipeline.models.layers import Head, check_input, outputs_of, set_prior
from pipeline.models.parts import DROPOUT, dropout_layers

_RESERVED = {"self", "kwargs", "encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params"}
"""Arguments that cannot be given through ``options``: the output stays raw logits alone."""


class Smp(Settings):
    """Settings of a segmentation_models_pytorch network; the library is imported by ``build`` only."""

    task: ClassVar[Literal["segmentation", "detection"]] = "segmentation"

    arch: str = "Unet"
    """Unet, UnetPlusPlus, MAnet, Linknet, FPN, PSPNet, DeepLabV3, DeepLabV3Plus, PAN, UPerNet, Segformer or
    DPT, in any case."""
    encoder: str = "resnet18"
    """A name of the library's own encoders, or ``tu-<timm name>``; DPT wants a ``tu-vit...``."""
    encoder_weights: str | None = None
    """None = random. A name such as ``imagenet`` DOWNLOADS weights when the network is built."""
    head: Head = "multiclass"
    """``binary``, for two classes: one logit, that of class 0 against class 1."""
    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """None = the architecture's own. A number: that probability in every dropout of decoder and head; where
    they have none, of dropping a channel before the head. Names of weights do not depend on it."""
    prior: tuple[float, ...] | None = None
    """How frequent each class is (pixels; any scale), set as the first answer."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the architecture, such as ``{encoder_depth: 4}``."""

    def build(self, num_classes: int) -> nn.Module:
        """The network; forward (N, 3, H, W) -> logits (N, outputs, H, W)."""
        return SmpModule(self, num_classes)

    def outputs(self, num_classes: int) -> int:
        """Channels of the logits; InputError where a binary head meets other than two classes."""
        return outputs_of(self.head, num_classes)


class SmpModule(nn.Module):
    """Images (N, 3, H, W) -> logits (N, C, H, W), in train and eval alike; H, W multiples of ``stride``."""

    def __init__(self, settings: Smp, num_classes: int) -> None:
        super().__init__()
        self.network: Any = _create(settings, settings.outputs(num_classes))
        self.name = f"{type(self.network).__name__} with encoder '{settings.encoder}'"
        self.stride = _stride(self.network, settings)
        if settings.dropout is not None:
            _set_dropout(self.network, settings.dropout)
        if settings.prior is not None:
            convs = [layer for layer in self.network.segmentation_head.modules() if isinstance(layer, nn.Conv2d)]
            set_prior(convs[-1].get_parameter("bias"), settings.prior)
        self.smallest = self._probe()
        """The shortest side (pixels) that the network can work on."""

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H, W)."""
        check_input(images, self.stride)
        size = images.shape[-2:]
        if min(size) < self.smallest:
            raise InputError(
                f"model {self.name} wants image sides of at least {self.smallest} pixels, found {size[0]}x{size[1]} "
                f"(height x width); set a larger input.size"
            )
        try:
            logits = self.network(images)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"model {self.name} normalises over the batch where one pixel an image is left: training wants at "
                f"least 2 images a worker, found {len(images)}; raise train.batch_size or input.size, or choose "
                f"another model.arch"
            ) from error
        except AssertionError as error:  # a timm ViT that was built for one size
            raise InputError(f"model {self.name}: {error}; set input.size to what it wants") from error
        if logits.shape[-2:] != size:  # options such as upsampling, or patches of 14 pixels
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits

    @property
    def backbone(self) -> list[nn.Module]:
        """The parts that see the image first: the encoder."""
        return [self.network.encoder]

    def _probe(self) -> int:
        """Run the network on one small image: its side. Parts that take no part stop learning, or drop nothing.

        PSPNet's encoder keeps the stages that it does not use: DDP would wait for their gradients for ever.
        Some encoders keep the dropout of the classifier that they lost, which would pass for Monte-Carlo dropout.
        """
        layers_that_ran: set[nn.Module] = set()
        drops = dropout_layers(self)
        hooks = [layer.register_forward_pre_hook(lambda layer, _: layers_that_ran.add(layer)) for layer in drops]
        self.network.eval()
        side, logits = _smallest_image(self.network, self.stride, self.name)
        for hook in hooks:
            hook.remove()
        for layer in set(drops) - layers_that_ran:
            layer.p = 0.0  # pyright: ignore[reportArgumentType]
        parameters = list(self.parameters())
        gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                parameter.requires_grad_(False)
        self.network.train()
        return side


def _smallest_image(network: nn.Module, stride: int, name: str) -> tuple[int, Tensor]:
    """The side of the smallest square image that the network takes, and its logits.

    Sides of 1, 2, 4 and 8 strides are tried, or the one size of a timm ViT.
    """
    sides = [stride, 2 * stride, 4 * stride, 8 * stride]
    error = ""
    with torch.enable_grad():
        while sides:
            side = sides.pop(0)
            try:
                return side, network(torch.zeros(1, 3, side, side))
            except AssertionError as reason:  # a timm model of one size; it will not take the others either
                error = str(reason)
                input_size = getattr(getattr(network.encoder, "model", None), "pretrained_cfg", {}).get("input_size")
                sides = [int(input_size[-1])] if input_size and input_size[-1] != side else []
            except (RuntimeError, ValueError) as reason:
                error = f"{reason} (at {side}x{side} pixels)"
    raise InputError(f"model {name} takes no image: {error}; choose another model.encoder or model.options")


def _stride(network: Any, settings: Smp) -> int:
    """What sides must be multiples of: of the encoder's grid even where a decoder would take less."""
    encoder_stride = int(network.encoder.output_stride)
    if type(network).__name__ == "DPT":
        return math.lcm(32, encoder_stride)  # whatever the patches, its deepest grid has a cell for 32 pixels
    default = inspect.signature(type(network).__init__).parameters["encoder_depth"].default
    return max(encoder_stride, 2 ** int(settings.options.get("encoder_depth", default)))


def _set_dropout(network: Any, p: float) -> None:
    """``p`` in each dropout of decoder and head; where they have none, in a new one before the head."""
    parts = (network.decoder, network.segmentation_head)
    dropouts = [layer for part in parts for layer in part.modules() if isinstance(layer, DROPOUT)]
    for layer in dropouts:
        layer.p = p
    if p and not dropouts:
        # Named, so that the head's own layers keep their names in state dicts.
        layers = [("drop", nn.Dropout2d(p)), *network.segmentation_head.named_children()]
        network.segmentation_head = nn.Sequential(OrderedDict(layers))


def _create(settings: Smp, outputs: int) -> nn.Module:
    """``create_model`` with the library's errors turned into sentences."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise InputError(
            f"model smp needs the package segmentation-models-pytorch ({error}); install it or use model unet"
        ) from None
    _check_names(smp, settings)
    arguments = {
        "encoder_name": settings.encoder,
        "encoder_weights": settings.encoder_weights,
        "in_channels": 3,
        "classes": outputs,
        **settings.options,
    }
    try:
        if settings.arch.lower() == "dpt" and not {"dynamic_img_size", "img_size"} & set(settings.options):
            try:  # a ViT that takes images of any size, where timm's class can
                return smp.create_model(settings.arch, **arguments, dynamic_img_size=True)
            except TypeError:
                pass
        return smp.create_model(settings.arch, **arguments)
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
        names = [cls.__name__ for cls in classes.values()]
        raise InputError(f"model.arch: no architecture '{settings.arch}'.{nearest(settings.arch, names)}")
    for key in settings.options:
        if key in _RESERVED:
            raise InputError(f"model.options: '{key}' is not to be given here; the output is raw logits of the classes")
    if settings.encoder.startswith("tu-"):
        return  # options not of the architecture are timm's
    encoders = smp.encoders.get_encoder_names()
    if settings.encoder not in encoders:
        hint = nearest(settings.encoder, encoders)
        raise InputError(f"model.encoder: no encoder '{settings.encoder}'.{hint}")
    options = set(inspect.signature(classes[arch].__init__).parameters) - _RESERVED
    for key in settings.options:
        if key not in options:
            raise InputError(f"model.options: {classes[arch].__name__} has no '{key}'.{nearest(key, options)}")
