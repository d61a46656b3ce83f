"""Letters as a text tower knows them."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hysafe.encoder import HyperbolicEncoder, mini_architecture
from hysafe.encoder.plain import LOOK_ALIKES, foreign_share, plain

SENTENCE = "they will kill every soldier at the school"
WORDS = frozenset([*SENTENCE.split(), "shoot", "vermin", "abc", "you"])
CYRILLIC = str.maketrans("aeopcyxi", "аеорсухі")


def written(first: str, last: str, start: int) -> str:
    return "".join(chr(start + ord(c) - ord(first)) if first <= c <= last else c for c in SENTENCE)


@pytest.mark.parametrize(
    "disguised",
    [
        pytest.param(written("a", "z", 0x1D5EE), id="mathematical bold"),
        pytest.param(written("a", "z", 0xFF41), id="full width"),
        pytest.param(written("a", "z", 0x24D0), id="circled"),
        pytest.param(written("a", "z", 0xE0061), id="tags"),
        pytest.param(SENTENCE.translate(CYRILLIC), id="Cyrillic look-alikes"),
        pytest.param("they will ᴋɪʟʟ every soldier at the school", id="small capitals"),
        pytest.param("they will k.i.l.l every s-o-l-d-i-e-r at the school", id="marks between"),
        pytest.param("they will k i l l every s_o_l_d_i_e_r at the school", id="spaces between"),
        pytest.param("th3y w1ll k!ll 3very $old13r at the sch00l", id="signs"),
    ],
)
def test_a_disguised_sentence_is_read(disguised: str) -> None:
    assert plain(disguised, WORDS) == SENTENCE
    assert foreign_share(plain(disguised, WORDS)) == 0


def test_a_word_of_two_scripts_is_read_beside_a_foreign_one() -> None:
    assert plain("ѕhооt them, доброе утро", WORDS) == "shoot them, доброе утро"


def test_black_squares_are_capitals_and_ligatures_letters() -> None:
    assert plain("eﬀective ﬁnd", WORDS) == "effective find"
    assert plain("🅺🅸🅻🅻", WORDS) == "KILL"


@pytest.mark.parametrize(
    "text",
    [
        "mp3 h264 b2b 1st 2nd 5pm 100k covid19 k8s 9mm s3 H2O c++ 4x4 $100 me@mail.example #m4a1",
        "Stop! WOW!! 'Kill!' she cried: 1 2 3 4, A, B, C",
        "naïve café, Zürich, Łódź, søster, straße",
        "½ cup ™ m² ①② 5㎏ 👨‍💻 🏴\U000e0067\U000e0062\U000e007f",
        "Я убью вас всех завтра",
        "он дома",
        "good morning, доброе утро",
        "Ελλάδα",
        "我明天要去学校",
        "",
    ],
)
def test_what_is_no_disguise_stays(text: str) -> None:
    assert plain(text, WORDS) == text


def test_letters_apart_are_words_where_they_make_some() -> None:
    assert plain("t h e y w i l l k i l l y o u", WORDS) == "they will kill you"
    assert plain("v e r m i n", WORDS) == "vermin"
    assert plain("x y z", WORDS) == "x y z"
    # a long word that is not known, whole: parts of two letters that mean nothing are no words
    assert plain("s p o i l e r", WORDS) == "spoiler"


def test_words_without_spaces_are_taken_apart() -> None:
    assert plain("theywillkillyouattheschool", WORDS) == "they will kill you at the school"
    assert plain("#KillEverySoldierAtTheSchool!", WORDS) == "#Kill Every Soldier At The School!"
    # a long word is no run of words
    assert plain("electroencephalogram", WORDS) == "electroencephalogram"


@pytest.mark.parametrize(
    "piece", ["a.", "a-", "k i l l ", "a1", "a!", "!", "1", "kill", "кіll ", "а", "𝐤", "$a-"]
)
def test_a_very_long_text_is_read(piece: str) -> None:
    """Seconds; hours where time grew with the square of the length."""
    text = piece * (200_000 // len(piece))
    once = plain(text, WORDS)
    assert len(once) <= 2 * len(text)
    assert plain(once, WORDS) == once


def test_look_alikes_are_letters_for_letters() -> None:
    for alike, latin in LOOK_ALIKES.items():
        assert len(latin) == 1
        assert latin.isascii()
        assert latin.isalpha()
        assert unicodedata.category(chr(alike))[0] == "L"


def test_share_of_letters_that_are_not_latin() -> None:
    assert foreign_share("abc 123") == 0
    assert foreign_share("12 34 🔪") == 0
    assert foreign_share("Привет") == 1
    assert foreign_share("ab вг") == 0.5
    assert foreign_share("tiếng Việt ñandú ıi þ") == 0


@given(st.text(max_size=60))
def test_plain_text_stays_plain(text: str) -> None:
    once = plain(text, WORDS)
    assert plain(once, WORDS) == once
    assert 0 <= foreign_share(once) <= 1


def test_the_tower_reads_plain_letters_and_says_what_it_does_not_read() -> None:
    towers = HyperbolicEncoder(mini_architecture("resnet10t", image_size=32), dim=8).towers
    told, disguised = towers.tokenize(["shoot the soldier", "ѕhооt the s.o.l.d.i.e.r"]).tolist()
    assert disguised == told
    assert towers.token_counts(["𝐬𝐡𝐨𝐨𝐭 the soldier"]) == [len(told)]
    assert all(towers.reads(["shoot the soldier", "𝐬𝐡𝐨𝐨𝐭 the ѕоldіеr", "🔪🔪 123"]))
    assert not any(towers.reads(["Я убью вас всех завтра", "the word for it is 我明天要去学校"]))
