"""The decoder: every kind of picture a collection holds, and every way a file can be broken."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hysafe.data.images import content_hash, decode, thumbnail, to_pixels
from hysafe.errors import InputError

# Pillow warns about damaged metadata that it can do without.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def noise(width: int, height: int) -> Image.Image:
    shape = (height, width, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def block(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = block(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + block(b"IDAT", zlib.compress(b"\0" * 64))
        + block(b"IEND", b"")
    )


def close(image: Image.Image, colour: tuple[int, int, int], tolerance: int = 8) -> bool:
    return bool(np.abs(np.asarray(image).astype(int) - colour).max() <= tolerance)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_allowed_formats_decode_to_rgb(format: str) -> None:
    image = decode(encoded(Image.new("RGB", (20, 10), RED), format))
    assert image.mode == "RGB"
    assert image.size == (20, 10)
    assert close(image, RED)


@pytest.mark.parametrize("format", ["ICO", "TGA", "JPEG2000", "AVIF", "EPS", "PDF"])
def test_other_formats_are_refused_with_the_remedy(format: str) -> None:
    with pytest.raises(InputError, match=r"no picture in a format.*Convert it"):
        decode(encoded(Image.new("RGB", (16, 16), RED), format))


def test_a_multi_picture_jpeg_decodes_as_its_first() -> None:
    data = encoded(
        Image.new("RGB", (8, 8), RED),
        "MPO",
        save_all=True,
        append_images=[Image.new("RGB", (8, 8), BLUE)],
    )
    assert close(decode(data), RED)
    assert close(decode(data, size=2), RED)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("kept", [0.05, 0.3, 0.7])
def test_truncated_pictures_are_input_errors(format: str, kept: float) -> None:
    data = encoded(noise(64, 64), format)
    with pytest.raises(InputError, match=r"damaged"):
        decode(data[: int(kept * len(data))])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_flipped_bytes_give_a_picture_or_an_input_error(format: str) -> None:
    data = encoded(noise(48, 32), format)
    rng = np.random.default_rng(1)
    for _ in range(60):
        damaged = bytearray(data)
        for at in rng.integers(0, min(len(data), 300), 4):
            damaged[at] = int(rng.integers(0, 256))
        try:
            image = decode(bytes(damaged), max_pixels=1 << 20)
        except InputError:
            continue
        assert image.mode == "RGB"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"not a picture at all", "no picture"),
        (b"<html><body>404</body></html>", "no picture"),
        (b"\xff\xd8\xff", "no picture|damaged"),
        (b"%PDF-1.7\n", "no picture"),
    ],
)
def test_what_is_no_picture_is_an_input_error(data: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        decode(data)


@pytest.mark.parametrize("size", [None, 64])
def test_a_huge_header_is_refused_before_decoding(size: int | None) -> None:
    with pytest.raises(InputError, match=r"declares .*Scale the picture down"):
        decode(png_header(20_000, 20_000), size=size)


def test_the_pixel_limit_is_an_argument_and_counts_pixels_not_sides() -> None:
    data = encoded(Image.new("RGB", (400, 10)), "PNG")
    assert decode(data, max_pixels=4000).size == (400, 10)
    with pytest.raises(InputError, match="400 x 10 pixels, more than the 3,999 allowed"):
        decode(data, max_pixels=3999)


def test_sixteen_bits_keep_the_high_byte() -> None:
    values = (np.arange(256, dtype=np.uint16) * 256 + 17).reshape(16, 16)
    for format in ("PNG", "TIFF"):
        image = decode(encoded(Image.fromarray(values), format))
        np.testing.assert_array_equal(np.asarray(image)[..., 0], values >> 8)


def test_integers_and_floats_beyond_sixteen_bits_are_stretched() -> None:
    ramp = np.arange(256).reshape(16, 16)
    for values, wanted in (
        (ramp.astype(np.int32) * 100_000 - 5_000_000, ramp),
        ((ramp * 0.001 + 0.2).astype(np.float32), (ramp * 0.001 + 0.2) * 255),  # within 0..1
        ((ramp * 7.0 - 50).astype(np.float32), ramp),
    ):
        image = decode(encoded(Image.fromarray(values), "TIFF"))
        np.testing.assert_allclose(np.asarray(image)[..., 0], wanted, atol=1)


def test_cmyk_jpeg_has_its_colours() -> None:
    image = decode(encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert close(image, RED, tolerance=12)


def test_palette_with_transparency_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    for format in ("PNG", "GIF"):
        pixels = np.asarray(decode(encoded(image, format, transparency=1)))
        assert tuple(pixels[0, 0]) == RED
        assert tuple(pixels[0, 1]) == WHITE


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_lies_on_white(format: str) -> None:
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    for alpha, wanted in ((0, WHITE), (255, BLUE), (128, (127, 127, 255))):
        data = encoded(Image.new("RGBA", (4, 4), (*BLUE, alpha)), format, **options)
        assert close(decode(data), wanted, tolerance=1)


def test_grey_alpha_and_colour_key_lie_on_white() -> None:
    assert close(decode(encoded(Image.new("LA", (4, 4), (0, 0)), "PNG")), WHITE, 0)
    assert close(decode(encoded(Image.new("RGB", (4, 4), RED), "PNG", transparency=RED)), WHITE, 0)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert close(decode(data), RED)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(format: str, orientation: int) -> None:
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 16, 8))  # a red top left quarter
    to_stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(to_stored[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    image = decode(encoded(stored, format, exif=exif, **options), size=8)
    assert image.size == (32, 16)
    assert close(image.crop((2, 2, 14, 6)), RED, 40)
    assert close(image.crop((18, 2, 30, 14)), WHITE, 40)


@pytest.mark.parametrize("exif", [b"MM\0*\0\0\0\x08\xff\xff\1", b"XXXXXXXXXXXXXXXX", b"II*\0"])
def test_damaged_exif_does_not_lose_the_picture(exif: bytes) -> None:
    data = encoded(Image.new("RGB", (8, 8), RED), "JPEG", exif=b"Exif\0\0" + exif)
    assert close(decode(data), RED)


def test_an_exif_reader_that_fails_does_not_lose_the_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(image: Image.Image) -> None:
        raise SyntaxError("not a TIFF file")

    data = encoded(Image.new("RGB", (8, 8), RED), "PNG")
    monkeypatch.setattr(Image.Image, "getexif", fail)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.getexif", fail)
    assert close(decode(data), RED)


def test_jpeg_is_decoded_at_twice_the_wanted_side_at_least() -> None:
    data = encoded(noise(1024, 512), "JPEG")
    assert decode(data).size == (1024, 512)
    assert decode(data, size=64).size == (256, 128)
    assert decode(data, size=300).size == (1024, 512)


def test_draft_changes_the_pixels_little() -> None:
    x, y = np.meshgrid(np.linspace(0, 6, 800), np.linspace(0, 6, 600))
    waves = 127 + 60 * np.sin(x * 3) + 60 * np.cos(y * 5)
    data = encoded(Image.fromarray(waves.astype(np.uint8)).convert("RGB"), "JPEG", quality=95)
    full, fast = to_pixels(decode(data), 64), to_pixels(decode(data, size=64), 64)
    assert np.abs(full.astype(int) - fast).mean() < 1.0


def test_pixels_hold_the_whole_picture_and_nothing_is_cropped() -> None:
    wide = Image.new("RGB", (400, 100), WHITE)
    wide.paste(RED, (0, 0, 40, 100))
    wide.paste(BLUE, (360, 0, 400, 100))
    pixels = to_pixels(wide, 20)
    assert pixels.shape == (3, 20, 20)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert tuple(pixels[:, 10, 0]) == RED
    assert tuple(pixels[:, 10, 19]) == BLUE
    assert tuple(pixels[:, 10, 10]) == WHITE


def test_pixels_of_the_right_size_are_not_resampled() -> None:
    image = noise(64, 64)
    np.testing.assert_array_equal(to_pixels(image, 64), np.asarray(image).transpose(2, 0, 1))


def test_pixels_average_over_what_they_replace() -> None:
    checks = np.indices((256, 256)).sum(axis=0) % 2 * np.uint8(255)
    pixels = to_pixels(Image.fromarray(checks.astype(np.uint8)), 32)
    assert np.abs(pixels.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "YCbCr", "I", "F", "LA"])
def test_pixels_take_any_mode(mode: str) -> None:
    assert to_pixels(Image.new(mode, (5, 9)), 4).shape == (3, 4, 4)


def test_pixels_leave_the_picture_as_it_was() -> None:
    image = Image.new("RGBA", (5, 5), (*BLUE, 100))
    assert tuple(to_pixels(image, 5)[:, 0, 0]) == (155, 155, 255)
    assert image.getpixel((0, 0)) == (*BLUE, 100)


def test_content_hash_tells_pictures_from_texts() -> None:
    hashes = {
        content_hash(b"a", None),
        content_hash(None, "a"),
        content_hash(b"a", "a"),
        content_hash(b"", "a"),
        content_hash(b"a", ""),
        content_hash(b"", None),
        content_hash(None, None),
        content_hash(b"atext 1\0a", None),
    }
    assert len(hashes) == 8
    assert all(len(h) == 64 and int(h, 16) >= 0 for h in hashes)
    assert content_hash(None, "\ud800") != content_hash(None, "?")


def test_content_hash_is_stable_between_releases() -> None:
    # Stored collections hold these: a change here makes every one of them stale. By sha256sum of
    # 'hysafe item 1\0image 7\0picturetext 4\0text'.
    assert content_hash(b"picture", "text") == (
        "aa78657878a569ec9eeee25cedf097009ca16fff4238d41869c9988b955f8913"
    )


def test_thumbnail_is_small_upright_and_without_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a secret description"
    data = encoded(noise(800, 400), "JPEG", exif=exif, comment=b"another secret")
    small = thumbnail(data)
    image = Image.open(io.BytesIO(small))
    assert image.format == "JPEG"
    assert image.size == (80, 160)
    assert len(small) < 20_000
    assert b"secret" not in small
    assert not image.getexif()


def test_thumbnail_does_not_enlarge_and_refuses_what_decode_refuses() -> None:
    assert Image.open(io.BytesIO(thumbnail(encoded(noise(10, 6), "PNG")))).size == (10, 6)
    with pytest.raises(InputError, match="no picture"):
        thumbnail(b"nothing")
