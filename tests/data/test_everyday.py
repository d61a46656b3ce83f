"""Sentences that mention things, made for training."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from hysafe.data.datamodule import EmbedData
from hysafe.data.everyday import _table, everyday_texts, things
from hysafe.data.label_map import SAFE
from hysafe.errors import ConfigError
from hysafe.taxonomy import load_taxonomy

EDGES = """abyssinian.n.01\tcat.n.01
cat.n.01\tanimal.n.01
dog.n.01\tanimal.n.01
tabby.n.02\tcat.n.01
blue_tit.n.01\tanimal.n.01
sea_dog.n.01\tdog.n.01
st._bernard.n.01\tdog.n.01
oboe.n.01\tmusical_instrument.n.01
flute.n.01\tmusical_instrument.n.01
hammer.n.01\ttool.n.01
saw.n.01\ttool.n.01
club.n.01\ttool.n.01
club.n.01\tweapon.n.01
war_club.n.01\tclub.n.01
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "wordnet").mkdir()
    (tmp_path / "images" / "tiny_imagenet").mkdir(parents=True)
    edges = EDGES
    for kind, tops in _table()["kinds"].items():  # two things of every kind
        edges += "".join(f"{kind}{c}.n.01\t{tops[0]}\n" for c in "pq")
    (tmp_path / "wordnet" / "noun_edges.tsv").write_text(edges, encoding="utf-8")
    classes = "label,name,synset\n3,dog,dog.n.01\n"
    (tmp_path / "images" / "tiny_imagenet" / "classes.csv").write_text(classes, encoding="utf-8")
    return tmp_path


def test_things_are_first_senses_that_are_neither_dangerous_nor_picture_classes(root: Path) -> None:
    found = things(root)
    assert found["animal"] == [
        "abyssinian",
        "animal",
        "animalp",
        "animalq",
        "cat",
        "sea dog",
        "st. bernard",
    ]
    assert {"oboe", "flute"} < set(found["music"])
    assert {"hammer", "saw"} < set(found["thing"])
    assert not {"club", "war club"} & {n for names in found.values() for n in names}


def test_sentences_differ_and_follow_the_seed(root: Path) -> None:
    made = everyday_texts(root, 300, seed=1)
    assert len({s.text for s in made}) == 300 == len({s.id for s in made})
    assert everyday_texts(root, 300, seed=1) == made
    assert everyday_texts(root, 300, seed=2) != made
    assert not [s.text for s in made if re.search(r"[{}]|(?<!sea )\bdog\b", str(s.text))]


def test_what_is_risky_names_a_dangerous_thing(root: Path) -> None:
    made = everyday_texts(root, 300)
    nodes = {n.id for n in load_taxonomy()}
    dangerous = {t.lower() for g in _table()["risky"].values() for t in g["things"]}
    for s in made:
        text = str(s.text).lower()
        assert s.safe == (s.nodes == (SAFE,) or s.nodes[0].startswith("S."))
        assert s.nodes == (SAFE,) or s.nodes[0] in nodes
        named = any(re.search(rf"\b{re.escape(t)}\b", text) for t in dangerous)
        assert named == (s.nodes != (SAFE,))
    assert 0.1 < sum(not s.safe for s in made) / 300 < 0.4


def test_too_few_sentences_are_an_error_and_no_endless_loop(root: Path) -> None:
    with pytest.raises(ConfigError, match="everyday: only"):
        everyday_texts(root, 10**6)


def test_words_that_the_benchmark_asks_with_are_not_trained_on() -> None:
    table = _table()
    frames = [f for own in table["harmless"].values() for f in own]
    frames += [f for group in table["risky"].values() for f in group["frames"] + group["harmless"]]
    asked = re.compile(r"\b(draw|choos|wrap|lift|close-up|good condition|my new)", re.I)
    assert not [f for f in frames if asked.search(f)]


def test_real_nouns(data_dir: Path) -> None:
    found = things(data_dir)
    with (data_dir / "images/tiny_imagenet/classes.csv").open(encoding="utf-8") as lines:
        classes = {row["name"] for row in csv.DictReader(lines)}
    assert min(len(names) for names in found.values()) > 100
    assert not {"oboe", "banjo"} - set(found["music"]) - classes
    every = {n for names in found.values() for n in names}
    assert not {"rifle", "grenade", "heroin", "sherry", "gallows", "jail"} & every


@pytest.mark.parametrize("missing", ["wordnet/noun_edges.tsv", "images/tiny_imagenet/classes.csv"])
def test_a_missing_file_is_named(root: Path, missing: str) -> None:
    (root / missing).unlink()
    with pytest.raises(ConfigError, match=Path(missing).name + r"\. Point HYSAFE_DATA"):
        everyday_texts(root, 10)


@pytest.mark.parametrize("made", ["everyday", "screens"])
def test_training_reads_them_and_its_rendered_pictures_do_not_change(root: Path, made: str) -> None:
    given: dict[str, Any] = {
        "data_dir": str(root), "pictures": False, "text_sets": [], "rendered": 4, "image_size": 16
    }  # fmt: skip
    without, with_them = EmbedData(**given), EmbedData(**given, **{made: 50})
    limited = EmbedData(**given, **{made: 50}, limit=20)
    for data in (without, with_them, limited):
        data.setup()
    sources = [
        [s.source for s in d.train_texts.samples].count(made) for d in (without, with_them, limited)
    ]
    assert sources == [0, 50, 20]
    assert (
        len(with_them.draw_weights) == len(with_them.train_texts) == len(without.train_texts) + 50
    )
    assert (with_them.train_pictures.pixels == without.train_pictures.pixels).all()
