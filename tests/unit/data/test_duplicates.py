"""Repeats and benchmark texts are found, and nothing else is."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from data_samples import assistant, system, user

from prefold.data.duplicates import (
    Contamination,
    ExactRepeats,
    Match,
    NearRepeats,
    Parts,
    overlapping,
    words_of,
)
from prefold.data.preference import RowId

WORDS = [f"word{number}" for number in range(5000)]


def text(seed: int, words: int = 60) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def changed(original: str, *places: int) -> str:
    words = original.split()
    for place in places:
        words[place] = "changed"
    return " ".join(words)


def parts(prompt: str = "Why?", chosen: str = "So.", rejected: str = "No.") -> Parts:
    return [user(prompt)], [assistant(chosen)], [assistant(rejected)]


def rows_repeated(repeats: ExactRepeats | NearRepeats, records: Sequence[Parts]) -> list[int | None]:
    found = [repeats.earlier(record, RowId("pairs.jsonl", row)) for row, record in enumerate(records, start=1)]
    return [row and row.row for row in found]


def test_exact_repeats_are_the_same_word_for_word() -> None:
    records = [parts(), parts("How?"), parts(), parts(chosen="so."), parts("How?")]
    assert rows_repeated(ExactRepeats(), records) == [None, None, 1, None, 2]
    with_system = ([system("Be brief."), user("Why?")], *parts()[1:])
    assert rows_repeated(ExactRepeats(), [parts(), with_system, with_system]) == [None, None, 2]


def test_near_repeats_have_every_part_alike() -> None:
    one = parts(text(1), text(2), text(3))
    # One word changed at the end: 55 of 57 runs of five in both. In the middle: 51 of 61.
    slightly = parts(changed(text(1), 59), changed(text(2), 30), text(3).upper() + "!")
    other_answer = parts(text(1), text(4), text(3))
    other_prompt = parts(text(5), text(2), text(3))
    # Two words changed: 46 of 66 runs in both.
    too_far = parts(text(1), changed(text(2), 20, 40), text(3))
    records = [one, slightly, other_answer, other_prompt, too_far, one]
    assert rows_repeated(NearRepeats(), records) == [None, 1, None, None, None, 1]


def test_short_parts_must_be_equal() -> None:
    records = [parts("Cats?"), parts("Dogs?"), parts("cats"), parts("?!"), parts("!?"), parts("?!")]
    assert rows_repeated(NearRepeats(), records) == [None, None, 1, None, None, 4]


def test_near_repeats_at_the_threshold_are_hardly_ever_missed() -> None:
    # 300 words with 7 changed have 261 of 331 runs in both, 0.79; with 6, 266 of 326, 0.82.
    places = [20 + 40 * number for number in range(7)]
    records = [(text(seed, 300), changed(text(seed, 300), *places[:6])) for seed in range(60)]
    missed, wrong = 0, 0
    for original, copy in records:
        missed += (
            rows_repeated(NearRepeats(), [parts(original, original, original), parts(copy, copy, copy)])[1] is None
        )
        further = changed(original, *places)
        wrong += rows_repeated(NearRepeats(), [parts(original), parts(further)])[1] is not None
    assert (missed, wrong) == (0, 0)


@pytest.mark.parametrize(
    "given, words",
    [
        ("Don't STOP, e.g. at 3.5!", ["don", "t", "stop", "e", "g", "at", "3", "5"]),
        ("猫が好き cats", [*"猫が好き", "cats"]),
    ],
)
def test_words(given: str, words: list[str]) -> None:
    assert words_of(given) == words


# ---- benchmarks -------------------------------------------------------------------------------------------------

QUESTION = "A train leaves at noon and runs at sixty miles an hour; when does it reach the town?"
SHORT = "What is the capital of Peru?"
TINY = "Say hello"
BENCHMARK = Contamination((text, RowId("test.jsonl", row)) for row, text in enumerate([QUESTION, SHORT, TINY], start=1))


@pytest.mark.parametrize(
    "record, row, words",
    [
        (parts(QUESTION), 1, "a train leaves at noon and runs at sixty miles an hour when"),
        (
            parts("Solve: " + QUESTION.upper().replace(";", " --")),
            1,
            "a train leaves at noon and runs at sixty miles an hour when",
        ),
        # The last thirteen words, in an answer.
        (
            parts(rejected="x " + " ".join(QUESTION.split()[-13:])),
            1,
            "and runs at sixty miles an hour when does it reach the town",
        ),
        (parts(chosen=" ".join(QUESTION.split()[:12]) + " y " + " ".join(QUESTION.split()[-4:])), None, ""),
        (parts("Tell me: what is the capital of Peru? And why?"), 2, "what is the capital of peru"),
        (parts("What is the capital of Chile?"), None, ""),
        (parts("What is the capital", "of Peru"), None, ""),
        (parts("Say hello!"), 3, "say hello"),
        (parts("Say hello to her"), None, ""),
        (parts("?!", "Yes.", "No."), None, ""),
    ],
)
def test_benchmark_texts_are_found_in_any_message(record: Parts, row: int | None, words: str) -> None:
    origin = RowId("pairs.jsonl", 7)
    expected = None if row is None else Match(origin, RowId("test.jsonl", row), words)
    assert BENCHMARK.find(record, origin) == expected


def test_without_texts_nothing_is_found() -> None:
    assert Contamination([]).find(parts(), RowId("pairs.jsonl", 1)) is None


# ---- questions in training data ----


def test_texts_that_stand_in_records() -> None:
    texts = [
        text(1, 40),  # held in the middle of an answer
        text(2, 40),  # held but for one word in the middle: 13 in a row are left at its end
        text(3, 20),  # held with a word changed so that 12 in a row are left
        "What do bees make in summer?",  # shorter, whole within a message
        "What do bees make?",  # too short to be looked for within one
        "Why so?",  # too short, and a whole message
        text(4, 40),
    ]
    records = [
        parts("Hello", f"Well, {text(1, 40)}, so it is.", changed(text(2, 40), 20)),
        parts("what do bees make in summer, tell me", changed(text(3, 20), 7), "why so"),
    ]
    assert overlapping(texts, records) == [True, True, False, True, False, True, False]
    assert overlapping(texts, []) == [False] * len(texts) and overlapping([], records) == []


def test_texts_that_share_words_are_all_found() -> None:
    passage = text(5, 30)
    assert overlapping([f"{passage} who", f"{passage} why", text(6)], [parts(passage)]) == [True, True, False]
