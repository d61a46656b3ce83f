"""Text in pictures: a cheap look, at most one reading, a cache.

:func:`may_hold_text` decides in a few milliseconds whether a picture is worth reading,
:class:`Ocr` reads it with rapidocr (extra ``[ocr]``, imported at the first use, never online) and
keeps the result under the picture's content hash.

Convention: pixels are uint8 RGB arrays [H, W, 3]; a box is four (x, y) corners, clockwise from
the top left.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hysafe.data.images import to_rgb
from hysafe.errors import ConfigError, HysafeError, InputError, MissingExtraError

__all__ = ["Ocr", "OcrText", "may_hold_text"]

logger = logging.getLogger(__name__)

# Raised whenever the steps below change what is read from the same pixels: part of the cache key.
_READER = 1

# --- reading: measured on rendered text (PP-OCRv6 small, rapidocr 3.10) ---------------------------
# Below this length of the long side the detector misses words of 8 px that it finds at twice the
# size (recall 0.50 -> 0.83 on 64 px photographs); more than twice brings nothing.
_SMALL_SIDE = 160
_SMALL_ZOOM = 2
# The engine pads a picture more than 8 times as wide as high to this share of its width.
_STRIP = 1 / 4
# A crop this much higher than wide holds sideways text (the engine's own rule).
_SIDEWAYS = 1.5
# Of 500 rendered lines 98 % are read with more than this confidence upright and 1 % upside down;
# below it a line is tried the other way up, which must be surer by the gain.
_UPRIGHT_ABOVE = 0.95
_UPRIGHT_GAIN = 0.05
# The engine drops spaces, mostly of outlined text and of text on grey. With this weight on its
# space 99.8 % of the words of six fonts are read apart instead of 96.3 % (120 pictures not used to
# choose it); why grey grounds suffer is not known.
_SPACE_WEIGHT = 100
# One lone character is what texture is misread as; it says nothing to a text tower either.
_MIN_CHARACTERS = 2
# The engine's time grows with the square of a line's length: 27 s at 400 times its height.
_LONGEST_LINE = 64
# Two boxes stand in one row where their centres differ by less than this share of the lower box.
_ROW_OVERLAP = 0.5

# --- the cheap look ------------------------------------------------------------------------------
# Both sides below, or one side far below: not readable.
_MIN_LONG_SIDE = 40
_MIN_SHORT_SIDE = 8
# Long side at which strokes are looked for first, twice that in pictures more than twice as long;
# then at half the size, again and again down to the last.
_LUMA_SIDE = 400
_COLOUR_SIDE = 200
_LAST_SIDE = 24
# Ink is what lies above the middle between the darkest and lightest pixel of a square of
# _INK_WINDOW px, where these differ by more than the contrast (grey levels of 255).
_INK_WINDOW = 9
_LUMA_CONTRAST = 12
_COLOUR_CONTRAST = 20
# A line of text: a stretch of _WORD x _LINE px full of changes between ink and ground, with a quiet
# row of pixels within _GAP px above and another one below.
_WORD, _WORD_SIDEWAYS = 24, 32
_LINE = 6
_GAP = 9
_STRIDE = 4
# Changes per pixel in such a stretch, less those in the quiet rows. On pictures not used to choose
# it 0.27 finds 429 of 432 upright ones and 73 of 80 small labels tilted by up to 60 degrees, and
# skips 46 % of the Tiny-ImageNet ones; words of two letters are missed.
_STROKES = round(0.27 * 255)

_MEMORY_ENTRIES = 65_536
_CACHE_WAIT_S = 30.0
_INSTALL = "pip install 'hysafe[ocr]'"

Pixels = NDArray[np.uint8]
Boxes = NDArray[np.float32]


@dataclass(frozen=True)
class OcrText:
    """What was read in one picture; empty text where there is none.

    Args:
        text: the lines in reading order, joined by a space.
        lines: the rows of text, top to bottom; pieces of one row are joined left to right.
        confidence: mean confidence of the engine per character, in [0, 1]; 0 without text.
        area: share of the picture covered by the boxes of the text read, in [0, 1].
    """

    text: str
    lines: tuple[str, ...]
    confidence: float
    area: float


NO_TEXT = OcrText(text="", lines=(), confidence=0.0, area=0.0)


class Ocr:
    """Reads the text in pictures, at most once per picture and settings.

    The engine is loaded by the first picture that may hold text. One object may be used from
    several threads (readings take turns) and sent to worker processes (each loads its own engine).

    Args:
        threads: threads of the engine, >= 1.
        max_side: side in pixels of the largest square that text is looked for in at full size;
            pictures with more pixels are looked at scaled down to as many (the letters found are
            then read at full size). Time grows with its square. More finds the 11 px print of
            full-screen screenshots, but fewer lone labels on large photographs; less the reverse.
        min_confidence: lines the engine is less sure of are dropped, in [0, 1].
        cache: SQLite file that keeps results between runs, shared by any number of processes;
            made where it does not exist. None: kept in memory.

    Raises:
        MissingExtraError: rapidocr is not installed.
        ConfigError: a setting is out of range, or the cache file cannot be used.
    """

    def __init__(
        self,
        *,
        threads: int = 1,
        max_side: int = 960,
        min_confidence: float = 0.5,
        cache: Path | None = None,
    ) -> None:
        if threads < 1:
            raise ConfigError(f"Ocr: threads is {threads}, expected 1 or more.")
        if max_side < _MIN_LONG_SIDE:
            raise ConfigError(f"Ocr: max_side is {max_side}, expected {_MIN_LONG_SIDE} or more.")
        if not 0.0 <= min_confidence <= 1.0:
            raise ConfigError(f"Ocr: min_confidence is {min_confidence}, expected 0 to 1.")
        for package in ("rapidocr", "onnxruntime"):
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(f"Reading text in pictures needs {package}: {_INSTALL}")
        self.threads = threads
        self.max_side = max_side
        self.min_confidence = min_confidence
        self.cache = Path(cache) if cache is not None else None
        self._results: _MemoryCache | _FileCache = (
            _MemoryCache() if self.cache is None else _FileCache(self.cache)
        )
        engine = importlib.metadata.version("rapidocr")
        self._version = f"rapidocr {engine}, reader {_READER}, {max_side}, {min_confidence}"
        self._engine: _Engine | None = None
        self._turn = threading.Lock()

    @property
    def version(self) -> str:
        """Engine, reader and settings: results of equal versions are interchangeable."""
        return self._version

    def read(self, image: Image.Image, content_hash: str) -> OcrText:
        """The text of one picture, from the cache where it was read before.

        Args:
            image: the decoded picture, any mode.
            content_hash: names the picture in the cache; "" for a picture not to be kept.

        Returns:
            The text, empty where the picture holds none. A picture that :func:`may_hold_text`
            rules out never reaches the engine.

        Raises:
            InputError: the picture cannot be decoded, or the engine failed on it.
            MissingExtraError: the engine or its models cannot be loaded.
        """
        known = self._known(content_hash)
        if known is not None:
            return known
        pixels = _pixels(image)
        try:
            if not _holds_strokes(pixels):
                return NO_TEXT
            with self._turn:
                known = self._known(content_hash)  # another thread may have read it meanwhile
                if known is not None:
                    return known
                if self._engine is None:
                    self._engine = _Engine(self.threads)
                found = _read(self._engine, pixels, self.max_side, self.min_confidence)
                if content_hash:
                    self._results.put(content_hash, self.version, found)
        except HysafeError:
            raise
        except Exception as error:  # the errors of engine and OpenCV share no base: kept as cause
            height, width = pixels.shape[:2]
            raise InputError(
                f"The OCR engine failed on {width} x {height} px ({type(error).__name__}: {error})."
                f" Turn reading off (--no-ocr), or install the tested version: {_INSTALL}"
            ) from error
        return found

    def _known(self, content_hash: str) -> OcrText | None:
        return self._results.get(content_hash, self.version) if content_hash else None

    def __reduce__(self) -> tuple[Callable[[], Ocr], tuple[()]]:
        """Send the settings, not the engine, to another process."""
        again = partial(
            Ocr,
            threads=self.threads,
            max_side=self.max_side,
            min_confidence=self.min_confidence,
            cache=self.cache,
        )
        return again, ()


def may_hold_text(image: Image.Image) -> bool:
    """Whether a picture is worth reading: False only where text is very unlikely.

    Looks for a line of strokes: many changes between ink and ground in a short stretch, with a
    quiet row above and below it, upright or sideways, in luminance or in colour, at sizes from
    small print to letters that fill the picture. True on much texture; False on flat, smooth,
    blurred and simple pictures, and on pictures too small to read.

    Args:
        image: the decoded picture, any mode.

    Raises:
        InputError: the picture cannot be decoded.
        MissingExtraError: OpenCV, which comes with rapidocr, is not installed.
    """
    return _holds_strokes(_pixels(image))


# --- pixels ---------------------------------------------------------------------------------------


def _pixels(image: Image.Image) -> Pixels:
    try:
        return np.asarray(to_rgb(image))
    except Exception as error:  # Pillow decodes late, and raises almost anything on damaged bytes
        raise InputError(
            f"The picture cannot be decoded ({type(error).__name__}: {error}). "
            "Export or fetch it again."
        ) from error


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise MissingExtraError(
            f"Reading text in pictures needs OpenCV ({error}): {_INSTALL}"
        ) from error
    return cv2


# --- the cheap look -------------------------------------------------------------------------------


def _holds_strokes(pixels: Pixels) -> bool:
    height, width = pixels.shape[:2]
    long_side = max(height, width)
    if long_side < _MIN_LONG_SIDE or min(height, width) < _MIN_SHORT_SIDE:
        return False
    cv2 = _opencv()
    if long_side < _SMALL_SIDE:
        size = (_SMALL_ZOOM * width, _SMALL_ZOOM * height)
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)
    side = _LUMA_SIDE if long_side <= 2 * _LUMA_SIDE else 2 * _LUMA_SIDE
    luma = _shrink(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), side)
    if _has_line(luma, _LUMA_CONTRAST):
        return True
    if _has_line(_tilt(_shrink(luma, _LUMA_SIDE)), _LUMA_CONTRAST):
        return True
    # Letters as bright as their ground differ in half of R - G or of B - G.
    colour = _shrink(pixels, min(_COLOUR_SIDE, max(pixels.shape) // 2))
    to_differences = np.array([[0.5, -0.5, 0.0, 128.0], [0.0, -0.5, 0.5, 128.0]], np.float32)
    return _has_line(cv2.transform(colour, to_differences), _COLOUR_CONTRAST)


def _shrink(plane: Pixels, side: int) -> Pixels:
    """Scaled so that the long side is `side` px; a strip keeps enough of its short side."""
    cv2 = _opencv()
    height, width = plane.shape[:2]
    factor = min(max(height, width) / side, min(height, width) / (2 * _GAP))
    if factor <= 1.0:
        return plane
    whole = int(factor)  # averaging over whole pixels is ten times faster than over parts of them
    if whole > 1:
        size = (width // whole, height // whole)
        even = plane[: size[1] * whole, : size[0] * whole]
        plane = cv2.resize(even, size, interpolation=cv2.INTER_AREA)
    if whole < factor:
        size = (round(width / factor), round(height / factor))
        plane = cv2.resize(plane, size, interpolation=cv2.INTER_LINEAR)
    return plane


def _tilt(plane: Pixels) -> Pixels:
    """Turned by 45 degrees: upright and sideways lines pass for up to 25 degrees of tilt."""
    cv2 = _opencv()
    height, width = plane.shape[:2]
    side = math.ceil(math.hypot(height, width))
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), 45.0, 1.0)
    turn[:, 2] += (side - width) / 2, (side - height) / 2
    return cv2.warpAffine(plane, turn, (side, side), borderMode=cv2.BORDER_REPLICATE)


def _has_line(plane: Pixels, contrast: int) -> bool:
    """Whether a line of strokes stands in the plane [H, W] or [H, W, C], at any scale."""
    cv2 = _opencv()
    if int(plane.max()) - int(plane.min()) <= contrast:
        return False
    square = np.ones((_INK_WINDOW, _INK_WINDOW), np.uint8)
    while True:
        lightest, darkest = cv2.dilate(plane, square), cv2.erode(plane, square)
        spread = cv2.subtract(lightest, darkest)
        clear = cv2.threshold(spread, contrast, 255, cv2.THRESH_BINARY)[1]
        if not clear.any():
            return False
        middle = cv2.addWeighted(lightest, 0.5, darkest, 0.5, 0)
        ink = cv2.bitwise_and(clear, cv2.compare(plane, middle, cv2.CMP_GT))
        if _line_strength(cv2.absdiff(ink[:, 1:], ink[:, :-1]), _WORD) >= _STROKES:
            return True
        down = cv2.transpose(cv2.absdiff(ink[1:], ink[:-1]))
        if _line_strength(down, _WORD_SIDEWAYS) >= _STROKES:
            return True
        half = (plane.shape[1] // 2, plane.shape[0] // 2)
        if max(half) < _LAST_SIDE or min(half) < _GAP:
            return False
        even = plane[: 2 * half[1], : 2 * half[0]]
        plane = cv2.resize(even, half, interpolation=cv2.INTER_AREA)


def _line_strength(changes: Pixels, word: int) -> int:
    """Largest share (of 255) of changes in a stretch, less that in the quieter rows around it."""
    cv2 = _opencv()
    height, width = changes.shape[0], max(1, changes.shape[1] // _STRIDE)
    reach = _GAP // 2
    quiet = {"borderType": cv2.BORDER_CONSTANT}
    whole = changes[:, : width * _STRIDE]  # averaging over parts of pixels is far slower
    rows = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    rows = cv2.copyMakeBorder(rows, reach, reach, 0, 0, cv2.BORDER_CONSTANT, value=0)
    rows = cv2.blur(rows, (word // _STRIDE, 1), **quiet)
    stretch = cv2.blur(rows, (1, _LINE), **quiet)
    quietest = cv2.erode(rows, np.ones((_GAP, 1), np.uint8), borderValue=0, **quiet)
    around = cv2.max(quietest[2 * reach :], quietest[: -2 * reach])  # below, above
    return int(cv2.subtract(stretch[reach:-reach], around).max())


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    """One recognised box: its corners [4, 2], text, confidence and reading direction (radians)."""

    box: Boxes
    text: str
    confidence: float
    direction: float

    @property
    def characters(self) -> int:
        """Letters and digits; rulers, bullets and borders have none."""
        return sum(character.isalnum() for character in self.text)


class _Engine:
    """rapidocr behind two calls; the one place that knows it. Not safe for threads."""

    def __init__(self, threads: int) -> None:
        try:
            import onnxruntime  # noqa: F401  (rapidocr looks for it only when it reads)
            import rapidocr

            models = Path(rapidocr.__file__).parent / "models"
            detector, recogniser = (
                models / f"PP-OCRv6_{part}_small.onnx" for part in ("det", "rec")
            )
            for model in (detector, recogniser):
                if not model.is_file():
                    raise FileNotFoundError(f"no {model}")
            params = {
                "Global.log_level": "critical",
                # Sizes are ours: the engine's own limits distort strips and thin crops.
                "Global.use_preprocess_img": False,
                "Det.limit_type": "max",
                "Det.limit_side_len": 1 << 20,
                # Short words padded to the default 320 px take longer and are read no better.
                "Rec.rec_img_shape": [3, 48, 192],
                # Named files are opened as they are: nothing is ever downloaded.
                "Det.model_path": str(detector),
                "Rec.model_path": str(recogniser),
                "EngineConfig.onnxruntime.intra_op_num_threads": min(threads, os.cpu_count() or 1),
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
            self._call: Any = rapidocr.RapidOCR(params=params)
            reader = self._call._load_rec_model()
            reader.postprocess_op = _SpaceKeeper(reader.postprocess_op)
        except Exception as error:  # whatever a broken installation raises: named, never hidden
            raise MissingExtraError(
                f"rapidocr cannot be loaded ({type(error).__name__}: {error}). Install the tested "
                f"version: {_INSTALL}"
            ) from error

    def boxes(self, pixels: Pixels) -> Boxes:
        """Corners [K, 4, 2] of the pieces of text, in pixels; K may be 0."""
        found = self._run(pixels, use_det=True, use_cls=False, use_rec=False)
        boxes = getattr(found, "boxes", None)
        return np.zeros((0, 4, 2), np.float32) if boxes is None else np.asarray(boxes, np.float32)

    def line(self, pixels: Pixels) -> tuple[str, float]:
        """Text and confidence of one upright line of text that fills the picture."""
        found = self._run(pixels, use_det=False, use_cls=False, use_rec=True)
        if not found.txts:
            return "", 0.0
        return found.txts[0].strip(), float(found.scores[0])

    def _run(self, pixels: Pixels, **steps: bool) -> Any:
        return self._call(np.ascontiguousarray(pixels[..., ::-1]), **steps)  # RGB to BGR


class _SpaceKeeper:
    """The engine's decoder, with a space preferred wherever one is at all likely."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self._space = decoder.dict[" "]

    def __call__(self, chances: NDArray[np.float32], *args: Any, **settings: Any) -> Any:
        chances = np.array(chances)  # [B, T, characters]
        best = chances.max(-1)
        wins = chances[..., self._space] * _SPACE_WEIGHT > best
        # Just above what it beats: confidences are means of these numbers and stay in [0, 1].
        above = np.minimum(np.nextafter(best, np.float32(2)), 1)
        chances[..., self._space][wins] = above[wins]
        return self._decoder(chances, *args, **settings)


def _read(engine: _Engine, pixels: Pixels, max_side: int, min_confidence: float) -> OcrText:
    """One pass: boxes, then the text of each box, then reading order."""
    cv2 = _opencv()
    height, width = pixels.shape[:2]
    if max(height, width) < _SMALL_SIDE:
        size = (_SMALL_ZOOM * width, _SMALL_ZOOM * height)
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)
        height, width = pixels.shape[:2]
    scale = min(1.0, max_side / math.sqrt(width * max(height, width * _STRIP)))
    seen = pixels
    if scale < 1.0:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        seen = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    boxes = engine.boxes(seen)
    boxes = boxes * np.array([width / seen.shape[1], height / seen.shape[0]], np.float32)
    lines = [_read_line(engine, pixels, box) for box in boxes]
    lines = [line for line in lines if line.characters and line.confidence >= min_confidence]
    characters = [line.characters for line in lines]
    if sum(characters) < _MIN_CHARACTERS:
        return NO_TEXT
    rows = tuple(" ".join(line.text for line in row) for row in _rows(lines))
    confidence = float(np.average([line.confidence for line in lines], weights=characters))
    area = sum(float(cv2.contourArea(line.box)) for line in lines) / (height * width)
    return OcrText(
        text=" ".join(rows),
        lines=rows,
        confidence=round(confidence, 4),
        area=round(min(1, area), 4),
    )


def _read_line(engine: _Engine, pixels: Pixels, box: Boxes) -> _Line:
    """Cut a box out upright and recognise it; a doubtful one is also tried upside down."""
    cv2 = _opencv()
    across, down = box[1] - box[0], box[3] - box[0]
    width = max(1, round(float(np.linalg.norm(across))))
    height = max(1, round(float(np.linalg.norm(down))))
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    crop = cv2.warpPerspective(
        pixels,
        cv2.getPerspectiveTransform(box, corners),
        (width, height),
        flags=cv2.INTER_CUBIC,
        borderMode=cv2.BORDER_REPLICATE,
    )
    crop = _stretched(crop)
    sideways = height >= _SIDEWAYS * width
    if sideways:  # turned so that its top lies left: the line then reads along `down`
        crop, across = np.rot90(crop), down
    direction = math.atan2(float(across[1]), float(across[0]))
    text, confidence = _recognise(engine, crop)
    if confidence < _UPRIGHT_ABOVE and crop.shape[1] >= _SIDEWAYS * crop.shape[0]:
        turned, surer = _recognise(engine, np.rot90(crop, 2))
        if surer > confidence + _UPRIGHT_GAIN:
            return _Line(box, turned, surer, direction + math.pi)
    return _Line(box, text, confidence, direction)


def _stretched(crop: Pixels) -> Pixels:
    """Darkest value to 0, lightest to 255: keeps faint words and words on grey apart."""
    low, high = int(crop.min()), int(crop.max())
    if high - low < _LUMA_CONTRAST:
        return crop
    return ((crop - np.float32(low)) * np.float32(255 / (high - low))).astype(np.uint8)


def _recognise(engine: _Engine, crop: Pixels) -> tuple[str, float]:
    """Text and confidence of one line; a very long one is cut where its columns are quiet."""
    height, width = crop.shape[:2]
    count = math.ceil(width / (_LONGEST_LINE * height))
    cuts = [0]
    if count > 1:
        contrast = crop.max((0, 2)).astype(np.float32) - crop.min((0, 2))  # [width]
        contrast = np.convolve(contrast, np.ones(max(1, height // 4)), "same")
    for i in range(1, count):
        start = i * width // count - height
        cuts.append(start + int(contrast[start : start + 2 * height].argmin()))
    parts = [engine.line(crop[:, a:b]) for a, b in pairwise([*cuts, width])]
    weights = [max(1, len(text)) for text, _ in parts]
    confidence = float(np.average([sure for _, sure in parts], weights=weights))
    return " ".join(text for text, _ in parts if text), confidence


def _rows(lines: list[_Line]) -> list[list[_Line]]:
    """Rows top to bottom, each left to right, as seen along the common reading direction."""
    weights = np.array([line.characters for line in lines])
    angles = np.array([line.direction for line in lines])
    angle = math.atan2((weights * np.sin(angles)).sum(), (weights * np.cos(angles)).sum())
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turned = np.stack([line.box for line in lines]) @ turn  # [L, 4, 2], text now runs along x
    left, middle = turned[..., 0].min(1), turned[..., 1].mean(1)
    height = np.array(
        [min(np.linalg.norm(b[3] - b[0]), np.linalg.norm(b[1] - b[0])) for b in turned]
    )
    rows: list[list[int]] = []
    for i in np.argsort(middle, kind="stable"):
        last = rows[-1][0] if rows else None
        if last is not None and abs(middle[i] - middle[last]) < _ROW_OVERLAP * min(
            height[i], height[last]
        ):
            rows[-1].append(int(i))
        else:
            rows.append([int(i)])
    return [[lines[i] for i in sorted(row, key=lambda i: left[i])] for row in rows]


# --- cache ----------------------------------------------------------------------------------------


class _MemoryCache:
    """The latest results of this object."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, str], OcrText] = OrderedDict()
        self._turn = threading.Lock()

    def get(self, content_hash: str, version: str) -> OcrText | None:
        with self._turn:
            return self._entries.get((content_hash, version))

    def put(self, content_hash: str, version: str, found: OcrText) -> None:
        with self._turn:
            self._entries[content_hash, version] = found
            if len(self._entries) > _MEMORY_ENTRIES:
                self._entries.popitem(last=False)


class _FileCache:
    """One SQLite file; a connection per call, so that threads, forks and processes may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as db, db:
                db.execute(
                    "CREATE TABLE IF NOT EXISTS ocr (content_hash TEXT, version TEXT, found TEXT,"
                    " PRIMARY KEY (content_hash, version)) WITHOUT ROWID"
                )
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"The OCR cache {path} cannot be used ({error}). Delete the file or name another."
            ) from error

    def get(self, content_hash: str, version: str) -> OcrText | None:
        query = "SELECT found FROM ocr WHERE content_hash = ? AND version = ?"
        try:
            with closing(self._open()) as db:
                row = db.execute(query, (content_hash, version)).fetchone()
        except sqlite3.Error as error:
            logger.warning(
                "OCR cache %s: not read (%s); the picture is read again", self._path, error
            )
            return None
        if row is None:
            return None
        entry = json.loads(row[0])
        return OcrText(**dict(entry, lines=tuple(entry["lines"])))

    def put(self, content_hash: str, version: str, found: OcrText) -> None:
        entry = json.dumps(asdict(found), ensure_ascii=False)
        try:
            with closing(self._open()) as db, db:
                db.execute(
                    "INSERT OR REPLACE INTO ocr VALUES (?, ?, ?)", (content_hash, version, entry)
                )
        except sqlite3.Error as error:
            logger.warning("OCR cache %s: not written (%s)", self._path, error)

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=_CACHE_WAIT_S)
