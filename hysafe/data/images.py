"""Encoded pictures to pixels: one careful decoder for everything that comes from outside.

Conventions. Formats are allow-listed. The pixel limit is checked from the header, before a pixel
is decoded. EXIF orientation is applied, transparency is laid on white, of an animation or a
document of several pages the first frame counts. Whatever cannot be decoded is an
:class:`~hysafe.errors.InputError`, never another exception.

Imports Pillow and numpy only, so that worker processes start quickly.
"""

from __future__ import annotations

import hashlib
import io
import logging

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, UnidentifiedImageError

from hysafe.errors import InputError

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "PREPROCESSING_VERSION",
    "content_hash",
    "decode",
    "out_of_memory",
    "thumbnail",
    "to_pixels",
    "to_rgb",
]

# Pillow's names; MPO (what many phones write) is opened by the JPEG plugin, PPM stands for PNM.
# WEBP and TIFF stand last: looking for them makes Pillow import all its plugins, once.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")

# 134 million pixels: holds the 108-megapixel pictures of phones, refuses 20,000 x 20,000. At the
# limit, decoding an RGBA picture takes 1.1 GiB.
MAX_PIXELS = 1 << 27

# Goes into the model's hash: change it whenever `decode` or `to_pixels` give other pixels.
PREPROCESSING_VERSION = "squash-bicubic-draft2-white-1"

# JPEG is decoded at the smallest scale that still has twice the wanted side: twice as fast, and
# the final resize still has pixels to average over.
DRAFT_FACTOR = 2

EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

THUMBNAIL_QUALITY = 80

logger = logging.getLogger(__name__)


def decode(data: bytes, *, size: int | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture to RGB, upright.

    Args:
        data: the bytes of the file, in one of :data:`FORMATS`; the file name plays no part.
        size: side that :func:`to_pixels` or :func:`thumbnail` will ask for. A JPEG is then decoded
            at a reduced scale with both sides at least twice `size`; None decodes in full.
        max_pixels: width x height allowed by the header. Pillow's own limit (twice
            ``PIL.Image.MAX_IMAGE_PIXELS``) holds beside it.

    Returns:
        The first frame, mode RGB.

    Raises:
        InputError: empty, no picture, another format, too many pixels, truncated or damaged.
    """
    if not data:
        raise InputError("The picture is empty (0 bytes). Export or fetch it again.")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_pixels(image.size, max_pixels)
        if size is not None:
            image.draft(None, (DRAFT_FACTOR * size, DRAFT_FACTOR * size))
        image.load()
        image = _upright(image)
        return _on_white(image) if image.mode == "RGBA" else to_rgb(image)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"The {len(data):,} bytes are no picture in a format that is read "
            f"({', '.join(FORMATS)}), or its header is damaged. Convert it, for example to PNG."
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"The header declares too many pixels ({error}) Scale the picture down."
        ) from error
    except MemoryError as error:
        raise out_of_memory() from error
    except Exception as error:
        # Pillow's plugins raise almost anything on hostile bytes: OSError, SyntaxError,
        # struct.error, KeyError, SystemError. All mean the same to the caller.
        raise InputError(
            f"The picture is truncated or damaged ({type(error).__name__}: {error}). "
            "Export or fetch it again."
        ) from error


def to_pixels(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The whole picture as a square of pixels: resized to size x size, aspect ratio given up.

    Nothing is cropped and nothing is padded: a moderator must not miss what stands at an edge, and
    the pictures the bundled model learned from are square. Bicubic with antialiasing; a picture
    that already has the size is not resampled.

    Args:
        image: any mode; other than RGB it goes through :func:`to_rgb`.
        size: side S in pixels.

    Returns:
        uint8 [3, S, S], contiguous.
    """
    image = to_rgb(image)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))  # [S, S, 3] -> [3, S, S]


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB.

    Transparency is laid on white. 16-bit values keep their high byte; 32-bit integers outside
    0..65535 and floats outside 0..1 are stretched between their smallest and largest value.

    Raises:
        ValueError: Pillow knows no way from this mode to RGB (LAB).
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        return _on_white(image.convert("RGBA"))  # a copy, also of RGBA
    return image.convert("RGB")


def content_hash(image: bytes | None, text: str | None) -> str:
    """sha256 hex of an item's content; picture and text cannot be taken for one another.

    Args:
        image: encoded picture bytes, as they came in.
        text: the text; lone surrogates are hashed too.
    """
    digest = hashlib.sha256(b"hysafe item 1\0")
    for tag, part in ((b"image", image), (b"text", text)):
        if part is None:
            continue
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(b"%s %d\0" % (tag, len(data)))
        digest.update(data)
    return digest.hexdigest()


def thumbnail(data: bytes, side: int = 160) -> bytes:
    """A small JPEG of a picture for the report: aspect ratio kept, no metadata.

    Args:
        data: encoded picture, as for :func:`decode`.
        side: the longer side is at most this many pixels; smaller pictures are not enlarged.

    Raises:
        InputError: as :func:`decode`.
    """
    image = decode(data, size=side)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    # A fresh image: what Pillow keeps in `info` (EXIF, comments, colour profile) stays behind.
    Image.fromarray(np.asarray(image)).save(out, "JPEG", quality=THUMBNAIL_QUALITY)
    return out.getvalue()


def out_of_memory() -> InputError:
    """What a picture becomes for which there is not enough memory."""
    problem = InputError("There was not enough memory to decode the picture. Scale it down.")
    problem.__cause__ = MemoryError()
    return problem


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise InputError(
            f"The header declares {width} x {height} pixels, more than the {max_pixels:,} allowed. "
            "Scale the picture down, or raise max_pixels if you trust it."
        )


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a damaged EXIF block counts as none."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception as error:  # the pixels are fine: only the metadata is not
        logger.debug("EXIF ignored: %s: %s", type(error).__name__, error)
        return image
    method = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _on_white(layer: Image.Image) -> Image.Image:
    """RGBA to RGB on white. Overwrites `layer`: at the pixel limit one copy is half a gigabyte."""
    transparency = ImageChops.invert(layer.getchannel("A"))
    layer.paste((255, 255, 255, 255), None, transparency)
    return layer.convert("RGB")


def _eight_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """uint16, int32 or float [H, W] -> uint8 [H, W]; see :func:`to_rgb` for the ranges."""
    if values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        if low >= 0 and high <= np.iinfo(np.uint16).max:
            return (values.astype(np.uint16) >> 8).astype(np.uint8)
    numbers = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    floor, ceiling = float(numbers.min()), float(numbers.max())
    if values.dtype.kind == "f" and floor >= 0.0 and ceiling <= 1.0:
        floor, ceiling = 0.0, 1.0
    span = (ceiling - floor) or 1.0
    return np.rint((numbers - floor) * (255.0 / span)).astype(np.uint8)
