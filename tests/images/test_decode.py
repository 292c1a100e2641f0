import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.images import decode as module
from pipeline.images.decode import DecodeError, ImageInfo, decode, decode_many, decode_map, probe


def encode(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(pixels: np.ndarray, orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(pixels, kind, exif=exif.tobytes())


COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_becomes_writable_rgb_uint8(mode):
    if mode == "I;16":
        data = encode(COLOURS[..., 0].astype(np.uint16) * 257)
    else:
        data = encode(COLOURS, mode=mode)
    out = decode(data)
    assert out.shape == (5, 7, 3)
    assert out.dtype == np.uint8
    assert out.flags.writeable
    assert out.flags.c_contiguous
    if mode in ("RGB", "RGBA"):
        np.testing.assert_array_equal(out, COLOURS)
    if mode == "I;16":
        np.testing.assert_array_equal(out[..., 2], COLOURS[..., 0])
    if mode == "1":
        assert set(np.unique(out)) <= {0, 255}


def test_palette_with_transparency_gives_the_palette_colours():
    image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=bytes([0, 128]))
    np.testing.assert_array_equal(decode(buffer.getvalue())[0], [[10, 20, 30], [200, 100, 50]])


def test_alpha_is_dropped_not_composited():
    pixels = np.dstack([COLOURS, np.zeros((5, 7), np.uint8)])
    np.testing.assert_array_equal(decode(encode(pixels)), COLOURS)


def test_cmyk_jpeg_is_converted():
    grey = np.full((8, 8, 3), 128, np.uint8)
    assert np.abs(decode(encode(grey, "JPEG", mode="CMYK", quality=95)).astype(int) - 128).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once_and_agrees_with_probe(orientation):
    from PIL import ImageOps

    data = with_orientation(COLOURS, orientation)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(decode(data), expected)
    assert probe(data) == ImageInfo(expected.shape[0], expected.shape[1], orientation)


def test_nonsense_orientation_counts_as_upright():
    assert probe(with_orientation(COLOURS, 77)) == ImageInfo(5, 7, 1)


@pytest.mark.parametrize("data", [b"", b"hello, I am no image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_image_is_corrupt(data):
    with pytest.raises(DecodeError) as found:
        decode(data)
    assert found.value.reason == "corrupt"


def test_truncated_files_are_corrupt_although_their_header_is_good():
    data = encode(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8), "JPEG")
    assert probe(data[: len(data) // 2]).width == 64
    with pytest.raises(DecodeError, match="truncated") as found:
        decode(data[: len(data) // 2])
    assert found.value.reason == "corrupt"


def huge_png(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_bombs_are_refused_by_their_header(side):
    with pytest.raises(DecodeError, match="pixels") as found:
        decode(huge_png(side))
    assert found.value.reason == "error"


def test_too_many_bytes_are_refused(monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(DecodeError, match="at most 10"):
        decode(encode(COLOURS))


def test_postscript_is_never_run():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(DecodeError, match="supported format"):
        decode(eps)


def test_decode_many_keeps_order_and_puts_errors_in_their_place():
    good = encode(COLOURS)
    out = decode_many([good, None, b"junk", good], threads=3)
    assert [type(item).__name__ for item in out] == ["ndarray", "DecodeError", "DecodeError", "ndarray"]
    assert [item.reason for item in out if isinstance(item, DecodeError)] == ["missing", "corrupt"]
    assert decode_many([], threads=3) == []


def test_decode_error_survives_pickle():
    import pickle

    error = pickle.loads(pickle.dumps(DecodeError("corrupt", "broken")))
    assert (error.reason, str(error)) == ("corrupt", "broken")


def test_warnings_of_pillow_do_not_leak():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(with_orientation(COLOURS, 1)).shape == (5, 7, 3)
        warnings.warn_explicit("doubtful", UserWarning, "file.py", 1, module="PIL.TiffImagePlugin")
        with pytest.raises(UserWarning, match="ours"):
            warnings.warn("ours", UserWarning, stacklevel=1)


def test_label_maps_keep_their_values():
    ids = np.array([[0, 300], [65535, 7]], np.uint16)
    np.testing.assert_array_equal(decode_map(encode(ids)), ids)
    bits = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(decode_map(encode(bits)), bits.astype(np.uint8))
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "L").convert("P")
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    np.testing.assert_array_equal(decode_map(buffer.getvalue()), [[0, 1], [2, 1]])
    assert decode_map(encode(COLOURS)).shape == (5, 7, 3)


def test_nearly_random_bytes_raise_nothing_but_decode_error():
    rng = np.random.default_rng(3)
    sources = [encode(COLOURS), encode(COLOURS, "JPEG"), encode(COLOURS, "TIFF"), encode(COLOURS, "GIF")]
    outcomes = set()
    for number in range(400):
        data = bytearray(sources[number % len(sources)])
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(256)
        try:
            outcomes.add(decode(bytes(data)).dtype)
        except DecodeError as error:
            outcomes.add(error.reason)
    assert "corrupt" in outcomes
    assert outcomes <= {"corrupt", "error", np.dtype(np.uint8)}
