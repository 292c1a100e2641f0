"""Which JPEGs a device decodes, what is left to the host, and the frames made of them there."""

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import io as image_io

from pipeline.images import decode
from pipeline.images.gpu_decode import DeviceDecoder, baseline_size
from pipeline.images.gpu_frames import frame_on_device
from pipeline.images.host_frames import paste_images
from pipeline.images.input_settings import InputSettings
from pipeline.images.layout import lay_out


def picture(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    """Smooth noise, as photographs are."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray | None = None, mode: str = "RGB", **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture() if pixels is None else pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x010F] = "maker"
    tags[0x0112] = orientation
    return tags


def mpo() -> bytes:
    out = io.BytesIO()
    frames = [Image.fromarray(picture(seed=seed)) for seed in (0, 1)]
    frames[0].save(out, "MPO", save_all=True, append_images=frames[1:])
    return out.getvalue()


PLAIN = {
    "420": jpeg(),
    "444": jpeg(subsampling=0),
    "422": jpeg(subsampling=1),
    "exif": jpeg(exif=exif(1)),
    "restarts": jpeg(restart_marker_blocks=2),
    "comment": jpeg(comment=b"x" * 300),
}
ODD = {
    "progressive": jpeg(progressive=True),
    "grey": jpeg(mode="L"),
    "cmyk": jpeg(mode="CMYK"),
    "turned": jpeg(exif=exif(6)),
    "rgb": jpeg(keep_rgb=True),
    "two pictures": mpo(),
    "cut short": jpeg()[:-200],
    "cut in the header": jpeg()[:200],
    "no JPEG": b"BM" + bytes(100),
    "empty": b"",
    "turned by XMP": jpeg(xmp=b'<x tiff:Orientation="6"/>'),
    "odd exif": jpeg(exif=exif(1)).replace(b"MM\0*", b"MX\0*").replace(b"II*\0", b"IX*\0"),
}


@pytest.mark.parametrize("name", PLAIN)
def test_ordinary_jpegs_are_for_the_device(name):
    assert baseline_size(PLAIN[name]) == (60, 80)


@pytest.mark.parametrize("name", ODD)
def test_everything_else_is_for_the_host(name):
    assert baseline_size(ODD[name]) is None


def test_any_cut_and_any_changed_byte_is_survived():
    whole = jpeg(exif=exif(1))
    rng = np.random.default_rng(0)
    for at in rng.integers(0, 700, 300):
        baseline_size(whole[:at])
        broken = bytearray(whole)
        broken[at] = rng.integers(256)
        baseline_size(bytes(broken))


def test_each_image_comes_from_where_it_can_and_a_bad_one_costs_its_neighbours_nothing():
    bad = jpeg()[:250] + b"\xff\xd9"
    files = [*PLAIN.values(), bad, None, *ODD.values()]
    found = DeviceDecoder("cpu")(files)
    wanted = decode.decode_many(files, 1)
    assert len(found) == len(files)
    for n, (have, want) in enumerate(zip(found, wanted, strict=True)):
        if n < len(PLAIN):
            assert isinstance(have, torch.Tensor)
            assert np.array_equal(have.permute(1, 2, 0).numpy(), want)
        elif isinstance(want, decode.DecodeError):
            assert isinstance(have, decode.DecodeError)
            assert (have.reason, have.detail) == (want.reason, want.detail)
        else:
            assert isinstance(have, np.ndarray)
            assert np.array_equal(have, want)


def test_a_file_that_the_device_refuses_falls_back_alone(monkeypatch):
    refused, calls = PLAIN["444"], []

    def picky(tensors, mode, device):
        calls.append(len(tensors))
        if any(bytes(tensor.numpy()) == refused for tensor in tensors):
            raise RuntimeError("nvjpeg: status 2")
        return real(tensors, mode=mode, device=device)

    real = image_io.decode_jpeg
    monkeypatch.setattr(image_io, "decode_jpeg", picky)
    files = [PLAIN["420"]] * 5 + [refused] + [PLAIN["422"]] * 2
    found = DeviceDecoder("cpu")(files)
    assert [isinstance(image, torch.Tensor) for image in found] == [True] * 5 + [False] + [True] * 2
    assert np.array_equal(found[5], decode.decode(refused))
    assert calls[0] == 8


def test_a_device_that_takes_nothing_is_given_up_with_one_warning(monkeypatch, caplog):
    calls = []

    def broken(tensors, mode, device):
        calls.append(len(tensors))
        raise RuntimeError("not compiled with nvJPEG")

    monkeypatch.setattr(image_io, "decode_jpeg", broken)
    decoder = DeviceDecoder("cpu")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = decoder([*PLAIN.values()])
            assert all(isinstance(image, np.ndarray) for image in found)
    assert [record.message.count("decodes no JPEGs here") for record in caplog.records] == [1]
    assert sum(calls) < 40, "the device was asked again"


@pytest.mark.parametrize("fit", ["letterbox", "stretch", "crop"])
def test_frames_of_the_device_are_those_of_the_host(fit):
    sizes = [(60, 80), (33, 90), (64, 64), (200, 120), (60, 80), (10, 12)]
    arrays = [picture(*size, seed=n) for n, size in enumerate(sizes)]
    settings = InputSettings(size=(64, 64), fit=fit)
    layout = lay_out(sizes, settings, train=True, offsets=np.full((len(sizes), 2), 0.3))
    host = paste_images(arrays, layout, settings)
    mixed = [array if n % 2 else torch.from_numpy(array).permute(2, 0, 1) for n, array in enumerate(arrays)]
    ours = frame_on_device(mixed, layout, settings, torch.device("cpu"))
    assert ours.shape == host.shape
    assert ours.permute(0, 2, 3, 1).is_contiguous()
    difference = (ours.int() - host.int()).abs()
    assert difference.max() <= (0 if fit == "crop" else 1)
    assert difference[2].max() == 0, "an image that fits was resized"
    assert difference.float().mean() < 0.25


def test_many_images_of_a_size_are_resized_in_pieces(monkeypatch):
    from pipeline.images import gpu_frames

    arrays = [picture(seed=n) for n in range(7)]
    settings = InputSettings(size=(32, 32))
    layout = lay_out([(60, 80)] * 7, settings, train=True)
    whole = frame_on_device(arrays, layout, settings, torch.device("cpu"))
    monkeypatch.setattr(gpu_frames, "CHUNK_PIXELS", 2 * 60 * 80)
    assert torch.equal(frame_on_device(arrays, layout, settings, torch.device("cpu")), whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_decodes_within_a_few_levels_of_the_host():
    files = [jpeg(picture(375, 500, seed=n), quality=90, subsampling=n % 3) for n in range(12)]
    found = DeviceDecoder("cuda")([*files, ODD["progressive"]])
    assert [image.is_cuda for image in found[:12]] == [True] * 12
    assert isinstance(found[12], np.ndarray)
    for have, want in zip(found, decode.decode_many(files, 1), strict=False):
        difference = np.abs(have.permute(1, 2, 0).cpu().numpy().astype(int) - want)
        assert difference.mean() < 2, "chroma is blown up by another filter, but not by that much"
