"""Text in pictures: what is rendered is read back, once, and a text-free picture costs nothing."""

from __future__ import annotations

import io
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

pytest.importorskip("rapidocr", reason="needs the extra [ocr]")
pytest.importorskip("onnxruntime", reason="needs the extra [ocr]")

from hysafe.data import ocr as ocr_module
from hysafe.data.ocr import Ocr, OcrText, may_hold_text
from hysafe.errors import ConfigError, InputError, MissingExtraError

GREY = (128, 128, 128)


def text_picture(
    lines: list[str],
    *,
    size: int = 22,
    ink: str | tuple[int, int, int] = "black",
    ground: str | tuple[int, int, int] | Image.Image = "white",
    shape: tuple[int, int] = (420, 160),
    outline: int = 0,
) -> Image.Image:
    image = ground.copy() if isinstance(ground, Image.Image) else Image.new("RGB", shape, ground)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size)
    for row, line in enumerate(lines):
        place = (0.06 * image.width, 0.08 * image.height + row * size * 1.5)
        draw.text(place, line, font=font, fill=ink, stroke_width=outline, stroke_fill="black")
    return image


def noise(seed: int, shape: tuple[int, int] = (420, 160)) -> Image.Image:
    values = np.random.default_rng(seed).normal(128, 40, (shape[1], shape[0], 3))
    image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(1))


def gradient(shape: tuple[int, int] = (420, 160)) -> Image.Image:
    ramp = np.linspace(30, 220, shape[0])[None, :, None] * np.ones((shape[1], 1, 3))
    return Image.fromarray(ramp.astype(np.uint8))


def words(text: str) -> set[str]:
    return {"".join(c for c in word if c.isalnum()) for word in text.lower().split()}


class FakeEngine:
    """Stands in for rapidocr: answers by the boxes it is given, and counts."""

    boxes_found: tuple[tuple[float, float, float, float], ...] = ((20, 10, 120, 30),)
    answers: tuple[tuple[str, float], ...] = (("hello", 0.99),)
    passes = 0
    lines_read = 0
    failure: Exception | None = None

    def __init__(self, threads: int) -> None:
        self._queue: list[tuple[str, float]] = []

    def boxes(self, pixels: np.ndarray) -> np.ndarray:
        cls = type(self)
        cls.passes += 1
        if cls.failure is not None:
            raise cls.failure
        self._queue = list(cls.answers)
        corners = [[(x, y), (r, y), (r, b), (x, b)] for x, y, r, b in cls.boxes_found]
        return np.array(corners, np.float32).reshape(-1, 4, 2)

    def line(self, pixels: np.ndarray) -> tuple[str, float]:
        type(self).lines_read += 1
        return self._queue.pop(0)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    class Engine(FakeEngine):
        pass

    monkeypatch.setattr(ocr_module, "_Engine", Engine)
    return Engine


@pytest.fixture(scope="module")
def reader() -> Ocr:
    return Ocr()


# --- the real engine ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ink", "ground", "outline", "size"),
    [
        pytest.param("black", "white", 0, 12, id="small print"),
        pytest.param("white", (20, 20, 24), 0, 22, id="inverted"),
        pytest.param((200, 60, 60), (30, 137, 30), 0, 26, id="colours of equal luminance"),
        pytest.param((150, 150, 150), GREY, 0, 26, id="faint"),
        pytest.param("white", noise(0), 2, 26, id="outlined on noise"),
    ],
)
def test_rendered_text_is_read_back(reader, ink, ground, outline, size):
    sentence = ["meet behind the station", "bring two tickets"]
    image = text_picture(sentence, ink=ink, ground=ground, outline=outline, size=size)

    found = reader.read(image, "")

    assert words(found.text) == words(" ".join(sentence))
    assert found.text == " ".join(found.lines)
    assert found.confidence > 0.9
    assert 0.02 < found.area < 0.6


@pytest.mark.parametrize("turn", [0, 4, -9, 90, 180, 270])
def test_reading_order_follows_the_text_not_the_picture(reader, turn):
    sentence = ["WARNING HIGH VOLTAGE", "KEEP OUT OF HERE", "ASK THE OFFICE"]
    image = text_picture(sentence, shape=(420, 240), size=30)

    found = reader.read(image.rotate(turn, expand=True, fillcolor="white"), "")

    # the engine may join words on grey; order is what counts here
    assert [line.replace(" ", "") for line in found.lines] == [
        line.replace(" ", "") for line in sentence
    ]


def test_confidence_stays_a_probability(reader):
    image = text_picture(["a b c d e f g h i j k l m n"], size=30, ground=GREY, ink="white")

    assert 0.5 < reader.read(image, "").confidence <= 1.0


def test_a_thumbnail_of_64_px_is_read(reader):
    image = text_picture(["CASH", "LOAN"], shape=(64, 64), size=14, ground="navy", ink="yellow")

    assert words(reader.read(image, "").text) == {"cash", "loan"}


def test_a_strip_is_read(reader):
    sentence = "click this link to verify your account"
    image = text_picture([sentence], shape=(700, 24), size=16)

    assert reader.read(image, "").text == sentence


def test_a_label_on_a_large_picture_is_read(reader):
    image = gradient((2400, 1600))
    font = ImageFont.load_default(60)
    ImageDraw.Draw(image).text((300, 900), "private message", font=font, fill="white")

    assert words(reader.read(image, "").text) == {"private", "message"}


def test_nothing_is_fetched_and_nothing_is_printed(monkeypatch, capfd):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)

    found = Ocr(threads=1_000).read(text_picture(["quiet zone"], size=30), "")

    assert found.text == "quiet zone"
    assert capfd.readouterr() == ("", "")


def test_missing_models_name_the_remedy(monkeypatch, tmp_path):
    import rapidocr

    monkeypatch.setattr(rapidocr, "__file__", str(tmp_path / "__init__.py"))

    with pytest.raises(MissingExtraError, match=r"pip install 'hysafe\[ocr\]'"):
        Ocr().read(text_picture(["quiet zone"]), "")


# --- the cheap look -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [11, 16, 28, 70, 150])
@pytest.mark.parametrize("turn", [0, 20, 45, 90, 180])
def test_a_word_of_any_size_and_direction_is_worth_reading(size, turn):
    shape = (max(300, size * 5), max(200, size * 2))
    image = text_picture(["message"], size=size, shape=shape, ground=(250, 240, 230), ink="navy")

    assert may_hold_text(image.rotate(turn, expand=True, fillcolor=(250, 240, 230)))


@pytest.mark.parametrize("seed", range(4))
def test_a_label_on_texture_is_worth_reading(seed):
    assert may_hold_text(text_picture(["winner"], ground=noise(seed), ink="white", outline=1))


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(Image.new("RGB", (500, 500), "white"), id="blank"),
        pytest.param(Image.new("L", (500, 500), 77), id="grey"),
        pytest.param(gradient((500, 400)), id="gradient"),
        pytest.param(noise(1, (500, 400)).filter(ImageFilter.GaussianBlur(30)), id="blurred"),
        pytest.param(text_picture(["no"], shape=(30, 30), size=12), id="too small"),
        pytest.param(text_picture(["one word"], shape=(300, 7), size=7), id="too thin"),
    ],
)
def test_a_picture_without_text_is_not_worth_reading(image):
    assert not may_hold_text(image)


def test_a_drawing_without_text_is_not_worth_reading():
    image = Image.new("RGB", (400, 400), "skyblue")
    draw = ImageDraw.Draw(image)
    draw.ellipse((60, 60, 200, 200), fill="gold")
    draw.rectangle((0, 300, 400, 400), fill="seagreen")
    draw.polygon([(250, 300), (300, 180), (350, 300)], fill="firebrick")

    assert not may_hold_text(image)


def test_a_third_of_small_photographs_is_skipped():
    data = os.environ.get("HYSAFE_DATA", "")
    path = Path(data) / "images/tiny_imagenet/val.parquet"
    if not data or not path.is_file():
        pytest.skip("HYSAFE_DATA with Tiny-ImageNet is needed")
    import pyarrow.parquet as parquet

    table = parquet.ParquetFile(path).read_row_group(0, columns=["image"]).slice(0, 200)
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in table.to_pylist()]

    assert np.mean([not may_hold_text(picture) for picture in pictures]) > 0.33


# --- one pass -------------------------------------------------------------------------------------


def test_a_blank_picture_costs_no_pass(engine):
    found = Ocr().read(Image.new("RGB", (500, 500), "white"), "blank")

    assert found == OcrText(text="", lines=(), confidence=0.0, area=0.0)
    assert engine.passes == 0


def test_text_is_recognised_only_where_boxes_are(engine):
    engine.boxes_found = ()

    assert Ocr().read(text_picture(["hello"]), "").text == ""
    assert (engine.passes, engine.lines_read) == (1, 0)


def test_rows_run_top_to_bottom_and_left_to_right(engine):
    engine.boxes_found = (
        (200, 62, 300, 82),  # second row, right
        (20, 100, 300, 120),
        (20, 10, 300, 30),
        (20, 58, 150, 78),  # second row, left, slightly higher
    )
    engine.answers = (("d", 1.0), ("e", 1.0), ("a b", 1.0), ("c", 1.0))

    assert Ocr().read(text_picture(["hello"]), "").lines == ("a b", "c d", "e")


def test_doubtful_lines_are_dropped_and_the_rest_is_weighed_by_length(engine):
    engine.boxes_found = ((0, 0, 20, 20), (0, 40, 20, 60), (0, 80, 20, 100))
    engine.answers = (("abc", 1.0), ("junk", 0.49), ("d", 0.8))

    found = Ocr(min_confidence=0.5).read(text_picture(["hello"]), "")

    assert found.lines == ("abc", "d")
    assert found.confidence == pytest.approx((3 * 1.0 + 1 * 0.8) / 4)
    assert found.area == pytest.approx(2 * 20 * 20 / (420 * 160), abs=1e-4)


@pytest.mark.parametrize("answer", ["C", "--", "•", ""])
def test_a_lone_character_is_no_text(engine, answer):
    engine.answers = ((answer, 0.99),) * 2

    assert Ocr().read(text_picture(["hello"]), "").text == ""


def test_a_doubtful_line_is_tried_the_other_way_up(engine):
    engine.answers = (("pᴉɐd", 0.7), ("paid", 0.99))

    assert Ocr().read(text_picture(["hello"]), "").text == "paid"
    assert (engine.passes, engine.lines_read) == (1, 2)


def test_a_very_long_line_is_read_in_pieces(engine):
    engine.boxes_found = ((0, 10, 4000, 30),)
    engine.answers = (("one", 1.0), ("two", 1.0), ("three", 1.0), ("four", 1.0))
    image = text_picture(["hello " * 60], shape=(4000, 40), size=18)

    assert Ocr(max_side=4000).read(image, "").text == "one two three four"


def test_failures_of_the_engine_name_the_remedy(engine):
    engine.failure = RuntimeError("bad tensor")

    with pytest.raises(InputError, match=r"420 x 160.*bad tensor.*--no-ocr.*hysafe\[ocr\]") as info:
        Ocr().read(text_picture(["hello"]), "a")
    assert info.value.__cause__ is engine.failure

    engine.failure = None
    assert len(Ocr().read(text_picture(["hello"]), "a").lines) == 1


def test_a_damaged_picture_is_an_input_error(engine):
    whole = io.BytesIO()
    noise(3).save(whole, "JPEG")
    damaged = Image.open(io.BytesIO(whole.getvalue()[:2000]))

    with pytest.raises(InputError, match="cannot be decoded"):
        Ocr().read(damaged, "")


# --- the cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_cache_hit_calls_no_engine(engine, tmp_path, on_disk):
    reader = Ocr(cache=tmp_path / "ocr.sqlite3" if on_disk else None)
    image = text_picture(["hello"])

    first = reader.read(image, "a")
    assert reader.read(image, "a") == first
    assert engine.passes == 1

    reader.read(image, "b")
    assert engine.passes == 2


def test_a_picture_without_hash_is_not_kept(engine):
    reader = Ocr()
    for _ in range(2):
        reader.read(text_picture(["hello"]), "")

    assert engine.passes == 2


def test_the_file_serves_the_next_run_with_equal_settings_only(engine, tmp_path):
    path = tmp_path / "new" / "ocr.sqlite3"
    engine.answers = (("héllo wörld 死", 0.99),)
    image = text_picture(["hello"])
    first = Ocr(cache=path).read(image, "a")

    assert Ocr(cache=path, threads=2).read(image, "a") == first
    assert engine.passes == 1
    Ocr(cache=path, min_confidence=0.6).read(image, "a")
    Ocr(cache=path, max_side=500).read(image, "a")
    assert engine.passes == 3
    assert [entry.name for entry in path.parent.iterdir()] == ["ocr.sqlite3"]


def test_the_engine_version_is_part_of_the_key(engine, tmp_path, monkeypatch):
    image = text_picture(["hello"])
    Ocr(cache=tmp_path / "ocr.sqlite3").read(image, "a")
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.99.0")
    Ocr(cache=tmp_path / "ocr.sqlite3").read(image, "a")

    assert engine.passes == 2


def test_many_threads_read_a_picture_once(engine, tmp_path):
    readers = [Ocr(cache=tmp_path / "ocr.sqlite3") for _ in range(2)]
    image = text_picture(["hello"])
    start = threading.Barrier(8)

    def read(number: int) -> OcrText:
        start.wait()
        return [readers[number % 2].read(image, f"{k}") for k in range(10)][-1]

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(read, range(8)))

    assert len(found) == 1
    assert 10 <= engine.passes <= 20  # at most once per picture and reader


WRITER = """
import sys
from pathlib import Path
from hysafe.data.ocr import OcrText, _FileCache
cache = _FileCache(Path(sys.argv[1]))
for k in range(60):
    name = f"{sys.argv[2]}-{k}"
    cache.put(name, "v", OcrText(name, (name,), 1.0, 0.5))
    assert cache.get(name, "v").text == name
"""


def test_processes_share_the_file(tmp_path):
    path = tmp_path / "ocr.sqlite3"
    command = [sys.executable, "-c", WRITER, str(path)]
    running = [subprocess.Popen([*command, str(k)], stderr=subprocess.PIPE) for k in range(3)]
    for process in running:
        _, printed = process.communicate(timeout=120)
        assert (process.returncode, printed) == (0, b"")

    cache = ocr_module._FileCache(path)
    names = [f"{process}-{k}" for process in range(3) for k in range(60)]
    assert [cache.get(name, "v").text for name in names] == names


def test_a_cache_file_that_is_none_is_a_config_error(tmp_path):
    path = tmp_path / "ocr.sqlite3"
    path.write_bytes(b"not a data base, though long enough to be taken for one" * 10)

    with pytest.raises(ConfigError, match="Delete the file"):
        Ocr(cache=path)


def test_a_cache_lost_during_the_run_is_reported_and_reading_goes_on(engine, tmp_path, caplog):
    path = tmp_path / "ocr.sqlite3"
    reader = Ocr(cache=path)
    path.write_bytes(b"overwritten by something else" * 40)

    with caplog.at_level(logging.WARNING):
        assert reader.read(text_picture(["hello"]), "a").text == "hello"
    assert "OCR cache" in caplog.text


# --- the object -----------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_without_the_extra_the_pip_command_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(MissingExtraError, match=rf"{package}.*pip install 'hysafe\[ocr\]'"):
        Ocr()


def test_without_opencv_the_look_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)

    with pytest.raises(MissingExtraError, match=r"pip install 'hysafe\[ocr\]'"):
        may_hold_text(Image.new("RGB", (100, 100)))


@pytest.mark.parametrize(
    "setting", [{"threads": 0}, {"max_side": 20}, {"min_confidence": 1.5}, {"min_confidence": -1}]
)
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        Ocr(**setting)


def test_a_reader_can_be_sent_to_another_process(engine, tmp_path):
    reader = Ocr(threads=2, max_side=700, min_confidence=0.7, cache=tmp_path / "ocr.sqlite3")
    reader.read(text_picture(["hello"]), "a")

    again = pickle.loads(pickle.dumps(reader))

    assert again.version == reader.version
    assert (again.threads, again.cache) == (2, tmp_path / "ocr.sqlite3")
    assert again.read(text_picture(["hello"]), "a").text == "hello"
    assert engine.passes == 1


def test_importing_the_module_loads_no_engine():
    code = "import sys, hysafe.data.ocr; print({'rapidocr','cv2','onnxruntime'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert printed.stdout.strip() == "set()", printed.stderr
