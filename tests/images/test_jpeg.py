"""The short way for plain JPEGs: bit by bit what Pillow decodes, and Pillow's verdict on all that is not plain."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.augment import InputSettings
from pipeline.images import decode, jpeg
from pipeline.images.buffer_pool import Buffers
from pipeline.images.decode import DecodeError, Reduced, decode_many
from pipeline.images.host_frames import Paster, paste_images
from pipeline.images.layout import lay_out, shown_size


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth structures and a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse).astype(int) + rng.integers(-9, 10, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 16), (61, 97), (120, 33)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quality": 30},
        {"quality": 98, "subsampling": 0},
        {"subsampling": 1},
        {"progressive": True},
        {"optimize": True},
    ],
)
def test_the_pixels_are_pillows(size: tuple[int, int], options: dict[str, object]):
    for image in (photo(*size), photo(*size).convert("L")):
        data = saved(image, **options)
        assert jpeg.plain_size(data) == size
        found = jpeg.decode(data, size)
        assert found is not None
        assert np.array_equal(found, by_pillow(data))


def test_real_photographs_too(real_images: Path):
    for path in sorted((real_images / "bccd/JPEGImages").glob("*.jpg"))[:5]:
        data = path.read_bytes()
        size = jpeg.plain_size(data)
        assert size is not None
        assert np.array_equal(jpeg.decode(data, size), by_pillow(data))


def cmyk() -> bytes:
    return saved(photo(40, 50).convert("CMYK"))


def rgb_inside() -> bytes:
    """Colours stored as RGB, as Adobe's marker says."""
    return saved(photo(40, 50), keep_rgb=True)


def png() -> bytes:
    out = io.BytesIO()
    photo(40, 50).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    "make", [cmyk, rgb_inside, png, lambda: b"", lambda: b"\xff\xd8", lambda: b"\xff\xd8\xff\xe0junk"]
)
def test_what_is_not_plain_is_left_alone(make: Callable[[], bytes]):
    assert jpeg.plain_size(make()) is None


def test_what_the_library_doubts_is_pillows_to_judge():
    whole = saved(photo(200, 200))
    for data in (whole[: len(whole) // 2], whole[:-2], whole[:700] + bytes(20) + whole[720:]):
        size = jpeg.plain_size(data)
        try:
            wanted = by_pillow(data)
        except OSError:
            with pytest.raises(DecodeError):
                decode.decode(data)
        else:
            assert np.array_equal(decode.decode(data), wanted)
        assert size is None or jpeg.decode(data, size) is None or np.array_equal(decode.decode(data), by_pillow(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_whole_and_reduced(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo(80, 120), exif=exif)
    plain = by_pillow(data)
    upright = decode.apply_orientation(plain, orientation)
    assert np.array_equal(decode.decode(data), upright)
    (half,) = decode_many([data], 1, target_size=lambda size: (size[0] // 3, size[1] // 3))
    assert isinstance(half, Reduced)
    assert half.size == upright.shape[:2]
    assert half.pixels.shape == (-(-upright.shape[0] // 2), -(-upright.shape[1] // 2), 3)
    coarse = upright.reshape(upright.shape[0] // 2, 2, -1, 2, 3).mean((1, 3))
    assert np.abs(half.pixels - coarse).mean() < 3


def test_how_far_an_image_is_reduced():
    assert jpeg.reduction((768, 1024), (512, 512)) == 1
    assert jpeg.reduction((1536, 2048), (512, 512)) == 2
    assert jpeg.reduction((1535, 2048), (512, 512)) == 2  # rounded up: 768
    assert jpeg.reduction((1530, 2048), (512, 512)) == 1
    assert jpeg.reduction((4000, 6000), (224, 224)) == 8
    assert jpeg.reduction((10, 10), (10, 10)) == 1


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_a_reduced_image_lands_where_the_whole_one_does_and_looks_alike(fit: str):
    input = InputSettings(size=(96, 128), fit=fit)  # type: ignore[arg-type]
    data = [saved(photo(600, 500, seed), quality=95) for seed in range(3)]
    whole = [by_pillow(each) for each in data]
    reduced = decode_many(data, 1, lambda size: shown_size(size, input))
    assert all(isinstance(each, Reduced) and each.pixels.shape[0] <= 300 for each in reduced)
    layout = lay_out([(600, 500)] * 3, input, train=False)
    wanted = paste_images(whole, layout, input).int()
    found = paste_images([each.pixels for each in reduced if isinstance(each, Reduced)], layout, input).int()
    assert (found - wanted).abs().float().mean() < 1
    assert (found - wanted).abs().max() <= 20


def test_memory_that_was_used_before_changes_nothing():
    buffers, input = Buffers(), InputSettings(size=(200, 300), fit="letterbox")
    for seed in range(4):
        data = [saved(photo(300, 200 + 40 * n, seed)) for n in range(4)]
        decoded = decode_many(data, 2, lambda size: shown_size(size, input), buffers)
        pixels = [each.pixels if isinstance(each, Reduced) else each for each in decoded]
        assert not any(isinstance(each, DecodeError) for each in pixels)
        layout = lay_out([each.shape[:2] for each in map(by_pillow, data)], input, train=True)  # type: ignore[misc]
        found = paste_images(pixels, layout, input, 2, buffers)  # type: ignore[arg-type]
        wanted = paste_images(list(map(by_pillow, data)), layout, input)
        assert found.equal(wanted)
        del decoded, pixels, found
    assert 0 < buffers.held < 2**24


@pytest.mark.parametrize(
    ("fit", "train"), [("stretch", False), ("letterbox", False), ("letterbox", True), ("crop", True)]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_images_put_into_their_frames_while_they_are_decoded_are_those_put_there_after(fit, train, threads):
    input, rng = InputSettings(size=(96, 128), fit=fit), np.random.default_rng(1)
    data = [saved(photo(60 + 30 * n, 300 - 20 * n, n)) for n in range(9)]
    items = [*data[:4], b"\xff\xd8 not an image", None, *data[4:]]
    offsets = rng.random((len(items), 2)) if fit == "crop" else None
    paster = Paster(len(items), input, train=train, offsets=offsets, buffers=Buffers())
    found = decode_many(items, threads, paster.target_size, paster.buffers, paster)
    kept = [n for n, each in enumerate(found) if isinstance(each, Reduced)]
    assert kept == [0, 1, 2, 3, *range(6, 11)]
    assert [each.reason for each in found if isinstance(each, DecodeError)] == ["corrupt", "missing"]
    plain = decode_many(data, 1, paster.target_size)
    sizes = [each.size if isinstance(each, Reduced) else each.shape[:2] for each in plain]  # type: ignore[union-attr]
    assert [found[n].size for n in kept] == sizes  # type: ignore[union-attr]
    layout = lay_out(sizes, input, train=train, offsets=None if offsets is None else offsets[kept])
    pixels = [each.pixels if isinstance(each, Reduced) else each for each in plain]
    assert paster.images(kept).equal(paste_images(pixels, layout, input))  # type: ignore[arg-type]
