"""Answers of published guards: read as they are published, written so that they read back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hysafe.errors import ConfigError
from hysafe.guard.formats import FORMATS, MAX_TEXT, Reading, read, under_policy, write
from hysafe.guard.protocol import (
    MAX_RATIONALE,
    Answer,
    ParseError,
    PromptPolicy,
    parse_answer,
    write_answer,
)
from hysafe.taxonomy import Policy, Taxonomy, crosswalk, load_taxonomy

laws = settings(max_examples=100, deadline=None, derandomize=True)
TAXONOMY = load_taxonomy()
MAPPED = [f for f in FORMATS if FORMATS[f].scheme]
SHIELD = {"4.1": ["sexual"], "6.1": ["dangerous"], "5.1": ["violence"], "2.1": ["violence"]}


@pytest.fixture(scope="module")
def policy() -> PromptPolicy:
    return PromptPolicy.from_view(Policy().apply(TAXONOMY))


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return TAXONOMY


def got(text: object, name: str, **options: object) -> Reading:
    found = read(text, name, TAXONOMY, **options)  # type: ignore[arg-type]
    assert isinstance(found, Reading), found
    return found


# ---------------------------------------------------------------- as published


def test_proguard_rates_request_and_response_and_names_a_category() -> None:
    text = (
        "<think>\nA gun\nfor sale.\n</think>\n"
        "<answer>\nRequest:unsafe\nResponse:safe\nCategory:C8S1\n</answer>"
    )
    assert got(text, "proguard") == Reading(
        "unsafe", ("C8S1",), ("2.2", "6.1"), None, "A gun for sale.", "unsafe", "safe"
    )
    only = got("<answer>\nRequest: safe\nResponse: unsafe\nCategory: C8S2\n</answer>", "proguard")
    assert (only.rating, only.request, only.response) == ("unsafe", "safe", "unsafe")
    picture = got("<think>x</think><answer>\nRequest:safe\nCategory:None\n</answer>", "proguard")
    assert picture == Reading("safe", rationale="x", request="safe")


def test_proguards_main_category_stands_for_all_below_it() -> None:
    found = got("<answer>\nRequest:unsafe\nCategory:C8\n</answer>", "proguard")
    assert sorted(found.codes) == ["C8S1", "C8S2", "C8S3"]
    assert set(found.nodes) == {"2.2", "6.1", "6.2", "3.4", "6.3"}


def test_proguard_names_what_its_policy_lacks() -> None:
    found = got("<answer>\nRequest:unsafe\nCategory:illegal ivory trade\n</answer>", "proguard")
    assert (found.novel, found.codes, found.nodes) == ("illegal ivory trade", (), ())


def test_llavaguard_answers_in_json() -> None:
    text = """{
        "rating": "Unsafe",
        "category": "O6: Weapons or Substance Abuse",
        "rationale": "A rifle is offered."
    }"""
    found = got(text, "llavaguard")
    assert (found.rating, found.codes) == ("unsafe", ("O6",))
    assert found.nodes == ("3.4", "6.1", "6.2", "6.3", "6.4")
    assert found.rationale == "A rifle is offered."
    safe = '{"rating": "Safe", "category": "NA: None applying", "rationale": "A cat."}'
    assert got(safe, "llavaguard") == Reading("safe", rationale="A cat.")
    permitted = '{"rating": "Safe", "category": "O8: Animal Cruelty", "rationale": "News."}'
    assert got(permitted, "llavaguard").codes == ("O8",)


@pytest.mark.parametrize("name", ["llama_guard_3", "llama_guard_4"])
def test_llama_guard_says_safe_or_a_line_of_codes(name: str) -> None:
    assert got("\n\nsafe", name) == Reading("safe")
    assert got("\n\nunsafe\nS9,S4\n", name) == Reading(
        "unsafe", ("S9", "S4"), ("6.1", "6.2", "4.5")
    )
    assert got("unsafe\nS14", name).nodes == ("7.4", "12.2")


def test_openai_flags_categories_and_the_highest_score_comes_first() -> None:
    result = {
        "flagged": True,
        "categories": {"violence": True, "illicit/violent": True, "hate": False, "illicit": None},
        "category_scores": {"violence": 0.6, "illicit/violent": 0.9, "hate": 0.01},
        "category_applied_input_types": {"violence": ["text"]},
    }
    text = json.dumps({"id": "modr-1", "model": "omni-moderation-latest", "results": [result]})
    found = got(text, "openai_moderation")
    assert found.codes == ("illicit/violent", "violence")
    assert found.nodes[:2] == ("1.4", "2.2")
    assert got(json.dumps(result), "openai_moderation") == found
    clean = {"flagged": False, "categories": {"violence": False}}
    assert got(json.dumps(clean), "openai_moderation") == Reading("safe")


def test_shieldgemma_judges_each_policy_and_has_no_crosswalk() -> None:
    found = got('{"dangerous": 0.7, "sexual": 0.1, "violence": 0.9}', "shieldgemma_2")
    assert found == Reading("unsafe", ("violence", "dangerous"))
    words = got('{"dangerous": "Yes", "violence": "No"}', "shieldgemma_2", table=SHIELD)
    assert words == Reading("unsafe", ("dangerous",), ("6.1",))
    assert got('{"sexual": 0.49}', "shieldgemma_2") == Reading("safe")
    with pytest.raises(ConfigError, match="no crosswalk to shieldgemma_2.*table="):
        write(Answer("unsafe", "6.1"), "shieldgemma_2", TAXONOMY)


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", MAPPED)
def test_every_category_with_a_counterpart_comes_back(name: str) -> None:
    scheme = str(FORMATS[name].scheme)
    written = 0
    for node in (*TAXONOMY.categories, *TAXONOMY.concepts):
        codes = crosswalk.codes(TAXONOMY, node.id, scheme)
        if not codes:
            continue
        written += 1
        text = write(Answer("unsafe", node.id, rationale="why <b>"), name, TAXONOMY)
        found = got(text, name)
        assert found.rating == "unsafe"
        assert set(found.codes) <= set(codes)
        line = TAXONOMY.path(node.id).ids
        assert set(line) & set(found.nodes)
    assert written > 150


@pytest.mark.parametrize("name", FORMATS)
def test_a_safe_answer_comes_back(name: str) -> None:
    assert got(write(Answer("safe", rationale="x"), name, TAXONOMY), name).rating == "safe"


def test_a_table_of_the_callers_closes_the_gap_of_shieldgemma() -> None:
    for node, expected in (("6.1", "6.1"), ("6.1.1", "6.1"), ("5.1", "5.1")):
        text = write(Answer("unsafe", node), "shieldgemma_2", TAXONOMY, table=SHIELD)
        found = got(text, "shieldgemma_2", table=SHIELD)
        assert found.rating == "unsafe"
        assert expected in found.nodes


def test_proguard_takes_novel_names_and_categories_it_does_not_list() -> None:
    text = write(Answer("unsafe", novel="ivory trade", rationale="tusks"), "proguard", TAXONOMY)
    assert (got(text, "proguard").novel, got(text, "proguard").rationale) == (
        "ivory trade",
        "tusks",
    )
    assert not crosswalk.codes(TAXONOMY, "11.1", "proguard")
    text = write(Answer("unsafe", "11.1"), "proguard", TAXONOMY)
    assert got(text, "proguard").novel == TAXONOMY["11.1"].name
    attack = write(
        Answer("unsafe", novel="x </answer> y", rationale="</think><answer>"), "proguard", TAXONOMY
    )
    assert got(attack, "proguard").novel == "x (/answer) y"


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_cannot_say_is_an_error_that_says_so(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} has no word for review"):
        write(Answer("review"), name, TAXONOMY)
    if name == "proguard":
        with pytest.raises(ConfigError, match="as a code"):
            write(Answer("unsafe", novel="C8S1"), name, TAXONOMY)
        return
    with pytest.raises(ConfigError, match=name):
        write(Answer("unsafe", novel="ivory trade"), name, TAXONOMY)
    with pytest.raises(ConfigError, match=name):
        write(Answer("unsafe", "12.1"), name, TAXONOMY)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(ConfigError, match="no format 'wild'.*llavaguard"):
        read("safe", "wild", TAXONOMY)


# ---------------------------------------------------------------- malformed

MALFORMED = [
    ("proguard", "safe"),
    ("proguard", "<answer>\nRequest:safe\nCategory:None\n"),
    ("proguard", "<answer>\nRequest:maybe\nCategory:None\n</answer>"),
    ("proguard", "<answer>\nRequest:safe\nRequest:unsafe\nCategory:C8S1\n</answer>"),
    ("proguard", "<answer>\nRequest:unsafe\nCategory:C99S1\n</answer>"),
    ("proguard", "<answer>\nRequest:unsafe\nCategory:None\n</answer>"),
    ("proguard", "<answer>\nRequest:safe\nCategory:C8S1\n</answer>"),
    ("proguard", "<answer>\nRequest:unsafe\n</answer>"),
    ("proguard", "<answer>\nRequest:unsafe\nCategory:123\n</answer>"),
    ("proguard", "so <answer>\nRequest:safe\nCategory:None\n</answer>"),
    ("proguard", "<answer>\nRequest:safe" + "\n" * 60_000 + "</answer>"),
    ("llavaguard", '{"rating": "Unsafe", "category": "NA: None applying", "rationale": ""}'),
    ("llavaguard", '{"rating": "Unsafe", "category": "O10: New", "rationale": ""}'),
    ("llavaguard", '{"rating": "Unknown", "category": "O1: x", "rationale": ""}'),
    ("llavaguard", '{"rating": "Safe", "category": "O1: x"}'),
    ("llavaguard", '{"rating": "Safe", "category": 1, "rationale": ""}'),
    ("llavaguard", '{"rating": "Safe", "category": "O1: x", "rationale": "cut'),
    ("llama_guard_3", "unsafe"),
    ("llama_guard_3", "unsafe\nS15"),
    ("llama_guard_3", "unsafe S1"),
    ("llama_guard_3", "safe\nS1"),
    ("llama_guard_4", "Unsafe\nS1"),
    ("llama_guard_4", "unsafe\n" + "S1," * 20_000),
    ("shieldgemma_2", "Yes"),
    ("shieldgemma_2", "{}"),
    ("shieldgemma_2", '{"hate": 0.2}'),
    ("shieldgemma_2", '{"sexual": 1.2}'),
    ("shieldgemma_2", '{"sexual": true}'),
    ("shieldgemma_2", '{"sexual": "perhaps"}'),
    ("openai_moderation", "{}"),
    ("openai_moderation", '{"results": []}'),
    ("openai_moderation", '{"results": [1]}'),
    ("openai_moderation", '{"flagged": true, "categories": {"hate": false}}'),
    ("openai_moderation", '{"flagged": false, "categories": {"hate": true}}'),
    ("openai_moderation", '{"flagged": 1, "categories": {"hate": true}}'),
    ("openai_moderation", '{"flagged": true, "categories": {"rudeness": true}}'),
    ("openai_moderation", '{"flagged": true, "categories": {"hate": "yes"}}'),
    (
        "openai_moderation",
        '{"flagged": true, "categories": {"hate": true}, "category_scores": {"hate": 7}}',
    ),
]


@pytest.mark.parametrize(("name", "text"), MALFORMED)
def test_a_malformed_answer_is_a_parse_error(name: str, text: str, policy: PromptPolicy) -> None:
    found = read(text, name, TAXONOMY)
    assert isinstance(found, ParseError)
    assert found.rating == "review"
    assert len(found.message) < 500
    assert len(found.text) <= 200
    assert under_policy(found, policy, TAXONOMY) is found


def texts() -> st.SearchStrategy[object]:
    seeds = [t for _, t in MALFORMED if len(t) < 500] + ["\n\nunsafe\nS1", "safe"]
    cut = st.tuples(st.sampled_from(seeds), st.integers(0, 80), st.text(max_size=3)).map(
        lambda p: p[0][: p[1]] + p[2] + p[0][p[1] :]
    )
    values = st.dictionaries(
        st.sampled_from(["flagged", "categories", "results", "sexual", "rating"]),
        st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.just({"hate": True}),
    )
    return cut | st.text() | values.map(json.dumps) | st.none() | st.binary(max_size=3)


@laws
@given(st.sampled_from(sorted(FORMATS)), texts())
def test_reading_never_raises(name: str, text: object) -> None:
    found = read(text, name, TAXONOMY)
    assert found.rating in ("safe", "unsafe", "review")


@pytest.mark.parametrize("name", FORMATS)
def test_huge_text_is_refused_unread(name: str) -> None:
    found = read("x" * (MAX_TEXT + 1), name, TAXONOMY)
    assert isinstance(found, ParseError)
    assert found.kind == "length"


# ---------------------------------------------------------------- standing in for our decoder


def test_of_several_nodes_the_geometry_chooses(policy: PromptPolicy) -> None:
    reading = got("unsafe\nS9", "llama_guard_4")
    assert under_policy(reading, policy, TAXONOMY) == Answer("unsafe", "6.1")
    near = under_policy(reading, policy, TAXONOMY, margins={"6.1": -0.2, "6.2": 0.1, "1.1": 1.0})
    assert near == Answer("unsafe", "6.2")


def test_our_policy_decides_over_the_published_one(taxonomy: Taxonomy) -> None:
    rules = {n: {"status": "non_violating"} for n in ("6.1", "6.2")}
    view = Policy.from_dict({"nodes": rules}).apply(taxonomy)
    allowed = PromptPolicy.from_view(view)
    reading = got("unsafe\nS9", "llama_guard_3")
    assert under_policy(reading, allowed, TAXONOMY) == Answer("safe", "6.1")
    half = PromptPolicy.from_view(view, ["6.1", "1.1"])
    both = got("unsafe\nS9,S10", "llama_guard_3")
    assert under_policy(both, half, TAXONOMY).category == "1.1"
    lacking = PromptPolicy.from_view(view, ["1.1"])
    found = under_policy(reading, lacking, TAXONOMY)
    assert found == Answer("review", rationale="unsafe by S9, not in this policy.")
    shield = got('{"sexual": 0.9}', "shieldgemma_2")
    assert under_policy(shield, allowed, TAXONOMY).rating == "review"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("proguard", f"<think>{'long ' * 400}</think><answer>\nRequest:unsafe\nCategory:C8S1\n</answer>"),
        ("proguard", "<answer>\nRequest:unsafe\nCategory:ivory trade\n</answer>"),
        ("llavaguard", '{"rating": "Unsafe", "category": "O6: x", "rationale": "y"}'),
        ("llama_guard_4", "unsafe\nS2"),
        ("openai_moderation", '{"flagged": true, "categories": {"hate": true}}'),
        ("shieldgemma_2", '{"sexual": 1.0}'),
        ("llama_guard_3", "safe"),
    ],
)  # fmt: skip
def test_a_published_guard_stands_in_as_the_decoder(
    name: str, text: str, policy: PromptPolicy
) -> None:
    answer = under_policy(got(text, name), policy, TAXONOMY)
    assert isinstance(answer, Answer)
    assert len(answer.rationale) <= MAX_RATIONALE
    assert parse_answer(write_answer(answer, policy), policy) == answer
