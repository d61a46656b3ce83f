"""Rewards: what they pay, and the leaks of the published form that ours have not.

The embedding model of these tests is a bag of words: the similarity of two texts is the cosine of
their word counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hysafe.errors import ConfigError, InputError
from hysafe.geometry import Points, cones
from hysafe.guard.protocol import (
    Answer,
    Episode,
    PromptPolicy,
    episode,
    split_bank,
    twins,
    write_answer,
)
from hysafe.guard.rewards import (
    BAD_FORM,
    CONE_SLACK,
    MISSED,
    Reward,
    Thresholds,
    WuPalmer,
    binary_reward,
    calibrate_similarity,
    category_reward,
    completion_text,
    cone_margins,
    cone_reward,
    cosine_similarity,
    format_reward,
    guard_rewards,
    is_well_formed,
    novel_name_reward,
    over_refusal_reward,
    pay_together,
    proguard_novelty,
    proguard_reward,
    token_f1,
    total_reward,
)
from hysafe.taxonomy import Policy, load_taxonomy

TAXONOMY = load_taxonomy()
FULL = PromptPolicy.from_view(Policy().apply(TAXONOMY))
NOVEL = episode(FULL, TAXONOMY, "6.1", seed=0, hide=True, sibling_rate=0.0)
LISTED = episode(FULL, TAXONOMY, "6.1", seed=0)
BENIGN = episode(FULL, TAXONOMY, None, seed=0, benign_of="6.1")
FORBIDDEN, ALLOWED = twins(FULL, TAXONOMY, "6.1", seed=0, pair="p")
GARBAGE = "I cannot help with that."


def words(texts: Sequence[str]) -> Tensor:
    """Bag of words, hashed by spelling."""
    rows = torch.zeros(len(texts), 4096)
    for row, text in zip(rows, texts, strict=True):
        for word in text.lower().split():
            row[sum(ord(c) * 31**i for i, c in enumerate(word)) % 4096] += 1
    return rows


SIMILARITY = cosine_similarity(words)
THRESHOLDS = Thresholds(0.3, 0.9)


def pay(reward: Reward, *rows: tuple[Episode, Answer | str]) -> list[float | None]:
    """Rewards of answers to episodes."""
    completions = [a if isinstance(a, str) else write_answer(a, e.policy) for e, a in rows]
    columns: dict[str, list[Any]] = {k: [] for k in rows[0][0].columns()}
    for made, _ in rows:
        for key, value in made.columns().items():
            columns[key].append(value)
    return reward(["?"] * len(rows), completions, **columns, trainer_state=None)


def one(reward: Reward, made: Episode, answer: Answer | str) -> float | None:
    return pay(reward, (made, answer))[0]


def named(name: str) -> Answer:
    return Answer("unsafe", novel=name)


TERMS = guard_rewards(SIMILARITY, THRESHOLDS, TAXONOMY)
OURS = total_reward(TERMS)
PUBLISHED = proguard_reward(SIMILARITY)
MISS = Answer("unsafe", "6.3")  # a listed category for an item none of them holds
GOOD = NOVEL.bank[1]


# ---------------------------------------------------------------- plain rewards


def test_format_and_rating_are_paid_one_or_nothing() -> None:
    rows = [(LISTED, Answer("unsafe", "6.1")), (LISTED, Answer("safe")), (LISTED, GARBAGE)]
    assert pay(format_reward, *rows) == [1.0, 1.0, 0.0]
    assert pay(binary_reward, *rows, (LISTED, Answer("review"))) == [1.0, 0.0, 0.0, 0.0]
    unknown = binary_reward(["?"], [GARBAGE], policy=[LISTED.policy.to_json()], rating=[None])
    assert unknown == [None]


def test_categories_are_paid_by_the_depth_of_the_common_ancestor() -> None:
    reward = category_reward(TAXONOMY, needless=0.25)
    mixed = PromptPolicy.from_view(Policy().apply(TAXONOMY), ["D6", "6.1.1", "6.1.2", "6.2", "1.1"])
    concept = episode(mixed, TAXONOMY, "6.1.1", seed=0)
    said = {
        "6.1.1": 1.0, "6.1.2": 2 / 3, "6.2": 1 / 3, "D6": 1 / 3, "1.1": 0.0,
    }  # fmt: skip
    for node, credit in said.items():
        assert one(reward, concept, Answer("unsafe", node)) == pytest.approx(credit), node
    assert one(reward, LISTED, Answer("unsafe", "6.2")) == 0.5
    assert one(reward, LISTED, named("gun trade")) == -0.25
    assert one(reward, LISTED, Answer("safe")) == 0.0
    assert one(reward, LISTED, GARBAGE) == 0.0
    assert (
        pay(reward, (NOVEL, MISS), (BENIGN, MISS), (ALLOWED, Answer("safe", "6.1"))) == [None] * 3
    )


def test_chat_completions_are_read_as_text() -> None:
    text = write_answer(Answer("safe"), BENIGN.policy)
    chat = [{"role": "assistant", "content": text}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
    for completion in (text, chat, parts):
        assert completion_text(completion) == text
    policy = [BENIGN.policy.to_json()] * 4
    assert format_reward(["?"] * 4, [text, chat, parts, []], policy=policy) == [1.0, 1.0, 1.0, 0.0]


def test_a_total_sums_what_can_judge() -> None:
    def some(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return [1.0, None, None]

    def others(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return [0.5, 0.5, None]

    total = total_reward({"some": some, "others": others}, {"others": 2.0})
    assert total(["?"] * 3, ["?"] * 3) == [2.0, 1.0, None]
    with pytest.raises(ConfigError, match=r"weights for \['other'\]"):
        total_reward({"some": some}, {"other": 1.0})


@pytest.mark.parametrize("name", TERMS)
def test_every_term_keeps_the_signature_and_has_a_name(name: str) -> None:
    rows = [(e, a) for e in (NOVEL, LISTED, BENIGN) for a in (GARBAGE, Answer("safe"))]
    found = pay(TERMS[name], *rows)
    assert len(found) == len(rows)
    assert all(v is None or isinstance(v, float) for v in found)
    assert TERMS[name].__name__ in (name, "over_refusal_reward")


# ---------------------------------------------------------------- the published form


def test_proguards_formula_by_hand() -> None:
    assert proguard_novelty([0.1, 0.2]) == 0.5
    assert proguard_novelty([0.85, 0.1]) == pytest.approx(0.5 + 0.5 * 0.15 / 0.3)
    assert proguard_novelty([0.72, 0.72]) == pytest.approx(0.5 + 0.5 * 0.12 / 0.4)
    assert proguard_novelty([1.0, 1.0]) == pytest.approx(1.0)


def test_proguards_reward_is_format_times_the_three_terms() -> None:
    assert one(PUBLISHED, LISTED, Answer("unsafe", "6.1")) == 2.0
    assert one(PUBLISHED, LISTED, Answer("unsafe", "6.2")) == 1.0
    assert one(PUBLISHED, LISTED, Answer("safe")) == 0.0
    assert one(PUBLISHED, LISTED, GARBAGE) == 0.0
    assert one(PUBLISHED, BENIGN, Answer("safe")) == 2.0
    best = proguard_novelty(SIMILARITY([GOOD], NOVEL.bank)[0].tolist())
    assert one(PUBLISHED, NOVEL, named(GOOD)) == pytest.approx(1 + best)


def test_proguards_own_answers_rate_the_response_as_well() -> None:
    reward = proguard_reward(SIMILARITY, answers="proguard", taxonomy=TAXONOMY)
    text = "<think>x</think><answer>\nRequest:unsafe\nResponse:safe\nCategory:{}\n</answer>"
    columns = {k: [v] * 3 for k, v in LISTED.columns().items()} | {
        "response_rating": ["safe", "unsafe", None]
    }
    found = reward(["?"] * 3, [text.format("C8S1")] * 3, **columns)
    assert found == [3.0, 2.0, 2.0]
    columns = {k: [v] for k, v in NOVEL.columns().items()} | {"response_rating": ["safe"]}
    assert reward(["?"], [text.format("blue elephants")], **columns) == [2.5]
    assert reward(["?"], [text.format("None")], **columns) == [0.0]
    with pytest.raises(ConfigError, match="taxonomy="):
        proguard_reward(SIMILARITY, answers="proguard")


# ---------------------------------------------------------------- leak by leak


def test_a_missed_novel_item_is_paid_there_and_costs_here() -> None:
    assert one(PUBLISHED, NOVEL, MISS) == pytest.approx(1.5)
    assert one(TERMS["novel_name"], NOVEL, MISS) == -MISSED
    for missed in (MISS, Answer("safe"), Answer("review"), GARBAGE):
        assert one(OURS, NOVEL, missed) < 0
        assert one(OURS, NOVEL, missed) < one(OURS, NOVEL, named("blue elephants dance"))


def test_free_text_earns_a_floor_there_and_nothing_here() -> None:
    free = named("blue elephants dance")
    assert one(PUBLISHED, NOVEL, free) == pytest.approx(1.5)
    assert one(OURS, NOVEL, free) == 0.0
    assert one(OURS, NOVEL, named(GOOD)) == pytest.approx(1.0)


def test_a_needless_name_costs_as_much_as_a_missed_one() -> None:
    right, wrong = one(OURS, LISTED, Answer("unsafe", "6.1")), one(OURS, LISTED, named("gun trade"))
    assert (right, wrong) == (2.0, 1.0 - MISSED)


OWNER = {p: i for i, n in enumerate(TAXONOMY.categories) for p in (n.name, *n.synonyms)}


def knowing(texts: Sequence[str]) -> Tensor:
    """A bag of words with a sense of category for the phrases of the banks."""
    sense = torch.zeros(len(texts), len(TAXONOMY.categories))
    for row, text in zip(sense, texts, strict=True):
        if text in OWNER:
            row[OWNER[text]] = 1.0
    return torch.cat([torch.nn.functional.normalize(words(texts), dim=-1), sense], -1)


@pytest.mark.parametrize(("slope", "offset"), [(0.2, 0.8), (0.5, 0.0)])
def test_fixed_thresholds_fail_other_models_and_calibrated_ones_do_not(
    slope: float, offset: float
) -> None:
    cosine = cosine_similarity(knowing)

    def other_model(names: Sequence[str], phrases: Sequence[str]) -> Tensor:
        return offset + slope * cosine(names, phrases)

    banks = [split_bank(n).train for n in TAXONOMY.categories]
    reward = novel_name_reward(other_model, calibrate_similarity(other_model, banks))
    published = proguard_reward(other_model)
    stranger, synonym = (
        named("blue elephants dance"),
        named(split_bank(TAXONOMY["6.1"]).held_out[0]),
    )
    if offset:  # everything is similar to everything: strangers are paid above the floor
        assert one(published, NOVEL, stranger) > 1.6
    else:  # nothing is similar: a true synonym gets the floor
        assert one(published, NOVEL, synonym) == pytest.approx(1.5)
    assert one(reward, NOVEL, stranger) == 0.0
    assert one(reward, NOVEL, synonym) > 0.5


def test_calibration_is_the_95th_percentile_of_strangers_and_the_median_of_synonyms() -> None:
    banks = [["a b", "a c", "a d e"], ["f g", "f h"]]
    found = calibrate_similarity(SIMILARITY, banks)
    high = sorted([1 / 2, 1 / 2, 1 / 6**0.5, 1 / 2, 1 / 2])[2]
    assert found == Thresholds(0.0, pytest.approx(high))
    near = [["a b", "a b c"], ["f g", "f h"], ["f x b", "f x i"]]
    strangers = [1 / 6**0.5, 1 / 3] + 2 * [0] + 4 * [1 / 6**0.5] + [1 / 6**0.5, 0] + 2 * [0]
    assert calibrate_similarity(SIMILARITY, near).low == pytest.approx(
        float(torch.tensor(strangers).quantile(0.95)), abs=1e-6
    )
    assert [found.score(x) for x in (-1, 0, high / 2, high, 1)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_a_model_that_cannot_tell_synonyms_is_refused() -> None:
    with pytest.raises(ConfigError, match="Take another embedding model"):
        calibrate_similarity(SIMILARITY, [["a b", "c d"], ["a d", "c b"]])
    with pytest.raises(ConfigError, match="two banks or more"):
        calibrate_similarity(SIMILARITY, [["a b", "c d"]])


def test_a_listed_category_in_other_words_is_paid_there_and_earns_nothing_here() -> None:
    bank = ("illegal weapon sales", "selling banned firearms")
    made = Episode(NOVEL.policy, "unsafe", None, ("6.1",), bank, "D6")
    drugs, domain = TAXONOMY["6.3"].name, TAXONOMY["D6"].name
    assert drugs == "Illegal drugs"
    for shown in (drugs, domain, "drugs illegal", f"regulated {drugs.lower()}"):
        assert one(PUBLISHED, made, named(shown)) >= 1.5
        assert one(OURS, made, named(shown)) == 0.0
    # just as similar to the bank, and nearer to it than to anything listed
    own = "illegal weapon trade"
    score = THRESHOLDS.score(float(SIMILARITY([own], bank).max()))
    assert one(OURS, made, named(own)) == pytest.approx(score)
    assert score > THRESHOLDS.score(float(SIMILARITY([drugs], bank).max())) > 0
    # a name that is shown as it is, however near to the bank
    same = Episode(NOVEL.policy, "unsafe", None, ("6.1",), (drugs, "x y"), "D6")
    assert one(OURS, same, named("illegal DRUGS")) == 0.0


@pytest.mark.parametrize(
    "stuffed",
    [
        "weapons",
        "weapons weapons explosives",
        "weapon gun bomb knife firearm rifle",
        "weapons, guns, bombs, knives",
        "weapons/guns/bombs/knives shop",
        "weapons and explosives that are sold to people in the street",
    ],
)
def test_keywords_and_length_are_paid_there_and_cost_here(stuffed: str) -> None:
    assert not is_well_formed(stuffed)
    if len(stuffed.split()) > 6:
        assert one(PUBLISHED, NOVEL, named(stuffed)) >= 1.5
    bank = (stuffed, stuffed)
    made = Episode(NOVEL.policy, "unsafe", None, ("6.1",), bank, "D6")
    assert one(PUBLISHED, made, named(stuffed)) == pytest.approx(2.0)
    assert one(OURS, made, named(stuffed)) == -BAD_FORM


def test_costs_of_zero_are_costs_of_zero() -> None:
    reward = novel_name_reward(SIMILARITY, THRESHOLDS, missed=0.0, bad_form=0.0)
    rows = [(NOVEL, MISS), (NOVEL, GARBAGE), (NOVEL, named("weapons")), (NOVEL, named(GOOD))]
    assert pay(reward, *rows) == [0.0, 0.0, 0.0, pytest.approx(1.0)]


def test_the_form_rule_refuses_hardly_any_phrase_of_the_banks() -> None:
    phrases = [p for n in (*TAXONOMY.domains, *TAXONOMY.categories) for p in n.synonyms]
    refused = [p for p in phrases if not is_well_formed(p)]
    assert len(phrases) == 510
    assert len(refused) == 2, refused
    assert [n.name for n in TAXONOMY.categories if not is_well_formed(n.name)] == [
        "Suicide", "Self-injury",
    ]  # fmt: skip


# ---------------------------------------------------------------- geometry


def apexes() -> Points:
    """Cones of D6 (to the right) and D2 (upwards)."""
    return Points(torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64), 1.0)


PLACES = {"right": [3.0, 0.1], "up": [0.1, 3.0], "edge": [3.0, 0.4]}


def place(names: Sequence[str]) -> Points:
    """Points of names by their last word."""
    return Points(torch.tensor([PLACES[n.split()[-1]] for n in names], dtype=torch.float64), 1.0)


def test_cone_margins_are_those_of_the_geometry() -> None:
    margins = cone_margins(place, apexes(), ["D6", "D2"])
    names = ["a right", "b up", "a right"]
    table = cones.pairwise_margin(apexes().space, place(names).space, 1.0)
    found = margins(names, ["D6", "D6", "D2"])
    torch.testing.assert_close(found, table[[0, 1, 2], [0, 0, 1]])
    assert found[0] > 0 > found[1]
    with pytest.raises(ConfigError, match="no cone for node '6.1'"):
        margins(["a right"], ["6.1"])


def test_a_name_from_another_branch_is_paid_there_and_fades_here() -> None:
    bank = ("weapon sold right", "weapon sold up", "weapon sold edge")
    made = Episode(NOVEL.policy, "unsafe", None, ("6.1",), bank, "D6")
    margins = cone_margins(place, apexes(), ["D6", "D2"])
    ours = total_reward(guard_rewards(SIMILARITY, THRESHOLDS, TAXONOMY, cone=margins))
    alone = cone_reward(margins)
    inside, outside, edge = (named(p) for p in bank)
    assert one(PUBLISHED, made, inside) == one(PUBLISHED, made, outside)
    assert (one(ours, made, inside), one(ours, made, outside)) == (1.0, 0.0)
    assert (one(alone, made, inside), one(alone, made, outside)) == (1.0, 0.0)
    gap = float(margins([bank[2]], ["D6"]))
    assert -CONE_SLACK < gap < 0
    assert one(ours, made, edge) == pytest.approx(1 + gap / CONE_SLACK)
    assert one(alone, made, edge) == pytest.approx(1 + gap / CONE_SLACK)
    assert pay(alone, (made, MISS), (made, GARBAGE), (LISTED, MISS)) == [0.0, 0.0, None]
    orphan = Episode(NOVEL.policy, "unsafe", None, ("6.1",), bank, None)
    assert one(ours, orphan, outside) == 1.0
    assert one(alone, orphan, outside) is None


# ---------------------------------------------------------------- benign siblings and twins


def test_refusing_a_benign_sibling_is_free_there_and_costs_here() -> None:
    refusal = Answer("unsafe", "6.1")
    assert one(PUBLISHED, BENIGN, refusal) == 0.0
    assert one(OURS, BENIGN, refusal) == -1.0
    assert one(OURS, BENIGN, Answer("safe")) == 1.0
    assert pay(over_refusal_reward, (BENIGN, refusal), (BENIGN, Answer("review")), (LISTED, MISS)) == [
        -1.0, 0.0, None,
    ]  # fmt: skip


def blind(made: Episode) -> Answer:
    """An answer that ignores the policy: always unsafe, always weapons, as far as it can be said."""
    return Answer("unsafe", "6.1" if not made.policy.entry("6.1").allowed else "6.3")


def test_a_guard_blind_to_the_policy_is_paid_there_and_not_here() -> None:
    rows = [(e, blind(e)) for e in (FORBIDDEN, FORBIDDEN, ALLOWED, ALLOWED)]
    assert pay(PUBLISHED, *rows) == [2.0, 2.0, 0.0, 0.0]
    assert pay(TERMS["right_rating"], *rows) == [0.0] * 4
    seeing = [(e, e.answer()) for e in (FORBIDDEN, FORBIDDEN, ALLOWED, ALLOWED)]
    assert pay(TERMS["right_rating"], *seeing) == [1.0] * 4
    mixed = [seeing[0], rows[1], rows[2], seeing[3]]
    assert pay(binary_reward, *mixed) == [1.0, 1.0, 0.0, 1.0]
    assert pay(TERMS["right_rating"], *mixed) == [0.0, 1.0, 0.0, 1.0]


def test_a_twin_without_its_twin_cannot_be_judged_and_others_are_left_alone() -> None:
    together = pay_together(binary_reward)
    rows = [(FORBIDDEN, blind(FORBIDDEN)), (FORBIDDEN, blind(FORBIDDEN)), (ALLOWED, Answer("safe"))]
    assert pay(together, *rows) == [1.0, None, 1.0]
    assert pay(together, rows[0], (LISTED, Answer("unsafe", "6.1"))) == [None, 1.0]
    columns = {"policy": [LISTED.policy.to_json()], "rating": ["safe"]}
    assert together(["?"], [GARBAGE], **columns) == [0.0]


# ---------------------------------------------------------------- similarity and metrics


def test_each_text_is_embedded_once() -> None:
    seen: list[str] = []

    def embed(texts: Sequence[str]) -> Tensor:
        seen.extend(texts)
        return words(texts)

    similarity = cosine_similarity(embed)
    for _ in range(2):
        found = similarity(["a b", "c"], ["a b", "a c"])
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5], [0.0, 0.5**0.5]]))
    assert sorted(seen) == ["a b", "a c", "c"]


def test_token_f1_by_hand() -> None:
    bank = ["illegal gun sales", "the trade of weapons"]
    assert token_f1("Illegal gun sales", bank) == 1.0
    assert token_f1("weapon trades", bank) == 1.0
    assert token_f1("gun", bank) == pytest.approx(2 / 4)
    assert token_f1("gun gun gun", bank) == pytest.approx(2 / 6)
    assert token_f1("of the", bank) == 0.0
    assert token_f1("abuses of parties", ["abuse party"]) == 1.0


@pytest.fixture
def animals(tmp_path: Path) -> WuPalmer:
    edges = ["animal thing", "dog animal", "cat animal", "guide_dog dog", "dog pet", "pet thing",
             "idea mind"]  # fmt: skip
    path = tmp_path / "edges.tsv"
    lines = (e.split() for e in edges)
    path.write_text("".join(f"{a}.n.01\t{b}.n.01\n" for a, b in lines))
    return WuPalmer(path)


def test_wu_palmer_by_hand(animals: WuPalmer) -> None:
    # depths: virtual root 1, thing 2, animal 3, dog 4, guide_dog 5
    assert animals.between("dog.n.01", "dog.n.01") == 1.0
    assert animals.between("dog.n.01", "cat.n.01") == pytest.approx(6 / (1 + 1 + 6))
    assert animals.between("guide_dog.n.01", "cat.n.01") == pytest.approx(6 / (2 + 1 + 6))
    assert animals.between("dog.n.01", "idea.n.01") == pytest.approx(2 / (3 + 2 + 2))
    assert animals.to_synset("a big Dog", "cat.n.01") == pytest.approx(0.75)
    assert animals.to_synset("guide dogs", "guide_dog.n.01") == 1.0
    assert animals.to_synset("nothing known", "cat.n.01") is None
    assert animals.to_bank("dogs", ["cats and ideas"]) == pytest.approx(
        (0.75 + (0.75 + 2 / 7) / 2) / 2
    )
    assert animals.to_bank("dogs", ["purple", "cats"]) == pytest.approx(0.75)
    assert animals.to_bank("dogs", ["purple"]) is None
    with pytest.raises(InputError, match="no synset 'cow.n.01'"):
        animals.between("dog.n.01", "cow.n.01")


def test_a_bad_edge_list_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "edges.tsv"
    with pytest.raises(InputError, match="cannot be read"):
        WuPalmer(path)
    path.write_text("a.n.01\tb.n.01\nnonsense\n")
    with pytest.raises(InputError, match=r"edges\.tsv:2: expected child<TAB>parent"):
        WuPalmer(path)


def test_wu_palmer_of_wordnet_nouns_is_that_of_nltk(data_dir: Path) -> None:
    path = data_dir / "wordnet" / "noun_edges.tsv"
    if not path.is_file():
        pytest.skip("no WordNet edges")
    metric = WuPalmer(path)
    # as in NLTK's documentation
    assert metric.between("dog.n.01", "cat.n.01") == pytest.approx(0.857, abs=1e-3)
    assert metric.between("dog.n.01", "wolf.n.01") == pytest.approx(0.929, abs=1e-3)
    near = metric.to_bank("gun sales", ["weapon trade", "firearms market"])
    far = metric.to_bank("gun sales", ["hateful emblem", "suicide note"])
    assert near > far
