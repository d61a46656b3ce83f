"""One grammar: what is written is read back, what follows the automaton parses, the rest is a
value rated review."""

from __future__ import annotations

import json
import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hysafe.errors import ConfigError
from hysafe.guard.protocol import (
    MAX_ANSWER,
    MAX_NAME,
    MAX_RATIONALE,
    Answer,
    AnswerGrammar,
    Context,
    Entry,
    ParseError,
    PromptPolicy,
    Renaming,
    TokenConstraint,
    episode,
    parse_answer,
    render_prompt,
    split_bank,
    twins,
    write_answer,
)
from hysafe.taxonomy import Policy, Taxonomy, load_taxonomy
from hysafe.types import NoveltyScores

laws = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return load_taxonomy()


@pytest.fixture(scope="module")
def full(taxonomy: Taxonomy) -> PromptPolicy:
    return PromptPolicy.from_view(Policy().apply(taxonomy))


def small() -> PromptPolicy:
    """Weapons and drugs forbidden, animals allowed, under foreign ids."""
    entries = [
        Entry("6.1", ("Goods", "Weapons"), "", ("sell guns",), ("show them in a museum",)),
        Entry("6.3", ("Goods", "Drugs"), "Illegal drugs."),
        Entry("2.5", ("Violence", "Animal cruelty"), "", ("hurt pets",), ("treat them",), True),
    ]
    return PromptPolicy.of(entries, Renaming({"6.1": "K7", "6.3": "12", "2.5": "C1S2"}))


SMALL = small()
GRAMMAR = AnswerGrammar(SMALL)

# ---------------------------------------------------------------- renaming and prompt


@laws
@given(st.integers(0, 2**32), st.integers(1, 600))
def test_a_drawn_renaming_is_one_to_one_and_reversible(seed: int, count: int) -> None:
    nodes = [f"n{i}" for i in range(count)]
    renaming = Renaming.draw(nodes, random.Random(seed))
    assert [renaming.node(renaming.prompt_id(n)) for n in nodes] == nodes
    assert renaming == Renaming.draw(nodes, random.Random(seed))


@pytest.mark.parametrize("bad", ["", "a b", 'a"', "a\\", "a]", "<x", "é\n", "x" * 33])
def test_an_id_that_would_break_the_grammar_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="cannot stand in a prompt"):
        Renaming({"6.1": bad})


def test_two_nodes_never_share_an_id_and_entries_match_the_renaming() -> None:
    with pytest.raises(ConfigError, match="one id"):
        Renaming({"6.1": "A", "6.3": "A"})
    with pytest.raises(ConfigError, match="renames exactly these"):
        PromptPolicy(SMALL.entries[:2], SMALL.renaming)


def test_a_policy_survives_its_column(full: PromptPolicy) -> None:
    for policy in (SMALL, full):
        line = policy.to_json()
        assert "\n" not in line
        assert PromptPolicy.from_json(line) == policy


def test_a_view_lists_categories_and_concepts_of_another_status(taxonomy: Taxonomy) -> None:
    rules = {"nodes": {"6.1": {"status": "non_violating"}, "6.1.1": {"status": "default"}}}
    policy = PromptPolicy.from_view(Policy.from_dict(rules).apply(taxonomy))
    assert len(policy) == 46
    assert policy.entry("6.1").allowed
    assert not policy.entry("6.1.1").allowed
    assert not policy.entry("6.2").allowed
    assert policy.listed(taxonomy.path("6.1.1").ids).node == "6.1.1"
    assert policy.listed(taxonomy.path("6.1.2").ids).node == "6.1"
    with pytest.raises(ConfigError, match="lists risks only"):
        PromptPolicy.from_view(Policy().apply(taxonomy), ["S.6.1"])


def test_the_prompt_shows_policy_context_and_item() -> None:
    context = Context({"6.1": 0.12, "2.5": -0.5}, NoveltyScores(0.0312, None), "BUY NOW")
    prompt = render_prompt(SMALL, text="a  rifle\nfor sale", image=True, context=context)
    assert prompt.splitlines() == [
        "POLICY",
        "[K7] Goods > Weapons",
        "should not",
        "- sell guns",
        "can",
        "- show them in a museum",
        "[12] Goods > Drugs",
        "- Illegal drugs.",
        "[C1S2] Violence > Animal cruelty (allowed)",
        "can",
        "- hurt pets",
        "- treat them",
        "CONTEXT",
        "near [K7] +0.120",
        "near [C1S2] -0.500",
        "novelty policy p=0.0312",
        'ocr "BUY NOW"',
        "ITEM",
        "image <image>",
        'text "a rifle for sale"',
        "ANSWER",
    ]


def test_bullets_can_be_left_out_and_an_empty_context_has_no_section() -> None:
    prompt = render_prompt(SMALL, image=True, context=Context(), max_bullets=0)
    assert prompt.splitlines() == [
        "POLICY", "[K7] Goods > Weapons", "[12] Goods > Drugs",
        "[C1S2] Violence > Animal cruelty (allowed)", "ITEM", "image <image>", "ANSWER",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="needs text, a picture or both"):
        render_prompt(SMALL)


@laws
@given(st.text(max_size=60), st.sampled_from(["\nANSWER\n", "<image>", "</s>", '"', "\u2028"]))
def test_foreign_text_stays_one_line_without_special_tokens(text: str, attack: str) -> None:
    foreign = text + attack + text
    quiet = render_prompt(SMALL, text="", context=Context(ocr="x"))
    prompt = render_prompt(SMALL, text=foreign, context=Context(ocr=f"x{foreign}"))
    assert "<" not in prompt
    assert len(prompt.splitlines()) == len(quiet.splitlines())
    assert json.loads(prompt.splitlines()[-2].removeprefix("text ")) is not None
    assert len(render_prompt(SMALL, text="y" * 9999, max_chars=50)) < len(quiet) + 60


# ---------------------------------------------------------------- answers

ANSWERS = [
    (Answer("safe"), '{"rating": "safe", "category": null, "rationale": ""}'),
    (
        Answer("unsafe", "6.1", rationale="a rifle"),
        '{"rating": "unsafe", "category": "K7", "rationale": "a rifle"}',
    ),
    (
        Answer("unsafe", novel="ivory trade", rationale='says "tusk"'),
        '{"rating": "unsafe", "novel": "ivory trade", "rationale": "says \\"tusk\\""}',
    ),
    (
        Answer("safe", "2.5", rationale="allowed"),
        '{"rating": "safe", "category": "C1S2", "rationale": "allowed"}',
    ),
    (Answer("review"), '{"rating": "review", "category": null, "rationale": ""}'),
    (
        Answer("review", novel="odd thing"),
        '{"rating": "review", "novel": "odd thing", "rationale": ""}',
    ),
]


@pytest.mark.parametrize(("answer", "text"), ANSWERS)
def test_answers_are_written_and_read_back(answer: Answer, text: str) -> None:
    assert write_answer(answer, SMALL) == text
    assert parse_answer(text, SMALL) == answer
    assert GRAMMAR.state(text).part == "end"


def test_key_order_white_space_and_nulls_are_free() -> None:
    text = ' {"rationale" : "x",\n "novel": null, "category": "12",\t"rating": "unsafe"}\n'
    assert parse_answer(text, SMALL) == Answer("unsafe", "6.3", rationale="x")


MALFORMED = [
    (None, "type"),
    (b"{}", "type"),
    ("", "json"),
    ("no json", "json"),
    ('{"rating": "safe", "category": null, "rationale": "x', "json"),
    ('{"rating": "safe", "category": null, "rationale": "x"} ok', "json"),
    ('```json\n{"rating": "safe", "category": null, "rationale": ""}\n```', "json"),
    ('[{"rating": "safe"}]', "json"),
    ("[" * 4000, "json"),
    ('{"rating": NaN, "category": null, "rationale": ""}', "json"),
    (f'{{"rating": {"9" * 4000}, "category": null, "rationale": ""}}', "type"),
    ("x" * (MAX_ANSWER + 1), "length"),
    ('{"rating": "safe", "rating": "unsafe", "category": "K7", "rationale": ""}', "duplicate"),
    ('{"rating": "safe", "category": null}', "keys"),
    ('{"category": null, "rationale": ""}', "keys"),
    ('{"rating": "safe", "rationale": ""}', "keys"),
    ('{"rating": "safe", "category": null, "rationale": "", "score": 1}', "keys"),
    ("{}", "keys"),
    ('{"rating": true, "category": null, "rationale": ""}', "type"),
    ('{"rating": "safe", "category": 12, "rationale": ""}', "type"),
    ('{"rating": "unsafe", "category": ["K7"], "rationale": ""}', "type"),
    ('{"rating": "safe", "category": null, "rationale": null}', "type"),
    ('{"rating": "Unsafe", "category": "K7", "rationale": ""}', "rating"),
    ('{"rating": "unsafe", "category": "K8", "rationale": ""}', "category"),
    ('{"rating": "unsafe", "category": "6.1", "rationale": ""}', "category"),
    ('{"rating": "unsafe", "category": null, "rationale": ""}', "category"),
    ('{"rating": "unsafe", "category": "C1S2", "rationale": ""}', "category"),
    ('{"rating": "unsafe", "category": "K7", "novel": "x y", "rationale": ""}', "novel"),
    ('{"rating": "unsafe", "novel": " ", "rationale": ""}', "novel"),
    ('{"rating": "unsafe", "novel": "12 34", "rationale": ""}', "novel"),
    (f'{{"rating": "unsafe", "novel": "{"x" * (MAX_NAME + 1)}", "rationale": ""}}', "novel"),
    ('{"rating": "safe", "novel": "ivory trade", "rationale": ""}', "novel"),
    (
        f'{{"rating": "safe", "category": null, "rationale": "{"x" * (MAX_RATIONALE + 1)}"}}',
        "length",
    ),
]


@pytest.mark.parametrize(("text", "kind"), MALFORMED)
def test_a_malformed_answer_is_a_value_rated_review(text: object, kind: str) -> None:
    found = parse_answer(text, SMALL)
    assert isinstance(found, ParseError)
    assert found.kind == kind
    assert found.rating == "review"
    assert len(found.text) <= 200
    assert len(found.message) < 500


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.sampled_from(["K7", "safe"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rating", "category", "novel", "rationale"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)


@laws
@given(st.text() | json_values.map(json.dumps) | json_values)
def test_the_parser_never_raises_and_what_it_accepts_can_be_written(text: object) -> None:
    found = parse_answer(text, SMALL)
    if isinstance(found, Answer):
        assert parse_answer(write_answer(found, SMALL), SMALL) == found


@laws
@given(st.integers(0, 300), st.sampled_from(string.printable))
def test_one_changed_character_never_turns_unsafe_into_safe(place: int, other: str) -> None:
    text = ANSWERS[1][1]
    place %= len(text)
    found = parse_answer(text[:place] + other + text[place + 1 :], SMALL)
    assert found.rating in ("unsafe", "review")


def test_the_rationale_becomes_one_printable_line() -> None:
    text = '{"rating": "safe", "category": null, "rationale": " a\\nb\\u0000\\ud800 \\u200b c "}'
    assert parse_answer(text, SMALL) == Answer("safe", rationale="a b c")


@pytest.mark.parametrize(
    "answer",
    [
        Answer("unsafe"),
        Answer("unsafe", "2.5"),
        Answer("unsafe", "9.9"),
        Answer("safe", novel="x y"),
        Answer("unsafe", "6.1", "x y"),
        Answer("maybe"),  # type: ignore[arg-type]
    ],
)
def test_an_answer_the_policy_cannot_get_is_not_written(answer: Answer) -> None:
    with pytest.raises(ConfigError):
        write_answer(answer, SMALL)


# ---------------------------------------------------------------- episodes


def test_banks_are_split_once_and_for_all(taxonomy: Taxonomy) -> None:
    for node in (*taxonomy.categories, *taxonomy.domains):
        bank = split_bank(node)
        assert bank == split_bank(node)
        assert len(bank.held_out) == 1
        assert node.name in bank.train
        assert not set(bank.train) & set(bank.held_out)
        assert set(bank.train) | set(bank.held_out) == {node.name, *node.synonyms}
    assert len(split_bank(taxonomy["1.1"], held_out=0.25).held_out) == 3


def test_a_hidden_category_is_gone_from_policy_and_prompt(
    taxonomy: Taxonomy, full: PromptPolicy
) -> None:
    with_siblings = 0
    for seed in range(40):
        found = episode(full, taxonomy, "6.1.2", seed=seed, hide=True)
        assert (found.rating, found.category, found.parent) == ("unsafe", None, "D6")
        assert found.bank == split_bank(taxonomy["6.1"]).train
        assert "6.1" in found.hidden
        assert set(found.hidden) in ({"6.1"}, {"6.1", "6.2", "6.3", "6.4"})
        with_siblings += len(found.hidden) > 1
        assert not {e.node for e in found.policy.entries} & set(found.hidden)
        assert len(found.policy) == 45 - len(found.hidden)
        prompt = render_prompt(
            found.policy, text="x", context=Context({"6.1": 1.0, "1.1": 0.5}, ocr=None)
        )
        assert taxonomy["6.1"].name not in prompt
        assert prompt.count("\nnear [") == 1
    assert 4 < with_siblings < 25  # SIBLING_RATE of 40 is 12


def test_hiding_takes_what_stands_above_below_and_beside_the_item(taxonomy: Taxonomy) -> None:
    view = Policy().apply(taxonomy)
    mixed = PromptPolicy.from_view(view, ["D6", "6.1", "6.1.1", "6.1.2", "7.3", "1.1"])
    found = episode(mixed, taxonomy, "6.1", seed=1, hide=True, also=["7.3.1"], sibling_rate=0.0)
    assert {e.node for e in found.policy.entries} == {"1.1"}
    with pytest.raises(ConfigError, match="empty policy"):
        episode(mixed, taxonomy, "6.1", seed=1, hide=True, also=["7.3", "1.1"])
    with pytest.raises(ConfigError, match="only a listed and forbidden"):
        episode(mixed, taxonomy, None, seed=1, hide=True)
    with pytest.raises(ConfigError, match="no entry"):
        episode(mixed, taxonomy, "9.1", seed=1)


def test_episodes_shuffle_rename_and_repeat_with_the_seed(
    taxonomy: Taxonomy, full: PromptPolicy
) -> None:
    first, again = (episode(full, taxonomy, "6.1", seed=3) for _ in range(2))
    other = episode(full, taxonomy, "6.1", seed=4)
    assert first == again
    assert first.category == other.category == "6.1"
    assert (first.rating, first.bank, first.hidden) == ("unsafe", (), ())
    order = [e.node for e in first.policy.entries]
    assert sorted(order) == sorted(e.node for e in full.entries)
    assert order != [e.node for e in other.policy.entries]
    assert first.policy.renaming != other.policy.renaming
    assert not set(first.policy.renaming.prompt_ids.values()) & set(order)


def test_a_subset_keeps_the_true_category_and_the_one_a_benign_item_resembles(
    taxonomy: Taxonomy, full: PromptPolicy
) -> None:
    for seed in range(20):
        found = episode(full, taxonomy, "6.1.1", seed=seed, size=5)
        assert len(found.policy) == 5
        assert "6.1" in found.policy
        safe = episode(full, taxonomy, None, seed=seed, size=5, benign_of="2.5")
        assert (safe.rating, safe.category, safe.benign_of) == ("safe", None, "2.5")
        assert len(safe.policy) == 5
        assert "2.5" in safe.policy


def test_twins_differ_in_one_entry_and_in_the_rating(
    taxonomy: Taxonomy, full: PromptPolicy
) -> None:
    forbidden, allowed = twins(full, taxonomy, "3.4", seed=0, pair="p", size=8)
    assert (forbidden.rating, allowed.rating) == ("unsafe", "safe")
    assert forbidden.category == allowed.category == "3.4"
    assert forbidden.pair == allowed.pair == "p"
    assert forbidden.policy.renaming == allowed.policy.renaming
    changed = [
        a.node
        for a, b in zip(forbidden.policy.entries, allowed.policy.entries, strict=True)
        if a != b
    ]
    assert changed == ["3.4"]
    assert allowed.policy.entry("3.4").allowed


def test_the_right_answer_of_an_episode_can_be_written(
    taxonomy: Taxonomy, full: PromptPolicy
) -> None:
    made = [
        episode(full, taxonomy, "6.1", seed=0),
        episode(full, taxonomy, "6.1", seed=0, hide=True),
        episode(full, taxonomy, None, seed=0),
        *twins(full, taxonomy, "6.1", seed=0, pair="p"),
    ]
    for one in made:
        text = write_answer(one.answer("because"), one.policy)
        read = parse_answer(text, PromptPolicy.from_json(one.columns()["policy"]))
        assert read == one.answer("because")
        assert json.loads(json.dumps(one.columns())) == one.columns()
    assert made[1].answer(name="gun talk").novel == "gun talk"


# ---------------------------------------------------------------- constrained decoding

free_text = st.sampled_from(string.ascii_letters + "  ,.-é中😀\u00a0\t\n<0") | st.characters()


@laws
@given(st.data())
def test_every_walk_that_follows_the_automaton_parses(data: st.DataObject) -> None:
    grammar = AnswerGrammar(SMALL, max_words=3, max_name=12, max_rationale=10)
    state, text = grammar.start, ""
    while state.part != "end":
        fixed, free = grammar.next_characters(state)
        assert fixed or free
        options = st.sampled_from(sorted(fixed)) if fixed else st.nothing()
        character = data.draw(options | free_text if free else options)
        following = grammar.advance(state, character)
        if character in fixed:
            assert following is not None
        if following is not None:
            state, text = following, text + character
    found = parse_answer(text, SMALL)
    assert isinstance(found, Answer), text
    if found.novel:
        assert len(found.novel) <= 12
        assert 1 <= len(found.novel.split()) <= 3
    assert len(found.rationale) <= 10


@laws
@given(st.sampled_from([t for _, t in ANSWERS]), st.integers(0, 200), st.characters())
def test_the_automaton_follows_no_other_text_than_the_parser(
    text: str, place: int, other: str
) -> None:
    place %= len(text)
    changed = text[:place] + other + text[place + 1 :]
    state = GRAMMAR.state(changed)
    if state is not None and state.part == "end":
        assert isinstance(parse_answer(changed, SMALL), Answer)


def test_forced_text_needs_no_model() -> None:
    assert GRAMMAR.forced(GRAMMAR.start) == '{"rating": "'
    state = GRAMMAR.state('{"rating": "u')
    assert GRAMMAR.forced(state) == 'nsafe", "'
    state = GRAMMAR.state('{"rating": "unsafe", "category": "K')
    assert GRAMMAR.forced(state) == '7", "rationale": "'
    state = GRAMMAR.state('{"rating": "unsafe", "novel": "ivory trade"')
    assert GRAMMAR.forced(state) == ', "rationale": "'
    assert GRAMMAR.forced(GRAMMAR.state(ANSWERS[0][1])) == ""


@pytest.mark.parametrize(
    "text",
    [
        '{"rating": "unsafe", "category": "C1S2"',
        '{"rating": "unsafe", "category": null',
        '{"rating": "safe", "novel',
        '{"rating": "unsafe", "novel": " ',
        '{"rating": "unsafe", "novel": "1',
        '{"rating": "unsafe", "novel": "a  ',
        '{"rating": "unsafe", "novel": "a "',
        '{"rating": "unsafe", "novel": "a b c d e f ',
        '{"rating": "unsafe", "novel": "a\\',
        '{"rating": "safe", "category": null, "rationale": "\\n',
        '{"rating": "safe", "category": null, "rationale": ""} ',
    ],
)
def test_what_would_not_parse_or_not_end_is_not_begun(text: str) -> None:
    assert GRAMMAR.state(text) is None
    assert GRAMMAR.state('{"rating": "')


def test_a_policy_of_allowed_entries_only_leaves_a_name_for_the_unsafe() -> None:
    allowed = PromptPolicy.of([SMALL.entries[2]])
    grammar = AnswerGrammar(allowed, ratings=("safe", "unsafe"))
    state = grammar.state('{"rating": "unsafe", "')
    assert grammar.forced(state).startswith('novel": "')


def vocabulary() -> list[str | None]:
    pieces = ["</s>", None, "", '{"rating": "', '", "', "safe", "unsafe", " trade", "ivory", '"}']
    pieces += ["rationale", "novel", '": "', "K7", "zz top zz top zz", "\n", "é"]
    return pieces + [chr(i) for i in range(32, 127)]


def test_tokens_that_follow_the_constraint_always_end_in_an_answer() -> None:
    grammar = AnswerGrammar(SMALL, max_name=20, max_rationale=12)
    words = vocabulary()
    constraint = TokenConstraint(grammar, words, eos=0)
    rng = random.Random(0)
    kinds = set()
    for _ in range(60):
        tokens: list[int] = []
        while True:
            allowed = constraint.allowed(constraint.state(tokens))
            assert allowed
            token = rng.choice(allowed)
            if token == 0:
                assert allowed == (0,)
                break
            tokens.append(token)
        text = "".join(str(words[t]) for t in tokens)
        found = parse_answer(text, SMALL)
        assert isinstance(found, Answer), text
        kinds.add((found.rating, found.category is not None, found.novel is not None))
    assert len(kinds) >= 5


def test_the_cache_of_the_constraint_changes_nothing() -> None:
    words = vocabulary()
    constraint = TokenConstraint(GRAMMAR, words, eos=0)
    start = GRAMMAR.state('{"rating": "unsafe", "novel": "')
    state = GRAMMAR.advance(start, "a" * (MAX_NAME - 3))
    for _ in range(4):
        plain = tuple(
            i for i, w in enumerate(words) if i and w and GRAMMAR.advance(state, w) is not None
        )
        assert constraint.allowed(start)
        assert constraint.allowed(state) == plain
        following = GRAMMAR.advance(state, "b")
        state = following or state
    assert {words[i][0] for i in plain} == {'"'}  # type: ignore[index]
    assert constraint.state([3, 1]) is None
    assert constraint.state([words.index("K")]) is None


def test_a_vocabulary_that_could_get_stuck_is_refused() -> None:
    words = [w for w in vocabulary() if w not in ("{", "7")]
    with pytest.raises(ConfigError, match="no token for '7' '{'"):
        TokenConstraint(GRAMMAR, words, eos=0)
