"""Search over a scanned collection: by text, picture, item and node."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hysafe.app.cli import main
from hysafe.app.gallery import Card, card_of, write_gallery
from hysafe.app.pipeline import LIST_FROM, SafetyModel, ScanOptions
from hysafe.app.scan import scan
from hysafe.app.search import rank_by_node, search, search_line, write_found
from hysafe.app.stored import model_of, read_media, stored_policy, view_of
from hysafe.errors import CollectionError, ConfigError, InputError
from hysafe.index import Collection
from hysafe.index.collection import matrix
from hysafe.taxonomy import Policy, load_taxonomy
from hysafe.types import Hashes, NodeScore, NoveltyScores, Result

TEXTS = ["fireworks for sale", "a quiet street", "selling a pistol", "<script>alert(1)</script>"]


def png(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def scanned(tiny_model: SafetyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four texts, three pictures (one of them broken) and a policy."""
    folder = tmp_path_factory.mktemp("search")
    source = folder / "in"
    source.mkdir()
    (source / "red.png").write_bytes(png((220, 20, 20)))
    (source / "blue.png").write_bytes(png((20, 20, 220)))
    (source / "broken.png").write_bytes(png((1, 2, 3))[:50])
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS)
    (source / "texts.jsonl").write_text(lines)
    policy = Policy.from_dict({"name": "mild", "nodes": {"6.1": {"threshold": 0.9}}})
    scan([str(source)], folder / "out", tiny_model, policy=policy, options=ScanOptions(4, 0),
         report=False)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def collection(scanned: Path) -> Collection:
    return Collection.open(scanned / "out")


def test_a_text_finds_itself(collection: Collection, tiny_model: SafetyModel) -> None:
    found = search(collection, tiny_model, text="selling a pistol", k=3)
    assert len(found) == 3
    assert found[0].item.text == "selling a pistol"
    assert found[0].distance == pytest.approx(0, abs=1e-4)
    assert [f.distance for f in found] == sorted(f.distance for f in found)  # type: ignore[type-var]
    assert search_line(found[0], 1)["channel"] == "text"


def test_a_picture_finds_itself_and_like_leaves_it_out(
    collection: Collection, tiny_model: SafetyModel, scanned: Path
) -> None:
    found = search(collection, tiny_model, image=scanned / "in/red.png", k=2)
    assert found[0].item.id == "in/red.png"
    assert found[0].distance == pytest.approx(0, abs=1e-4)
    like = search(collection, tiny_model, like="in/red.png", k=9)
    assert "in/red.png" not in [f.item.id for f in like]
    assert len(like) == 5  # the broken picture has no point
    assert like[0].distance == pytest.approx(found[1].distance, abs=1e-4)


def test_results_are_judged_as_in_the_scan_or_under_the_policy_given(
    collection: Collection, tiny_model: SafetyModel, scanned: Path
) -> None:
    lines = map(json.loads, (scanned / "out/results.jsonl").read_text().splitlines())
    stored = {line["id"]: line for line in lines}
    for f in search(collection, tiny_model, text="anything"):
        assert f.result.to_dict() == stored[f.item.id]
    off = Policy.from_dict({"nodes": {f"D{i}": {"status": "non_violating"} for i in range(1, 13)}})
    found = search(collection, tiny_model, text="anything", policy=off)
    assert {f.result.p_unsafe for f in found} == {0}


def test_ranking_by_node_follows_the_scores_of_the_scan(
    collection: Collection, tiny_model: SafetyModel, scanned: Path
) -> None:
    column = collection.meta.nodes.index("6.1")
    rows = collection.to_arrow(["id", "scores"]).to_pylist()
    wanted = sorted(
        ((r["scores"][column], r["id"]) for r in rows if r["scores"] is not None), reverse=True
    )
    found = search(collection, tiny_model, node="6.1", k=4)
    assert [f.item.id for f in found] == [name for _, name in wanted[:4]]
    assert [f.score for f in found] == pytest.approx([s for s, _ in wanted[:4]], abs=1e-6)
    assert found[0].distance is None
    ranked = rank_by_node(collection, tiny_model, view_of(collection, tiny_model, None), "6.1",
                          where="modality = 'image'")  # fmt: skip
    names = collection.to_arrow(["id"])["id"].to_pylist()
    assert {names[row] for row, _, _ in ranked} == {"in/red.png", "in/blue.png"}


def test_a_node_finds_negligible_scores_only_where_k_is_given(
    collection: Collection, tiny_model: SafetyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    def scores(**options: int) -> list[float]:
        found = search(collection, tiny_model, node=node, **options)  # type: ignore[arg-type]
        return [f.score for f in found if f.score is not None]

    rows = np.nan_to_num(matrix(collection.to_arrow(["scores"])["scores"],
                                len(collection.meta.nodes)))  # fmt: skip
    least = np.argmin(rows.max(axis=0))  # of all nodes the one that nothing is about
    node = collection.meta.nodes[least]
    assert len(scores(k=50)) > len(scores())
    assert all(s >= LIST_FROM for s in scores())
    assert main(["search", str(collection.folder), "--node", node, "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(scores())
    assert main(["search", str(collection.folder), "--node", node, "-k", "50", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(scores(k=50))


@pytest.mark.parametrize(
    ("node", "problem"),
    [("99.9", "no such node"), ("S.b11", "harmless node has no score"), ("6.1", "off under")],
)
def test_a_node_without_a_score_is_refused(
    collection: Collection, tiny_model: SafetyModel, node: str, problem: str
) -> None:
    policy = Policy.from_dict({"nodes": {"D6": {"status": "non_violating"}}})
    with pytest.raises(ConfigError, match=problem):
        search(collection, tiny_model, node=node, policy=policy)


def test_wrong_queries(collection: Collection, tiny_model: SafetyModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give one of"):
        search(collection, tiny_model)
    with pytest.raises(ConfigError, match="give one of"):
        search(collection, tiny_model, text="x", node="6.1")
    with pytest.raises(ConfigError, match="at least 1"):
        search(collection, tiny_model, text="x", k=0)
    with pytest.raises(InputError, match="empty"):
        search(collection, tiny_model, text="  ")
    with pytest.raises(InputError, match="No such file"):
        search(collection, tiny_model, image=tmp_path / "none.png")


def test_another_model_is_refused(
    collection: Collection, tiny_folder: Path, tmp_path: Path, tiny_model: SafetyModel
) -> None:
    import shutil

    from hysafe.encoder import HyperbolicEncoder

    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    encoder = HyperbolicEncoder.load_directory(other)
    encoder.cone_scale.set(20.0)
    encoder.save_directory(other)
    with pytest.raises(CollectionError, match="Points of two models cannot be compared"):
        model_of(collection, name=str(other))
    assert model_of(collection).hash == tiny_model.hash


def test_the_heads_alone_judge_as_the_whole_model(
    collection: Collection, tiny_model: SafetyModel
) -> None:
    light = model_of(collection)
    light._cache = tiny_model._cache
    light._features = dict(tiny_model._features)  # as read from the cache
    view = view_of(collection, light, None)
    whole, heads = tiny_model.place(view)[1], light.place(view)[1]
    assert whole.space.equal(heads.space)
    assert whole.c == heads.c
    assert light.encoder.hash() == tiny_model.encoder.hash()
    found, wanted = (search(collection, m, like="in/red.png") for m in (light, tiny_model))
    assert [(f.result, f.distance) for f in found] == [(f.result, f.distance) for f in wanted]
    assert not light.encoder.towers_loaded  # type: ignore[union-attr]
    search(collection, light, text="now it has to encode", k=1)
    assert light.encoder.towers_loaded  # type: ignore[union-attr]


def test_the_policy_of_a_collection_comes_back(
    collection: Collection, tiny_model: SafetyModel
) -> None:
    policy = stored_policy(collection.meta)
    assert policy.name == "mild"
    assert policy.hash == collection.meta.policy
    small = SafetyModel(tiny_model.encoder, _without_node_6_1(), tiny_model.calibration)
    with pytest.raises(CollectionError, match="another taxonomy"):
        view_of(collection, small, None)


def _without_node_6_1():  # type: ignore[no-untyped-def]
    from dataclasses import replace

    taxonomy = load_taxonomy()
    return taxonomy.with_nodes(replace(taxonomy["6.1"], definition="Something else."))


def test_pictures_are_read_again_only_where_unchanged(
    tiny_model: SafetyModel, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "same.png").write_bytes(png((1, 1, 1)))
    (source / "changed.png").write_bytes(png((2, 2, 2)))
    (source / "gone.png").write_bytes(png((3, 3, 3)))
    (source / "texts.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    scan([str(source)], tmp_path / "out", tiny_model, options=ScanOptions(4, 0), report=False)
    (source / "changed.png").write_bytes(png((9, 9, 9)))
    (source / "gone.png").unlink()
    items = [i for b in Collection.open(tmp_path / "out").items() for i in b]
    media = read_media(items)
    assert set(media) == {"in/same.png", "in/texts.jsonl#1", "in/texts.jsonl#2"}
    assert media["in/same.png"].image == (source / "same.png").read_bytes()
    assert media["in/texts.jsonl#2"].text == "second"


# ---------------------------------------------------------------- the page


def result_of(rating: str, nodes: list[str], top: str | None = None) -> Result:
    paths = tuple(NodeScore(n, ("a", "<b>"), 0.9, True) for n in nodes)
    return Result(
        "i", "na<i>me.png", "image", rating, 0.9, paths, NoveltyScores(None, None), 1.0,
        {"image": {"p_unsafe": 0.9, "top": top, "rating": rating}, "decided_by": "image"}, None,
        Hashes("", "m", "t", "p"),
    )  # fmt: skip


def test_pictures_of_text_only_nodes_are_withheld() -> None:
    taxonomy = load_taxonomy()
    hidden = next(n.id for n in taxonomy if n.text_only)
    image = png((5, 5, 5))
    for result in (
        result_of("unsafe", [hidden]), result_of("safe", [hidden]),
        result_of("review", [], top=hidden),
    ):  # fmt: skip
        card = card_of(result, taxonomy, lead="", image=image)
        assert card.withheld
        assert card.picture is None
    shown = card_of(result_of("unsafe", ["6.1"]), taxonomy, lead="", image=image)
    assert shown.picture is not None
    assert not card_of(result_of("unsafe", [hidden]), taxonomy, lead="").withheld  # no picture


def test_the_page_escapes_what_it_shows_and_holds_no_script(tmp_path: Path) -> None:
    card = Card("unsafe", "<u>", "<script>1</script>", ["<b>"], "<img src=x>", b"jpeg")
    write_gallery(tmp_path / "deep/page.html", "<title>", {"k": "<v>"}, [("<h>", [card])])
    page = (tmp_path / "deep/page.html").read_text()
    assert "<script" not in page
    assert "<img src=x>" not in page
    assert page.count("<img ") == 1
    assert "&lt;script&gt;1&lt;/script&gt;" in page
    assert "default-src &#x27;none&#x27;" in page
    assert "http://" not in page.replace("http-equiv", "")
    assert "blur(" in page


def test_the_page_of_a_search(
    collection: Collection, tiny_model: SafetyModel, tmp_path: Path
) -> None:
    found = search(collection, tiny_model, text="selling a pistol")
    view = view_of(collection, tiny_model, None)
    write_found(tmp_path / "found.html", "selling a pistol", found, view, collection)
    page = (tmp_path / "found.html").read_text()
    assert page.count("<li>") == len(found) == 6
    assert "<script>alert" not in page
    assert page.count('type="checkbox"') + page.count("Picture withheld") == 2


# ---------------------------------------------------------------- the command


def test_search_from_the_command_line(
    scanned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = str(scanned / "out")
    assert main(["search", out, "a quiet street", "-k", "2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["rank"] for line in lines] == [1, 2]
    assert lines[0]["source"].endswith("texts.jsonl:2")
    assert set(lines[0]) >= {"id", "source", "distance", "channel", "rating", "node", "path"}
    page = tmp_path / "page.html"
    assert main(["search", out, "--like", "in/red.png", "--html", str(page)]) == 0
    assert "of 7 items" in capsys.readouterr().out
    assert page.is_file()
    for arguments in (
        ["search", out], ["search", out, "x", "--node", "6.1"], ["search", out, "--like", "none"],
        ["search", out, "x", "--where", "no such column"],
    ):  # fmt: skip
        assert main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for command in (["search", "x"], ["index"], ["rescore"], ["redirect", "x"], ["export"],
                    ["import", "d"], ["calibrate"]):  # fmt: skip
        rest = ["--format", "csv", "x"] if command == ["export"] else command[1:]
        for folder in (tmp_path, tmp_path / "nowhere"):
            assert main([command[0], str(folder), *rest]) == 2
            error = capsys.readouterr().err
            assert "no collection there" in error
            assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "query"), [("search", ["a pistol"]), ("like", ["--like", "in/red.png"])]
)
def test_the_share_of_the_radius_reaches_the_index(
    scanned: Path, monkeypatch: pytest.MonkeyPatch, method: str, query: list[str]
) -> None:
    shares = []
    inner = getattr(Collection, method)

    def spy(*args: Any, radius_share: float, **kwargs: Any) -> Any:
        shares.append(radius_share)
        return inner(*args, radius_share=radius_share, **kwargs)

    monkeypatch.setattr(Collection, method, spy)
    for arguments in ([], ["--radius-share", "0"], ["--radius-share", "0.25"]):
        assert main(["search", str(scanned / "out"), *query, *arguments]) == 0
    assert shares == [0.75, 0.0, 0.25]


def test_search_does_not_depend_on_the_dtype_of_the_query(
    collection: Collection, tiny_model: SafetyModel
) -> None:
    query = tiny_model.encode_text(["a quiet street"])
    twice = type(query)(query.space.double(), query.c, query.geometry)
    assert torch.equal(query.space, twice.space.float())
    single, double = (collection.search(q, model=tiny_model.hash)[0] for q in (query, twice))
    assert [h.row for h in single] == [h.row for h in double]


def test_a_jpeg_finds_itself(tiny_model: SafetyModel, tmp_path: Path) -> None:
    """A query is decoded as a scan decodes it: large JPEGs at a reduced scale."""
    (tmp_path / "in").mkdir()
    noise = torch.randint(0, 256, (900, 1200, 3), generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(noise.to(torch.uint8).numpy()).resize((1200, 900))
    picture.save(tmp_path / "in" / "large.jpg", quality=90)
    scan([str(tmp_path / "in")], tmp_path / "out", tiny_model, options=ScanOptions(16, 0),
         report=False)  # fmt: skip
    collection = Collection.open(tmp_path / "out")
    (found,) = search(collection, tiny_model, image=tmp_path / "in" / "large.jpg", k=1)
    assert found.distance == pytest.approx(0, abs=2e-3)
