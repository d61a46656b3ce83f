"""Posts of public sets, as readers judged them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hysafe.data import posts
from hysafe.data.datamodule import TEXT_WEIGHTS, EmbedData
from hysafe.data.label_map import SAFE, permissive_sets
from hysafe.data.posts import POST_SPLITS, digest, read_posts
from hysafe.errors import ConfigError, InputError
from hysafe.taxonomy import load_taxonomy

TEXTS = {
    "angry": "", "hateful": "1.2", "for testing": "", "vile": "1.3", "puzzling": "?", "never read": None
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a set of six posts, of which five were read; some have labels of their own."""
    (tmp_path / "text").mkdir()
    rows: list[dict[str, Any]] = [
        {"text": t, "source": "davidson", "labels": ["offensive language"], "safe": False} for t in TEXTS
    ]  # fmt: skip
    rows += [{"text": "own label", "source": "davidson", "labels": ["hate speech"], "safe": False}]
    rows += [
        {"text": t, "source": "davidson", "labels": ["hate speech"], "safe": False}
        for t in ("angry", "puzzling", "for testing")
    ]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "text/davidson.jsonl").write_text(lines)
    table = tuple(
        {
            "set": "davidson",
            "sha256": digest(t),
            "node": node,
            "split": "test" if "test" in t else "train",
        }
        for t, node in TEXTS.items()
        if node is not None
    )
    monkeypatch.setattr(posts, "_readings", lambda: table)
    return tmp_path


def test_a_post_has_the_node_in_which_a_reader_saw_it(root: Path) -> None:
    train, test = (read_posts(split, str(root)) for split in POST_SPLITS)
    assert [(s.text, s.nodes, s.safe) for s in train] == [
        ("angry", (SAFE,), True), ("hateful", ("1.2",), False), ("vile", ("1.3",), False)
    ]  # fmt: skip
    assert [(s.text, s.nodes, s.safe) for s in test] == [("for testing", (SAFE,), True)]
    assert {s.source for s in [*train, *test]} == {"posts"}
    assert {s.extra["set"] for s in train} == {"davidson"}


def test_training_takes_the_reading_for_the_own_label_and_no_test_post(root: Path) -> None:
    given: dict[str, Any] = {
        "data_dir": str(root), "pictures": False, "text_sets": ["davidson"], "rendered": 4, "image_size": 16
    }  # fmt: skip
    without, with_them = EmbedData(**given), EmbedData(**given, posts=True)
    for data in (without, with_them):
        data.setup()
    found = [
        {str(s.text): (s.source, s.nodes) for s in (*d.train_texts.samples, *d.held_out_texts)
         if s.source in ("davidson", "posts")}
        for d in (without, with_them)
    ]  # fmt: skip
    assert found[0] == dict.fromkeys(
        ("own label", "angry", "puzzling", "for testing"), ("davidson", ("1.2",))
    )
    assert found[1] == {
        "own label": ("davidson", ("1.2",)),
        "angry": ("posts", (SAFE,)),
        "hateful": ("posts", ("1.2",)),
        "vile": ("posts", ("1.3",)),
    }
    assert len(with_them.draw_weights) == len(with_them.train_texts)
    weighed = EmbedData(**given, posts=True, risky_posts=3.0)
    weighed.setup()
    drawn = {
        str(s.text): float(w)
        for s, w in zip(weighed.train_texts.samples, weighed.draw_weights, strict=True)
        if s.source == "posts"
    }
    assert drawn["hateful"] == pytest.approx(3 * drawn["angry"])
    assert sum(drawn.values()) == pytest.approx(TEXT_WEIGHTS["posts"])
    with pytest.raises(ConfigError, match="risky_posts 0"):
        EmbedData(**given, posts=True, risky_posts=0.0).setup()
    assert (with_them.train_pictures.pixels == without.train_pictures.pixels).all()


def test_a_missing_set_and_an_unknown_split_are_named(root: Path) -> None:
    (root / "text/davidson.jsonl").unlink()
    with pytest.raises(InputError, match=r"davidson\.jsonl is missing.*posts"):
        read_posts("train", str(root))
    with pytest.raises(ConfigError, match="'validation': known are train, test"):
        read_posts("validation", str(root))


def test_readings_are_of_permissive_sets_and_nodes_of_the_taxonomy() -> None:
    rows = posts._readings()
    categories = {n.id for n in load_taxonomy().categories}
    assert {r["set"] for r in rows} <= set(permissive_sets())
    assert {r["node"] for r in rows} <= categories | {"", posts.UNCLEAR}
    assert {r["split"] for r in rows} == set(POST_SPLITS)
    assert len({r["sha256"] for r in rows}) == len(rows)
    assert all(len(r["sha256"]) == posts.DIGITS for r in rows)


def test_every_reading_has_its_post(data_dir: Path) -> None:
    rows = posts._readings()
    for split in POST_SPLITS:
        found = read_posts(split, str(data_dir))
        assert {s.id for s in found} == {
            f"post-{r['sha256']}"
            for r in rows
            if r["split"] == split and r["node"] != posts.UNCLEAR
        }
    # no test post is trained on under its own label
    data = EmbedData(str(data_dir), pictures=False, rendered=4, image_size=16, posts=True)
    data.setup()
    tested = {s.text for s in read_posts("test", str(data_dir))}
    assert not tested & {s.text for s in (*data.train_texts.samples, *data.held_out_texts)}
