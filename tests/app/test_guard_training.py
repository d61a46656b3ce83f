"""The guard's training command: two steps of every stage, its rewards, its export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import hysafe.assets
from hysafe.app.guard_data import GuardData, evidence_of
from hysafe.app.guard_namer import GuardNamer, load_guard, name_novel, write_names
from hysafe.app.guard_task import guard_main
from hysafe.app.pipeline import load
from hysafe.app.scan import scan
from hysafe.errors import ConfigError
from hysafe.guard.corpus import PhraseIndex, Writer
from hysafe.guard.model import GuardModel
from hysafe.guard.naming import THINGS, Naming, bundled_phrases
from hysafe.guard.protocol import Answer, parse_answer, write_answer
from hysafe.guard.rewards import Thresholds, cosine_similarity, guard_rewards
from hysafe.guard.split import HIDDEN, hidden_nodes
from hysafe.index import Collection
from hysafe.taxonomy import Policy

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "guard"
SMALL = {
    "encoder": "mini", "judged": 4, "described": 4, "pictures": 0, "limit": 24, "text_sets": [],
    "cache": None,
}  # fmt: skip


def settings(name: str, folder: Path, changes: dict[str, Any], path: Path) -> str:
    """A stage's config with small data and two steps, in a file."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config.pop("before", None)
    config["model"]["init_args"] |= changes
    config["data"] = SMALL
    config["trainer"] = {
        "max_steps": 2, "accelerator": "cpu", "logger": False, "default_root_dir": str(folder),
        "limit_val_batches": 1, "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guard after two steps of the warm-up."""
    folder = tmp_path_factory.mktemp("guard")
    config = settings("tiny", folder, {}, folder / "tiny.yaml")
    guard_main(["fit", "--config", config])
    return folder / "model"


@pytest.fixture(scope="module")
def data() -> GuardData:
    made = GuardData(**SMALL)
    made.setup()
    return made


def test_the_warm_up_writes_a_guard(warm: Path) -> None:
    names = {p.name for p in warm.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "phrases.safetensors"} <= names
    guard = GuardModel.load(warm)
    assert guard.config.encoder_hash == load("mini").encoder.hash()
    assert guard.config.text_hash == load("mini").encoder.text_hash()
    assert len(PhraseIndex.load(warm).phrases) > 50


@pytest.mark.parametrize("name", ["grpo", "grpo_proguard", "rloo", "ppo", "dpo", "response_ppo"])
def test_two_steps_of_each_algorithm(name: str, warm: Path, tmp_path: Path) -> None:
    # without the warm-up's loss, so that it is the rewards that move the weights
    changes = {"init_from": str(warm), "group": 4, "minibatch": 2, "samples_every": 1, "warm": 0.0}
    guard_main(["fit", "--config", settings(name, tmp_path, changes, tmp_path / "c.yaml")])
    before, after = GuardModel.load(warm), GuardModel.load(tmp_path / "model")
    moved = [
        float((a - b).abs().max())
        for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert max(moved) > 0
    assert all(torch.isfinite(p).all() for p in after.parameters())


def test_hidden_categories_are_in_no_item_list_or_policy(data: GuardData) -> None:
    world = data.world
    tree = world.model.taxonomy
    gone = hidden_nodes(tree)
    assert len(HIDDEN) == 9
    assert len({tree[c].parent for c in HIDDEN}) == 9  # one or none per domain
    for item in [*world.train, *world.validation]:
        assert item.node not in gone
        assert item.benign_of not in gone
        assert item.concept not in gone
    assert not gone & {e.node for e in world.writer.policy.entries}
    words = {p.casefold() for n in gone for p in tree[n].phrases}
    assert not words & {p.casefold() for p in [*world.words, *world.index.phrases]}


def test_evidence_is_the_same_whatever_a_policy_allows(data: GuardData) -> None:
    world, model = data.world, data.world.model
    item = next(i for i in world.train if i.node)
    rules = {str(item.node): {"status": "non_violating"}}
    view = model.view(Policy.from_dict({"nodes": rules}))
    one, other = (
        evidence_of(model, {"text": item.evidence.vectors}, [""], world.index, v)[0]
        for v in (None, view)
    )
    assert one.scores[model.place(view)[0].index[str(item.node)]] > 0
    np.testing.assert_array_equal(one.scores, other.scores)
    np.testing.assert_array_equal(one.p_unsafe, other.p_unsafe)


def test_right_answers_are_answers(data: GuardData) -> None:
    world = data.world
    kinds = set()
    for seed, item in enumerate(world.train * 3):
        drawn = world.writer.draw(item, seed)
        answer = parse_answer(world.writer.answer(item, drawn, seed), drawn.policy)
        assert isinstance(answer, Answer)
        assert answer.rating == drawn.rating
        kinds.add((answer.rating, answer.category is not None, answer.novel is not None))
        if item.node is None:
            assert answer.rating == "safe"
    assert kinds == {
        ("safe", False, False), ("safe", True, False), ("unsafe", True, False),
        ("unsafe", False, True),
    }  # fmt: skip


def test_an_allowed_category_is_paid_without_its_twin(data: GuardData) -> None:
    world = data.world
    item = next(i for i in world.train if i.node is not None)
    drawn = [world.writer.draw(item, seed) for seed in range(200)]
    assert all(d.pair is None for d in drawn)
    allowed = next(d for d in drawn if d.category is not None and d.rating == "safe")
    rewards = guard_rewards(cosine_similarity(lambda texts: torch.eye(len(texts))),
                            Thresholds(0.2, 0.8), world.model.taxonomy)  # fmt: skip
    answers = [
        write_answer(a, allowed.policy)
        for a in (allowed.answer(""), Answer("unsafe", novel="odd things"))
    ]
    columns = {k: [v, v] for k, v in allowed.columns().items()}
    right, wrong = rewards["right_rating"](["", ""], answers, **columns)
    assert right is not None
    assert wrong is not None
    assert right > wrong


def test_names_come_from_the_list_where_they_fit(data: GuardData) -> None:
    world = data.world
    item = next(i for i in world.train if i.node is not None)
    first = item.evidence.phrases[0]
    writer = Writer(world.writer.policy, world.model.taxonomy, lambda phrases, bank: 0)
    said = set()
    for seed in range(200):
        drawn = writer.draw(item, seed)
        if drawn.bank:
            said.add(json.loads(writer.answer(item, drawn, seed))["novel"])
    assert first in said
    assert len(said) > 1


def test_the_index_is_the_same_after_loading(data: GuardData, tmp_path: Path) -> None:
    index = data.world.index
    index.save(tmp_path)
    vectors = index.vectors[:5]
    assert PhraseIndex.load(tmp_path).nearest(vectors, "text", 3) == index.nearest(
        vectors, "text", 3
    )
    assert index.nearest(vectors, "radio", 3) == [()] * 5


def test_scan_names_novel_items_and_changes_no_rating(
    warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("mini")
    monkeypatch.setattr(
        "hysafe.app.guard_namer.novel_places", lambda collection, alpha: np.arange(len(collection))
    )
    texts = tmp_path / "texts.txt"
    texts.write_text("how do I sell forged museum tickets\na dog on a lawn\nzxqv blorp 77\n")
    scan([str(texts)], tmp_path / "plain", model, report=False)
    scan([str(texts)], tmp_path / "named", model, guard=str(warm))
    plain, named = (
        [json.loads(line) for line in (tmp_path / d / "results.jsonl").open()]
        for d in ("plain", "named")
    )
    names = [line["novelty"].get("name") for line in named]
    for a, b in zip(plain, named, strict=True):
        assert {"policy", "distribution", "name", "rationale"} <= set(b["novelty"])
        b["novelty"].pop("name", None)
        b["novelty"].pop("rationale", None)
        assert a == b
    again = scan([str(texts)], tmp_path / "named", model, guard=str(warm), report=False)
    assert again.known == 3
    assert again.asked == 3
    assert again.named == sum(map(bool, names))
    # a scan without a guard leaves none of its names
    scan([str(texts)], tmp_path / "named", model)
    assert [json.loads(line) for line in (tmp_path / "named" / "results.jsonl").open()] == plain


def test_names_in_results(warm: Path, tmp_path: Path) -> None:
    model = load("mini")
    texts = tmp_path / "texts.txt"
    texts.write_text("zxqv blorp 77 nnn\nhow do I sell forged museum tickets\n")
    scan([str(texts)], tmp_path / "out", model, report=False)
    path = tmp_path / "out" / "results.jsonl"
    lines = [json.loads(line) for line in path.open()]
    assert write_names(path, {lines[0]["id"]: Naming("odd words", "no node holds it")}) == 1
    assert json.loads(path.read_text().splitlines()[0])["novelty"]["name"] == "odd words"
    assert write_names(path, {}) == 0  # what stood there is taken away
    assert [json.loads(line) for line in path.open()] == lines
    namer = load_guard(str(warm), model)
    names = name_novel(Collection.open(tmp_path / "out"), model, model.view(), namer, alpha=1.0)
    assert set(names) == {line["id"] for line in lines}


def test_the_riskiest_window_of_a_long_text_is_named(
    warm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load("mini")
    calm = "We made soup, walked the dog and looked at the snow on the lawn. " * 20
    text = calm + "Selling forged concert tickets and fake passports, message me for the price."
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"id": "a", "text": text}) + "\n")
    scan([str(file)], tmp_path / "out", model, report=False)
    seen = []
    namer = load_guard(str(warm), model)
    monkeypatch.setattr(namer, "names", lambda items, view: seen.extend(items) or [None])
    collection = Collection.open(tmp_path / "out")
    name_novel(collection, model, model.view(), namer, alpha=1.0)
    judged = model.score_encoded(list(collection.take([0])), model.view())["text"]
    assert seen[0].p_unsafe[0] == pytest.approx(judged.p_unsafe[0], abs=1e-5)
    assert seen[0].p_unsafe[0] > 0.5


def test_a_policy_with_any_ids_can_be_asked(warm: Path) -> None:
    model = load("mini")
    policy = Policy.from_dict(
        {"name": "p", "nodes": {"my node": {"parent": "D6", "name": "Laser pointers",
                                            "definition": "Sale of strong laser pointers."}}}
    )  # fmt: skip
    view = model.view(policy)
    vectors = model.encode_text(["a dog"]).tangent().numpy()
    assert len(load_guard(str(warm), model).name(vectors, ["text"], ["a dog"], view)) == 1


def test_a_namer_gives_every_item_a_name_or_none(warm: Path) -> None:
    model = load("mini")
    namer = load_guard(str(warm), model)
    vectors = model.encode_text(["selling fake tickets", "a dog"]).tangent().numpy()
    found = namer.name(vectors, ["text", "text"], ["selling fake tickets", "a dog"], model.view())
    assert len(found) == 2
    for naming in found:
        assert naming is None or 0 < len(naming.name.split()) <= 6


def test_a_guard_of_another_encoder_is_refused(warm: Path) -> None:
    model = load("mini")
    guard = GuardModel.load(warm)
    guard.config.encoder_hash = "another"
    assert guard.reads(model.encoder), "another image side, the same texts and nodes"
    guard.config.text_hash = "another"
    with pytest.raises(ConfigError, match="another encoder"):
        GuardNamer(guard, PhraseIndex.load(warm), model)
    with pytest.raises(ConfigError, match="no guard 'nothing'"):
        load_guard("nothing", model)


def test_a_guard_goes_on_with_an_encoder_that_went_on(warm: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(warm, old)
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(config | {"encoder_hash": "x", "text_hash": "x"}))
    changes: dict[str, Any] = {"init_from": str(old)}
    refused = settings("tiny", tmp_path / "a", changes, tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="another encoder.*new_points=true"):
        guard_main(["fit", "--config", refused])
    taken = settings("tiny", tmp_path / "b", changes | {"new_points": True}, tmp_path / "b.yaml")
    guard_main(["fit", "--config", taken])
    assert GuardModel.load(tmp_path / "b/model").reads(load("mini").encoder)


def test_the_bundled_guard(tmp_path: Path) -> None:
    model = load("mini")
    folder = Path(hysafe.assets.__file__).parent / "mini_guard"
    assert sum(p.stat().st_size for p in folder.iterdir()) < 40e6
    namer = load_guard("mini-guard", model)
    assert sum(p.numel() for p in namer.guard.parameters()) < 15e6
    assert sum(p.numel() for p in namer.guard.parameters()) > 1e6
    texts = ["two forged concert tickets, half price, no questions", "a dog on a lawn"]
    vectors = model.encode_text(texts).tangent().numpy()
    named = namer.name(vectors, ["text", "text"], texts, model.view())
    assert all(n is not None and 1 < len(n.name.split()) <= 6 for n in named)
    assert named == namer.name(vectors, ["text", "text"], texts, model.view())


def test_the_bundled_models_share_texts_nodes_and_guard() -> None:
    model, photo = load("mini"), load("mini-photo")
    assert photo.encoder.text_hash() == model.encoder.text_hash()
    assert photo.encoder.hash() != model.encoder.hash() == load("mini", towers=False).encoder.hash()
    assert load("mini-photo", towers=False).encoder.hash() == photo.encoder.hash()
    assert (model.encoder.image_size, photo.encoder.image_size) == (64, 128)
    texts = ["two forged concert tickets, half price", "a dog on a lawn"]
    assert photo.encode_text(texts).space.equal(model.encode_text(texts).space)
    told = [[(r.rating, r.p_unsafe) for r in m.moderate(texts=texts)] for m in (model, photo)]
    assert told[0] == told[1]
    (seen,) = photo.moderate(images=[Image.new("RGB", (300, 200), "navy")])
    assert seen.rating in ("safe", "review", "unsafe")
    vectors = photo.encode_text(texts[1:]).tangent().numpy()
    (naming,) = load_guard("mini-guard", photo).name(vectors, ["image"], [""], photo.view())
    assert naming is not None
    assets = Path(hysafe.assets.__file__).parent
    assert sum(f.stat().st_size for f in assets.rglob("*.safetensors")) < 60e6


def test_pictures_are_named_by_what_pictures_show() -> None:
    model = load("mini")
    namer = load_guard("mini-guard", model)
    vectors = model.encode_text(["a dog on a lawn"]).tangent().numpy()
    (naming,) = namer.name(vectors, ["image"], [""], model.view())
    assert naming is not None
    assert naming.name in bundled_phrases(THINGS)
    mixed = namer.name(np.repeat(vectors, 2, 0), ["text", "image"], ["", ""], model.view())
    assert mixed[1] == naming


def test_pictures_of_another_image_side_are_seen_from_its_own_centre(warm: Path) -> None:
    model = load("mini")
    guard, index = GuardModel.load(warm), PhraseIndex.load(warm)
    index = index.rewhitened("image", index.whitening["text"])
    assert GuardNamer(guard, index, model).index is index
    guard.config.encoder_hash = "another"
    seen = GuardNamer(guard, index, model).index
    centre = model.reference["image"].mean(0).numpy()
    assert np.allclose(seen.whitening["image"].mean, centre)
    assert seen.whitening["text"] is index.whitening["text"]
    model.reference.pop("image")
    assert "image" not in GuardNamer(guard, index, model).index.whitening


def test_a_guard_keeps_its_verdict_on_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is novel is the guard's to say; what it is called comes from the list."""
    model = load("mini")
    namer = load_guard("mini-guard", model)
    vectors = model.encode_text(["a dog on a lawn", "a cat"]).tangent().numpy()
    items = evidence_of(model, {"image": vectors}, ["", ""], namer.index, model.view())
    said = [Answer("unsafe", None, "anything", "why"), Answer("safe", None, None, "no risk")]
    monkeypatch.setattr("hysafe.app.guard_namer.answers_of", lambda *a: said)
    novel, harmless = namer.names(items, model.view())
    assert novel is not None
    assert novel.name in bundled_phrases(THINGS)
    assert harmless is not None
    assert not harmless.name


def test_earlier_stages_share_the_data_of_the_last(tmp_path: Path) -> None:
    """A guard of all categories is not warmed up without the hidden ones, and the reverse."""
    first = settings("tiny", tmp_path / "words", {}, tmp_path / "words.yaml")
    changes = {"init_from": str(tmp_path / "words/model")}
    last = Path(settings("tiny", tmp_path / "sft", changes, tmp_path / "sft.yaml"))
    config = yaml.safe_load(last.read_text())
    config["before"] = {first: str(tmp_path / "words/model")}
    config["data"] = {**SMALL, "hidden": False}
    last.write_text(yaml.safe_dump(config))
    guard_main(["fit", "--config", str(last)])
    for stage in ("words", "sft"):
        read = yaml.safe_load((tmp_path / stage / "config.yaml").read_text())
        assert read["data"]["hidden"] is False, stage
        assert (tmp_path / stage / "model/model.safetensors").is_file()
