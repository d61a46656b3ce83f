"""report.html: complete, self-contained, safe to open, and right in what it says."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hysafe.app import report
from hysafe.app.report import ReportData, disk_layout, nearest_items, write_report
from hysafe.errors import ConfigError, ShapeError
from hysafe.geometry import get_space
from hysafe.taxonomy import Taxonomy, load_taxonomy

D = 24
ATTACK = '</script><script>document.title="pwned"</script><img src=x onerror="pwned()"><!--'
HASHES = {"content": "aa", "model": "m0d31", "taxonomy": "7a20", "policy": "b0b0"}


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return load_taxonomy()


@pytest.fixture(scope="module")
def node_tangents(taxonomy: Taxonomy) -> np.ndarray:
    """Nodes outward by depth, children turned towards their parent."""
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for node in taxonomy:
        depth = taxonomy.depth(node.id)
        direction = rng.normal(size=D)
        if node.parent is not None:
            direction += 3 * math.sqrt(D) * found[node.parent] / np.linalg.norm(found[node.parent])
        found[node.id] = 0.3 * depth * direction / np.linalg.norm(direction)
    return np.array(list(found.values()), dtype=np.float32)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def row(taxonomy: Taxonomy, name: str, rating: str = "safe", **changes: Any) -> dict[str, Any]:
    """A row of results.jsonl; `node` puts it on a path, anything else replaces a field."""
    node = changes.pop("node", None)
    score = changes.pop("score", 0.8)
    path = taxonomy.path(node) if node else None
    paths = [
        {"node": n.id, "path": list(taxonomy.path(n.id).names), "score": score, "in_cone": True}
        for n in (path.nodes if path else ())
    ]
    return {
        "id": name,
        "source": f"folder/{name}",
        "modality": "text",
        "rating": rating,
        "p_unsafe": score if node else 0.1,
        "paths": paths,
        "novelty": {"policy": 0.4, "distribution": 0.6},
        "radius": 1.0,
        "channels": {"text": {"p_unsafe": 0.8, "top": "6.1"}, "decided_by": "text"},
        "error": None,
        "hashes": HASHES,
        **changes,
    }


def report_data(
    taxonomy: Taxonomy, node_tangents: np.ndarray, results: list[dict[str, Any]], **changes: Any
) -> ReportData:
    rng = np.random.default_rng(1)
    values: dict[str, Any] = {
        "results": results,
        "texts": {},
        "thumbnails": {},
        "tangents": rng.normal(size=(len(results), D)).astype(np.float32) * 0.3,
        "node_ids": [n.id for n in taxonomy],
        "node_tangents": node_tangents,
        "c": 1.3,
        "geometry": "lorentz",
        "taxonomy": taxonomy,
        "active": {n.id for n in taxonomy if n.risky},
        "title": "a collection",
        "model": "mini",
        "policy": "default",
    }
    return ReportData(**{**values, **changes})


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and texts by tag or id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self._open = attributes.get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        self.texts[self._open] = self.texts.get(self._open, "") + data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def payload(self) -> dict[str, Any]:
        return json.loads(self.texts["data"])


def write(tmp_path: Path, data: ReportData, **options: Any) -> Page:
    path = tmp_path / "report.html"
    write_report(path, data, **options)
    assert os.listdir(tmp_path) == ["report.html"]
    return Page(path.read_text("utf-8"))


def digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# ---------------------------------------------------------------- one file, safe to open


def test_the_page_allows_its_own_script_and_style_and_nothing_else(
    tmp_path: Path, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    page = write(tmp_path, report_data(taxonomy, node_tangents, [row(taxonomy, "a")]))
    meta = next(m for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy")
    policy = dict(part.strip().split(" ", 1) for part in str(meta["content"]).split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == digest(page.texts["script"])
    assert policy["style-src"] == digest(page.texts["style"])
    assert policy["img-src"] == "data:"
    assert "unsafe" not in str(meta["content"])
    first_script = [name for name, _ in page.tags].index("script")
    assert page.tags.index(("meta", meta)) < first_script
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "embed", "form", "base"}
        assert not {"src", "style", "srcset"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"https?://", page.texts["script"] + page.texts["style"])
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", str(page.texts))


def test_hostile_content_stays_text(
    tmp_path: Path, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    bad = row(taxonomy, ATTACK, "unsafe", source=ATTACK, hashes=dict(HASHES, model=ATTACK))
    bad["channels"] = {
        "ocr": {"text": ATTACK, "p_unsafe": 0.9, "top": ATTACK},
        "reason": ATTACK,
    }
    bad["paths"] = [{"node": ATTACK, "path": [ATTACK], "score": 0.9, "in_cone": True}]
    broken = row(taxonomy, "b", "review", error={"type": ATTACK, "message": ATTACK})
    plain = [row(taxonomy, "a"), row(taxonomy, "b", hashes=dict(HASHES, model="another"))]
    clean = write(tmp_path, report_data(taxonomy, node_tangents, plain))
    page = write(
        tmp_path,
        report_data(
            taxonomy,
            node_tangents,
            [bad, broken],
            texts={ATTACK: ATTACK},
            title=ATTACK + "$script",
            model=ATTACK,
            policy=ATTACK,
        ),
    )
    assert [t for t, _ in page.tags] == [t for t, _ in clean.tags]
    assert page.texts["script"] == clean.texts["script"]
    assert page.texts["title"].startswith(ATTACK + "$script")
    item = page.payload["items"][0]
    assert (item["source"], item["text"], item["read"]) == (ATTACK, ATTACK, ATTACK)
    assert page.payload["errors"]["rows"] == [["folder/b", ATTACK, ATTACK]]


def test_an_undecodable_file_name_does_not_stop_the_report(
    tmp_path: Path, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    page = write(tmp_path, report_data(taxonomy, node_tangents, [row(taxonomy, name)], title=name))
    assert page.payload["items"][0]["name"] == "caf?.jpg"


def test_numbers_that_are_not_finite_become_null(
    tmp_path: Path, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    odd = row(taxonomy, "a", p_unsafe=math.nan, radius=math.inf)
    item = write(tmp_path, report_data(taxonomy, node_tangents, [odd])).payload["items"][0]
    assert (item["p"], item["radius"]) == (None, None)


def test_an_empty_collection_has_a_report(
    tmp_path: Path, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    data = report_data(taxonomy, node_tangents, [], tangents=np.zeros((0, D), np.float32))
    page = write(tmp_path, data).payload
    assert (page["total"], page["items"], page["dots"]) == (0, [], [])


def test_a_report_that_fails_leaves_the_old_one(
    tmp_path: Path, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    data = report_data(taxonomy, node_tangents, [row(taxonomy, "a")])
    with pytest.raises(ShapeError, match=r"tangents expected \[1, D\]"):
        write_report(path, replace(data, tangents=np.zeros((2, D))))
    with pytest.raises(ShapeError, match="Take both from one model"):
        write_report(path, replace(data, tangents=np.zeros((1, D + 1))))
    with pytest.raises(ConfigError, match="max_items"):
        write_report(path, data, max_items=0)
    with pytest.raises(ConfigError, match="space"):
        write_report(path, replace(data, geometry="spherical"))
    assert path.read_text() == "old"


# ---------------------------------------------------------------- what is counted and shown


def test_totals_and_tree_count_rows_that_the_queue_leaves_out(
    tmp_path: Path, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    results = [row(taxonomy, f"u{i}", "unsafe", node="6.1", score=0.6 + i / 100) for i in range(6)]
    results += [row(taxonomy, f"r{i}", "review", node="6.2") for i in range(3)]
    results += [row(taxonomy, f"s{i}") for i in range(11)]
    page = write(tmp_path, report_data(taxonomy, node_tangents, results), max_items=4)
    counts = {n["id"]: n["counts"] for n in page.payload["nodes"]}
    assert counts["D6"] == [6, 3, 0]
    assert counts["6.1"] == [6, 0, 0]
    assert counts["6.2"] == [0, 3, 0]
    assert counts["D1"] == [0, 0, 0]
    assert page.payload["unplaced"] == [0, 0, 11]
    assert [i["name"] for i in page.payload["items"]] == ["u5", "u4", "u3", "u2"]
    assert page.payload["total"] == 20
    assert len(page.payload["dots"]) == 20
    tiles = [page.texts["b"]]
    assert tiles == ["2063110"]  # items, unsafe, review, safe, errors


def test_the_queue_starts_with_unsafe_then_review_then_errors(
    tmp_path: Path, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    error = {"type": "InputError", "message": "empty file"}
    results = [
        row(taxonomy, "safe"),
        row(taxonomy, "unread", "review", error=error, p_unsafe=None),
        row(taxonomy, "review", "review", node="6.1", score=0.2),
        row(taxonomy, "half-read", "unsafe", node="6.1", score=0.7, error=error),
        row(taxonomy, "unsafe", "unsafe", node="6.1", score=0.9),
    ]
    items = write(tmp_path, report_data(taxonomy, node_tangents, results)).payload["items"]
    names = [i["name"] for i in items]
    assert names == ["unsafe", "half-read", "review", "unread", "safe"]
    assert items[1]["why"].startswith("A part of it could not be read. InputError: empty file")
    assert items[3]["why"].startswith("Could not be judged, so a person has to look.")


def test_header_names_model_policy_and_all_hashes(
    tmp_path: Path, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    results = [row(taxonomy, "a"), row(taxonomy, "b", hashes=dict(HASHES, policy="5h0p"))]
    write(tmp_path, report_data(taxonomy, node_tangents, results, model="mini-7", policy="shop"))
    text = (tmp_path / "report.html").read_text("utf-8")
    header = text[text.index("<header") : text.index("</header>")]
    for part in ("mini-7", "shop", "m0d31", "7a20", "b0b0", "5h0p", "not a verdict", "−1.3"):
        assert part in header


def test_pictures_are_embedded_but_not_those_of_text_only_nodes(
    tmp_path: Path, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    hidden = next(c.id for c in taxonomy.categories if c.text_only)
    suspected = {"image": {"p_unsafe": 0.4, "top": hidden}, "decided_by": "image"}
    results = [
        row(taxonomy, "shown", "unsafe", node="6.1", modality="image"),
        row(taxonomy, "listed", "unsafe", node=hidden, modality="image"),
        row(taxonomy, "suspected", "review", modality="image", channels=suspected),
        row(taxonomy, "none", modality="image"),
    ]
    pictures = {name: jpeg() for name in ("shown", "listed", "suspected")}
    data = report_data(taxonomy, node_tangents, results, thumbnails=pictures)
    items = {i["name"]: i["thumb"] for i in write(tmp_path, data).payload["items"]}
    assert base64.b64decode(items["shown"]) == pictures["shown"]
    assert (items["listed"], items["suspected"], items["none"]) == ("withheld", "withheld", None)


def test_text_read_in_a_picture_is_shown_once(
    tmp_path: Path, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    channels = {"ocr": {"text": "two for one", "p_unsafe": 0.1, "top": None}, "decided_by": "ocr"}
    picture = row(taxonomy, "a.jpg", modality="image", channels=channels)
    data = report_data(taxonomy, node_tangents, [picture], texts={"a.jpg": "two for one"})
    item = write(tmp_path, data).payload["items"][0]
    assert (item["text"], item["read"]) == ("", "two for one")


# ---------------------------------------------------------------- reasons in words


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"rating": "safe"}, "why", "No active node reaches its threshold."),
        ({"rating": "review"}, "why", "No active node holds it."),
        ({"channels": {"reason": "near the threshold"}}, "why", "Near the threshold."),
        (
            {"channels": {"text": {"p_unsafe": 0.8, "top": "6.1"}}},
            "channel",
            "Only the text was judged (risk 0.80, Weapons & explosives).",
        ),
        (
            {
                "channels": {
                    "image": {"p_unsafe": 0.004, "top": None},
                    "ocr": {"text": "x", "p_unsafe": 0.997, "top": "6.3"},
                    "decided_by": "ocr",
                }
            },
            "channel",
            "The text read in the picture decided (risk above 0.99, Illegal drugs); the picture "
            "alone: below 0.01.",
        ),
        (
            {"novelty": {"policy": 0.02, "distribution": 0.5}},
            "novelty",
            "New to the policy (p = 0.020): risky in a way that no active node explains.",
        ),
        (
            {"novelty": {"policy": 0.5, "distribution": 0.004}},
            "novelty",
            "Far from everything the model knows (p = 0.004).",
        ),
        (
            {"novelty": {"policy": 0.5, "distribution": None}},
            "novelty",
            "Nothing new (policy p = 0.50).",
        ),
        (
            {"novelty": {"policy": None, "distribution": None}},
            "novelty",
            "Not measured: the model has no calibration for it.",
        ),
    ],
)
def test_reasons_are_words(
    changes: dict[str, Any],
    field: str,
    words: str,
    tmp_path: Path,
    taxonomy: Taxonomy,
    node_tangents: np.ndarray,
) -> None:
    data = report_data(taxonomy, node_tangents, [row(taxonomy, "a", **changes)])
    assert write(tmp_path, data).payload["items"][0][field] == words


def test_a_domain_is_not_listed_beside_its_own_category(
    tmp_path: Path, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    deep = row(taxonomy, "a", "unsafe", node="6.1")
    deep["paths"].append({"node": "D1", "path": ["Hate"], "score": 0.5, "in_cone": False})
    item = write(tmp_path, report_data(taxonomy, node_tangents, [deep])).payload["items"][0]
    names = [path[1].split(" › ")[-1] for path in item["paths"]]
    assert names == ["Weapons & explosives", "Hate"]


# ---------------------------------------------------------------- the disk


@pytest.mark.parametrize("c", [0.3, 1.0, 4.0])
def test_the_disk_keeps_the_geodesic_radius(
    c: float, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    tangents = np.random.default_rng(2).normal(size=(40, D)) * np.linspace(0, 1, 40)[:, None]
    tangents[7] = np.nan
    ids = [n.id for n in taxonomy]
    layout = disk_layout(tangents, ids, node_tangents, taxonomy, c=c, geometry="lorentz")
    for positions, vectors in ((layout.items, tangents), (layout.nodes, node_tangents)):
        norms = np.linalg.norm(vectors.astype(float), axis=1)
        wanted = np.tanh(math.sqrt(c) * norms / 2)
        np.testing.assert_allclose(np.linalg.norm(positions, axis=1), wanted, atol=1e-6)
    assert np.isnan(layout.items[7]).all()
    assert np.isfinite(np.delete(layout.items, 7, axis=0)).all()
    assert len(layout.rings) > 2
    for radius, rho in layout.rings:
        assert rho == pytest.approx(math.tanh(math.sqrt(c) * radius / 2))


def test_the_flat_disk_is_linear_in_the_norm(taxonomy: Taxonomy, node_tangents: np.ndarray) -> None:
    tangents = np.random.default_rng(3).normal(size=(30, D))
    ids = [n.id for n in taxonomy]
    layout = disk_layout(tangents, ids, node_tangents, taxonomy, c=2.0, geometry="euclidean")
    norms = np.linalg.norm(tangents, axis=1)
    np.testing.assert_allclose(
        np.linalg.norm(layout.items, axis=1) / norms, report.FLAT_EXTENT / norms.max()
    )


def test_items_stand_towards_the_node_they_resemble(
    taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    ids = [n.id for n in taxonomy]
    rows = [ids.index(c.id) for c in taxonomy.categories]
    rng = np.random.default_rng(4)
    tangents = 2 * node_tangents[rows] + 0.02 * rng.normal(size=(len(rows), D))
    layout = disk_layout(tangents, ids, node_tangents, taxonomy, c=1.0, geometry="lorentz")
    turned = np.arctan2(*layout.items.T[::-1]) - np.arctan2(*layout.nodes[rows].T[::-1])
    away = np.abs((turned + math.pi) % (2 * math.pi) - math.pi)
    assert np.median(away) < math.pi / 12  # half a domain's sector
    assert away.max() < math.pi / 2


def test_every_domain_has_a_sector_of_its_own(
    taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    ids = [n.id for n in taxonomy]
    layout = disk_layout(node_tangents, ids, node_tangents, taxonomy, c=1.0, geometry="lorentz")
    angle = np.arctan2(layout.nodes[:, 1], layout.nodes[:, 0]) % (2 * math.pi)
    order = sorted(range(len(ids)), key=lambda i: angle[i])
    domains = [taxonomy.path(ids[i]).ids[0] for i in order]
    changes = sum(a != b for a, b in zip(domains, domains[1:] + domains[:1], strict=True))
    assert changes == len(taxonomy.children(None))


def test_dots_are_sampled_and_every_rating_keeps_some(
    tmp_path: Path,
    taxonomy: Taxonomy,
    node_tangents: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "MAX_DOTS", 60)
    monkeypatch.setattr(report, "MIN_DOTS", 5)
    results = [row(taxonomy, f"{i}", "unsafe" if i % 50 == 0 else "safe") for i in range(400)]
    results[3]["rating"] = "review"
    data = report_data(taxonomy, node_tangents, results)
    data.tangents[10] = np.nan
    page = write(tmp_path, data, max_items=20).payload
    queue = [i["rating"] for i in page["items"]]
    ratings = [queue[d[2]] if d[2] >= 0 else report.RATINGS[d[3]] for d in page["dots"]]
    assert 60 <= len(ratings) <= 70
    assert ratings.count("unsafe") == 5
    assert ratings.count("review") == 1
    assert page["points"] == 399


# ---------------------------------------------------------------- neighbours


@pytest.mark.parametrize("geometry", ["lorentz", "euclidean"])
def test_neighbours_are_those_of_brute_force(
    geometry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "QUERY_BLOCK", 7)
    monkeypatch.setattr(report, "POINT_BLOCK", 11)
    c = 0.7
    tangents = np.random.default_rng(5).normal(size=(60, D)).astype(np.float32) * 0.4
    tangents[[4, 31]] = np.nan
    asked = [0, 4, 17, 59, 30]
    found = nearest_items(tangents, asked, c=c, geometry=geometry)
    assert set(found) == {0, 17, 59, 30}
    space = get_space(geometry)
    points = space.exp_map0(torch.from_numpy(tangents).double(), c)
    for query, neighbours in found.items():
        distance = space.dist(points[query].expand_as(points), points, c)
        distance[[query, 4, 31]] = torch.inf
        wanted = distance.argsort()[:3]
        assert [i for i, _ in neighbours] == wanted.tolist()
        np.testing.assert_allclose([d for _, d in neighbours], distance[wanted], rtol=1e-5)


def test_copies_are_the_nearest_and_an_item_is_not_its_own_neighbour() -> None:
    tangents = np.random.default_rng(6).normal(size=(6, D)).astype(np.float32)
    tangents[[2, 5]] = tangents[0]
    found = nearest_items(tangents, range(6), c=1.0, geometry="lorentz")
    assert [i for i, _ in found[0]][:2] == [2, 5]
    assert [d for _, d in found[5]][:2] == [0.0, 0.0]
    assert all(row not in [i for i, _ in near] for row, near in found.items())
    assert [len(near) for near in found.values()] == [3] * 6


def test_copies_do_not_crowd_out_a_nearer_point() -> None:
    rng = np.random.default_rng(0)
    query = rng.normal(size=D)
    steps = zip([1e-4, 2e-4, 2.1e-4, 2.2e-4], rng.normal(size=(4, D)), strict=True)
    others = [query + d * step / np.linalg.norm(step) for d, step in steps]
    rows = np.array([query, *(others[i % 4] for i in range(24))], dtype=np.float32)
    order = rng.permutation(24) + 1
    found = nearest_items(rows[[0, *order]], [0], c=1.0, geometry="lorentz", count=3)
    nearest = {i + 1 for i, row in enumerate(order) if (row - 1) % 4 == 0}
    assert {row for row, _ in found[0]} <= nearest


def test_a_lone_item_has_no_neighbours() -> None:
    assert nearest_items(np.ones((1, D)), [0], c=1.0, geometry="lorentz") == {0: []}


# ---------------------------------------------------------------- in a browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_the_page_runs_and_hostile_content_does_not(
    tmp_path: Path, taxonomy: Taxonomy, node_tangents: np.ndarray
) -> None:
    results = [row(taxonomy, f"n{i}", "unsafe", node="6.1") for i in range(50)]
    results[0] = row(taxonomy, ATTACK, "unsafe", node="6.1", score=0.95)
    results.append(
        row(taxonomy, "e", "review", error={"type": "E", "message": ATTACK}, p_unsafe=None)
    )
    write_report(
        tmp_path / "report.html",
        report_data(
            taxonomy,
            node_tangents,
            results,
            texts={ATTACK: ATTACK},
            thumbnails={ATTACK: jpeg()},
            title="shop",
        ),
    )
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--enable-logging=stderr --virtual-time-budget=3000 --dump-dom"
    )
    run = subprocess.run(
        ["chromium", *options.split(), f"--user-data-dir={tmp_path / 'profile'}",
         (tmp_path / "report.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    page = Page(run.stdout)
    assert "CONSOLE" not in run.stderr
    assert page.named("html")[0].get("data-ready") == "true"
    assert page.texts["title"] == "shop · hysafe report"
    assert len([a for a in page.named("li") if a.get("class") == "card"]) == 40
    pictures = page.named("img")
    assert len(pictures) == 1
    assert str(pictures[0]["src"]).startswith("data:image/jpeg;base64,")
    thumb = next(a for a in page.named("button") if a.get("class") == "thumb")
    assert thumb["aria-pressed"] == "false"
    assert ATTACK in page.texts["bdi"]  # its source, on its card
