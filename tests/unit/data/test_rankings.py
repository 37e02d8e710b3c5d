"""Rows that rank several answers become pairs by a stated rule; what is left out is counted with its cause."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from data_samples import assistant, text_rows, user
from ranking_layouts import CASES, Case, arena, nectar, nemo, reply, stack_exchange, summaries, tree, ultrafeedback
from transformers import PreTrainedTokenizerFast

from prefold.data.conversion import to_records
from prefold.data.formats import RawRow
from prefold.data.layouts import Rule
from prefold.data.mixture import Prepared, load_split
from prefold.data.preference import Preference, Problem, Prompt, Record, RowId, Unpaired
from prefold.data.rankings import with_rule
from prefold.data.shapes import KINDS, Kind, find_shape
from prefold.errors import UserError
from prefold.recipe import Benchmark, Data, Source, Values

Write = Callable[..., str]


def records(
    *values: dict[str, Any],
    rule: Rule | None = None,
    columns: dict[str, str] | None = None,
    kinds: tuple[Kind, ...] = ("pairs",),
) -> list[Record | Problem]:
    rows = [RawRow(RowId("rows.jsonl", number), value) for number, value in enumerate(values, start=1)]
    shape = replace(find_shape(rows, "rows.jsonl", columns, kinds), rule=rule or Rule())
    return [record for row in rows for record in to_records(row, shape)]


def texts(made: list[Record | Problem]) -> list[Any]:
    """(chosen, rejected) of pairs, (answer, label) of unpaired answers, the kind of problems."""
    return [
        (record.chosen[0]["content"], record.rejected[0]["content"])
        if isinstance(record, Preference)
        else (record.completion[0]["content"], record.label)
        if isinstance(record, Unpaired)
        else record.kind
        if isinstance(record, Problem)
        else record.prompt[-1]["content"]
        for record in made
    ]


def refused(
    *values: dict[str, Any], columns: dict[str, str] | None = None, kinds: tuple[Kind, ...] = ("pairs",)
) -> str:
    with pytest.raises(UserError) as caught:
        records(*values, columns=columns, kinds=kinds)
    return str(caught.value)


# ---- layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_layouts(case: Case) -> None:
    rows = [RawRow(RowId("rows.jsonl", number), value) for number, value in enumerate(case.rows, start=1)]
    shape = find_shape(rows, "rows.jsonl", case.columns, ("pairs",))
    assert shape.name == case.layout
    made = [record for row in rows for record in to_records(row, shape)]
    expected = [
        Preference(
            (user(prompt),) if isinstance(prompt, str) else tuple(prompt),
            (assistant(chosen),) if isinstance(chosen, str) else tuple(chosen),
            (assistant(rejected),) if isinstance(rejected, str) else tuple(rejected),
            RowId("", 0),
            ratings,
        )
        for prompt, chosen, rejected, ratings in case.pairs
    ]
    assert not [record for record in made if isinstance(record, Problem)]
    assert [(vars(record) | {"origin": None}) for record in made] == [
        vars(pair) | {"origin": None} for pair in expected
    ]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_prompts_of_rankings(case: Case) -> None:
    """A method that needs prompts alone takes those of rankings."""
    named = "input" if "input" in case.rows[0] and "instruction" not in case.rows[0] else case.columns.get("prompt")
    named = "prompt" if case.name == "Nectar" else named  # its `source` is a list of texts as well
    made = records(*case.rows, columns={"prompt": named} if named else None, kinds=("prompts",))
    prompts = [(user(prompt),) if isinstance(prompt, str) else tuple(prompt) for prompt, *_ in case.pairs]
    # A row of several pairs has its prompt once.
    expected = [
        prompt
        for number, prompt in enumerate(prompts)
        if case.rows[0] in case.rows[1:] or prompt not in prompts[:number]
    ]
    assert [record.prompt for record in made if isinstance(record, Prompt)] == expected


# ---- rules ------------------------------------------------------------------------------------------------------

FOUR = {"prompt": "Why?", "responses": ["a", "b", "c", "d"], "scores": [2, 5, 2, 4]}


@pytest.mark.parametrize(
    "pairs_from, min_margin, expected",
    [
        (None, None, [("b", "a")]),
        ("best_worst", None, [("b", "a")]),
        ("adjacent", None, [("b", "d"), ("d", "a")]),
        ("all", None, [("b", "d"), ("b", "a"), ("b", "c"), ("d", "a"), ("d", "c")]),
        ("all", 2, [("b", "a"), ("b", "c"), ("d", "a"), ("d", "c")]),
        ("adjacent", 2, [("d", "a")]),
        ("best_worst", 3, [("b", "a")]),
        ("best_worst", 3.5, ["small_margin"]),
    ],
)
def test_pairs_are_made_by_the_rule(pairs_from: Any, min_margin: float | None, expected: list[Any]) -> None:
    assert texts(records(FOUR, rule=Rule(pairs_from, min_margin))) == expected


def test_a_margin_is_not_lost_to_rounding() -> None:
    row = {"prompt": "Why?", "responses": ["a", "b"], "scores": [4.3, 4.0]}
    assert texts(records(row, rule=Rule(min_margin=0.3))) == [("a", "b")]


def test_ranks_count_as_ratings() -> None:
    row = nectar("Why?", ("c", 3), ("a", 1), ("b", 2))
    assert texts(records(row, rule=Rule("all", 2))) == [("a", "c")]
    assert records(row)[0].ratings == (-1.0, -3.0)  # type: ignore[union-attr]


def test_each_chosen_against_each_rejected_unless_a_rule_is_given() -> None:
    row = {"prompt": "Why?", "chosen": ["a", "b"], "rejected": ["c", "d"]}
    assert texts(records(row)) == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    assert texts(records(row, rule=Rule("best_worst"))) == [("a", "c")]


def test_the_best_is_desirable_and_the_worst_undesirable() -> None:
    assert texts(records(FOUR, rule=Rule(unpaired=True))) == [("b", True), ("a", False)]
    row = {"prompt": "Why?", "chosen": ["a", "b"], "rejected": ["c", "d"]}
    expected = [("a", True), ("c", False), ("d", False), ("b", True)]
    assert texts(records(row, rule=Rule(unpaired=True))) == expected
    assert texts(records({**FOUR, "scores": [1, 1, 1, 1]}, rule=Rule(unpaired=True))) == ["tie"]


# ---- single rows that cannot be used whole -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, expected",
    [
        (ultrafeedback("Why?", ("a", 1), ("b", 1)), ["tie"]),
        (ultrafeedback("Why?", ("a", 1)), ["missing_field"]),
        (ultrafeedback("Why?"), ["empty_text"]),
        (ultrafeedback("Why?", ("a", 3), (" ", 1), ("c", 2)), [("a", "c"), "empty_text"]),
        (ultrafeedback("Why?", ("a", 3), (" ", 1)), ["empty_text"]),
        (ultrafeedback("Why?", ("a", 3), ("a ", 1)), ["identical"]),
        (ultrafeedback("", ("a", 3), ("b", 1)), ["empty_text"]),
        ({"instruction": "Why?", "completions": None}, ["null_field"]),
        ({"instruction": "Why?"}, ["missing_field"]),
        ({"instruction": "Why?", "completions": ["a"]}, ["bad_message"]),
        ({"instruction": "Why?", "completions": [{"response": "a", "overall_score": "N/A"}] * 2}, ["bad_label"]),
        ({"instruction": "Why?", "completions": [{"response": "a", "overall_score": None}] * 2}, ["missing_field"]),
        (
            {
                "instruction": "Why?",
                "completions": [{"response": t, "overall_score": s} for t, s in zip("abc", (1, 3, None), strict=True)],
            },
            [("b", "a"), "bad_label"],
        ),
        (
            {"instruction": "Why?", "completions": [{"response": "a", "overall_score": True}] * 2},
            ["bad_label"],
        ),
    ],
)
def test_rows_of_a_list_of_objects(row: dict[str, Any], expected: list[Any]) -> None:
    good = ultrafeedback("How?", ("x", 2.0), ("y", 1.0))
    assert texts(records(good, row)) == [("x", "y"), *expected]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "Why?", "responses": ["a", "b"], "scores": [1]}, ["missing_field"]),
        ({"prompt": "Why?", "responses": ["a", "b"], "scores": ["x", "y"]}, ["bad_label"]),
        ({"prompt": "Why?", "responses": ["a", "b"], "scores": None}, ["null_field"]),
        ({"prompt": "Why?", "responses": ["a", None, "c"], "scores": [3, 2, 1]}, [("a", "c"), "not_text"]),
        ({"prompt": "Why?", "responses": ["a", "b", "c"], "scores": [3, None, 1]}, [("a", "c"), "bad_label"]),
        ({"prompt": "Why?", "responses": ["a", "b"], "scores": [float("nan"), float("inf")]}, ["bad_label"]),
        ({"prompt": "Why?", "responses": ["a", ["b"]], "scores": [2, 1]}, ["bad_message"]),
        ({"prompt": 5, "responses": ["a", "b"], "scores": [2, 1]}, ["not_text"]),
    ],
)
def test_rows_of_lists(row: dict[str, Any], expected: list[Any]) -> None:
    assert texts(records(FOUR, row)) == [("b", "a"), *expected]


@pytest.mark.parametrize(
    "row, expected",
    [
        (tree("Why?", reply("a", "assistant", None), reply("b", "assistant", None)), ["missing_field"]),
        (tree("Why?"), ["missing_field"]),
        (tree("Why?", reply("a", "assistant", 0), reply("b", "assistant", 0)), ["tie"]),
        (tree("Why?", reply("a", "assistant", 0), {"text": "b", "role": "assistant", "rank": "best"}), ["bad_label"]),
        (
            tree("Why?", reply("a", "assistant", 0), reply("b", "assistant", 1), reply(" ", "assistant", 2)),
            [("a", "b"), "empty_text"],
        ),
        (tree(" ", reply("a", "assistant", 0), reply("b", "assistant", 1)), ["empty_text"]),
        (tree("Why?", reply("a", "narrator", 0, reply("x", "prompter", 0))), ["bad_message"]),
        (tree("Why?", reply("a", [], 0, reply("x", "prompter", 0))), ["bad_message"]),  # type: ignore[arg-type]
        (tree("Why?", reply("a", "assistant", 0), reply("b", "assistant", 1), None), ["bad_message"]),  # type: ignore[arg-type]
        ({"prompt": "Why?"}, ["bad_message"]),
        ({"prompt": {"text": "Why?", "replies": [1, {"replies": 5}]}}, ["bad_message"]),
    ],
)
def test_rows_of_trees(row: dict[str, Any], expected: list[Any]) -> None:
    good = tree("How?", reply("x", "assistant", 0), reply("y", "assistant", 1))
    assert texts(records(good, row)) == [("x", "y"), *expected]


def test_a_deep_tree_is_no_crash() -> None:
    row = reply("end", "assistant", 0)
    for number in range(5000):
        row = reply("x", "assistant" if number % 2 else "prompter", 0, row)
    assert texts(records(tree("How?", reply("x", "assistant", 0, row), reply("y", "assistant", 1)))) == [("x", "y")]


def test_part_of_a_tree_is_used_where_another_part_cannot_be() -> None:
    tied = reply("And?", "prompter", 0, reply("c", "assistant", 0), reply("d", "assistant", 0))
    row = tree("Why?", reply("a", "assistant", 0, tied), reply("b", "assistant", 1))
    assert texts(records(row)) == [("a", "b"), "tie"]


@pytest.mark.parametrize("winner", ["tie", "tie (bothbad)", "both_bad"])
def test_a_contest_without_a_winner_is_a_tie(winner: str) -> None:
    both = ([user("Why?"), assistant("a")], [user("Why?"), assistant("b")])
    assert texts(records(arena(*both, "model_a"), arena(*both, winner))) == [("a", "b"), "tie"]


def test_contests_that_cannot_be_used() -> None:
    both = ([user("Why?"), assistant("a")], [user("Why?"), assistant("b")])
    others = [
        arena(both[0], [user("How?"), assistant("b")], "model_a"),
        arena(both[0], both[0], "model_a"),
        arena(both[0], [], "model_a"),
    ]
    assert "`winner` holds model_a (1 row), vicuna (1)" in refused(arena(*both, "model_a"), arena(*both, "vicuna"))
    expected = [("a", "b"), "bad_message", "identical", "empty_text"]
    assert texts(records(arena(*both, "model_a"), *others)) == expected


def test_a_choice_beyond_the_answers_of_a_later_row_is_left_out() -> None:
    rows = [summaries("Post.", number % 2, "a", "b") for number in range(1100)]
    shape = find_shape([RawRow(RowId("rows.jsonl", 1), row) for row in rows], "rows.jsonl", None, ("pairs",))
    bad = RawRow(RowId("rows.jsonl", 1101), summaries("Post.", 2, "a", "b"))
    assert texts(to_records(bad, shape)) == ["bad_label"]


JUNK = [
    None,
    "",
    " ",
    "text",
    "\ud83d",
    0,
    -1,
    10**400,
    1.5,
    float("nan"),
    True,
    [],
    [None],
    [[]],
    {},
    {"text": 3},
    "[1",
]


def exchanged(value: Any, source: random.Random) -> Any:
    """The value with a part of it exchanged for anything else, or gone."""
    if not isinstance(value, dict | list) or not value or source.random() < 0.2:
        return source.choice(JUNK)
    at = source.choice([*value] if isinstance(value, dict) else range(len(value)))
    changed = value.copy()
    changed[at] = exchanged(value[at], source)
    if source.random() < 0.1:
        del changed[at]
    return changed


def test_whatever_is_in_a_ranking_nothing_crashes() -> None:
    source = random.Random(7)
    kinds: set[str] = set()
    for _ in range(800):
        case = source.choice(CASES)
        rows = [RawRow(RowId("rows.jsonl", number), value) for number, value in enumerate(case.rows, start=1)]
        shape = find_shape(rows, "rows.jsonl", case.columns, ("pairs",))
        bad = RawRow(RowId("rows.jsonl", 9), exchanged(source.choice(case.rows), source) or {})
        rule = Rule(source.choice(["all", "adjacent", None]), source.choice([None, 2.0]), source.random() < 0.3)
        for record in to_records(bad if isinstance(bad.value, dict) else rows[0], replace(shape, rule=rule)):
            kinds.add(record.kind if isinstance(record, Problem) else type(record).__name__)
            assert not isinstance(record, Problem) or record.message.encode()
        try:
            find_shape(
                [bad] if isinstance(bad.value, dict) else rows, "rows.jsonl", case.columns, ("pairs", "unpaired")
            )
        except UserError as error:
            assert str(error).encode()
    assert {"Preference", "Unpaired", "bad_label", "missing_field", "null_field", "empty_text", "not_text"} <= kinds


# ---- what is refused --------------------------------------------------------------------------------------------


def with_two_scores(*scores: tuple[float, float]) -> dict[str, Any]:
    items = [{"response": str(n), "fine-grained_score": a, "overall_score": b} for n, (a, b) in enumerate(scores)]
    return {"instruction": "Why?", "completions": items}


def test_two_scores_that_order_answers_differently_are_refused() -> None:
    rows = [with_two_scores((3.0, 7.0), (2.0, 5.0)), with_two_scores((3.0, 5.0), (2.0, 7.0))]
    message = refused(*rows)
    assert (
        "`overall_score` and `fine-grained_score` order the answers in `completions` differently (1 of 2 rows)"
        in message
    )
    assert "`columns: {rating: overall_score}`" in message
    assert texts(records(*rows, columns={"rating": "fine-grained_score"})) == [("0", "1")] * 2
    assert texts(records(*rows, columns={"rating": "overall_score"})) == [("0", "1"), ("1", "0")]


def test_a_named_rating_that_is_not_there_is_refused() -> None:
    message = refused(with_two_scores((3.0, 7.0), (2.0, 5.0)), columns={"rating": "helpfulness"})
    assert "the answers in `completions` have no `helpfulness`, but numbers in `fine-grained_score`" in message


def test_ratings_of_a_csv_file_are_read_from_text() -> None:
    row = {"prompt": "Why?", "responses": '["a", "b"]', "scores": "[1, 2]"}
    assert texts(records(row, row)) == [("b", "a")] * 2
    message = refused(row, {**row, "responses": "[a, b"})
    assert "`responses` holds lists as text in 1 row, and other text in 1" in message


def test_each_answer_by_its_own_rating() -> None:
    """With `values` each answer is wanted or not by the number that the file has, a rank as well as a rating."""
    rule = Rule(unpaired=True, values=Values(desirable=">= 4", undesirable="<= 2"))
    assert texts(records(FOUR, rule=rule)) == [("a", False), ("b", True), ("c", False), ("d", True)]
    assert texts(records({**FOUR, "scores": [3, 3, 3, 3]}, rule=rule)) == ["tie"]
    ranked = Rule(unpaired=True, values=Values(desirable=1, undesirable=">= 3"))
    assert texts(records(nectar("Why?", ("c", 3), ("a", 1), ("b", 2)), rule=ranked)) == [("c", False), ("a", True)]


def test_values_of_a_source_reach_its_answers(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    path = write("rows.jsonl", [FOUR, {**FOUR, "prompt": "How?", "scores": [3, 3, 3, 3]}])
    data = Data(train=[Source(path=path, values=Values(desirable=">= 4", undesirable="<= 2"))])
    prepared = load_split(data, chatml, seed=1, kind="unpaired")
    assert texts(list(prepared.train.records)) == [("a", False), ("b", True), ("c", False), ("d", True)]
    assert found(prepared)["tie"] == ("note", 1, [2])
    with pytest.raises(UserError, match="`values`: the method needs pairs"):
        load_split(data, chatml, seed=1)


def test_two_scores_that_agree_are_one_ranking() -> None:
    """The ratings are those of `overall_score`; a later row where they disagree is left out."""
    made = records(with_two_scores((3.0, 7.0), (2.0, 5.0), (2.5, 5.0)))
    assert texts(made) == [("0", "1")] and made[0].ratings == (7.0, 5.0)  # type: ignore[union-attr]
    good = RawRow(RowId("rows.jsonl", 1), with_two_scores((3.0, 7.0), (2.0, 5.0)))
    shape = find_shape([good], "rows.jsonl", None, ("pairs",))
    assert texts(to_records(RawRow(RowId("rows.jsonl", 2), with_two_scores((3.0, 5.0), (2.0, 7.0))), shape)) == [
        "bad_label"
    ]


@pytest.mark.parametrize(
    "row, expected",
    [
        (
            {"prompt": "Why?", "answers": [{"text": "a", "quality": 0}, {"text": "b", "quality": 2}]},
            [
                "no rating or rank that is known by its name, but numbers in `quality`",
                "{rating: quality}",
                "{rank: quality}",
            ],
        ),
        (
            {"prompt": "Why?", "answers": [{"text": "a", "toxicity_score": 1}, {"text": "b", "toxicity_score": 2}]},
            ["numbers in `toxicity_score`"],
        ),
        ({"prompt": "Why?", "answers": [{"text": "a"}, {"text": "b"}]}, ["no rating or rank"]),
        (
            {"prompt": "Why?", "answers": [{"text": "a", "answer": "b", "rank": 1}] * 2},
            ["the answers in `answers` have `answer`, `text`", "columns: {answer: text}"],
        ),
        ({"prompt": "Why?", "answers": [{"body": "a", "rank": 1}] * 2}, ["have none of `answer`", "{answer: ...}"]),
        (
            {"prompt": "Why?", "responses": ["a", "b"]},
            ["with a list `scores`", "`responses` is a list that does not fit"],
        ),
        ({"prompt": "Why?", "responses": ["a", "b"], "scores": [1, 2], "rewards": [2, 1]}, ["in more than one way"]),
        (
            {"instruction": "Why?", "output": ["a", "b", "c"]},
            ["nearest is better and worse", "`output` is a list that does not fit"],
        ),
        (summaries("Post.", 1, "a", "b"), ["`choice` holds no 0: where does it count from?"]),
        (summaries("Post.", 2, "a", "b"), ["`choice` holds 2, beyond its answers"]),
        (
            {"message_id": "m", "parent_id": None, "text": "Why?", "role": "prompter", "rank": None},
            ["message of a tree", "ready.trees.jsonl"],
        ),
        (
            {"prompt": "Why?", "response": "So.", "helpfulness": 4, "correctness": 4, "coherence": 4, "verbosity": 2},
            ["rates a single answer", "prompt, chosen, rejected"],
        ),
        ({"prompt": "Why?", "completions": ["a", "b"], "labels": [True, False]}, ["stepwise supervision"]),
    ],
)
def test_what_is_not_sure_is_refused(row: dict[str, Any], expected: list[str]) -> None:
    message = refused(row)
    assert all(text in message for text in expected), message


@pytest.mark.parametrize(
    "settings, kind, rows, expected",
    [
        ({"pairs_from": "all"}, "pairs", text_rows(2), "its rows are text: no ranking"),
        ({"min_margin": 1}, "pairs", text_rows(2), "its rows are text: no ranking"),
        ({"pairs_from": "all"}, "unpaired", [FOUR, FOUR], "the method takes single answers"),
        ({"pairs_from": "adjacent"}, "unpaired", [FOUR, FOUR], "the method takes single answers"),
        ({"pairs_from": "all"}, "prompts", [FOUR, FOUR], "needs prompts alone"),
        ({"min_margin": 1}, "pairs", [{"prompt": "Why?", "output": ["a", "b"]}], "without ratings"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(
    settings: dict[str, Any], kind: Kind, rows: list[dict[str, Any]], expected: str, write: Write, chatml: Any
) -> None:
    data = Data(train=[Source(path=write("rows.jsonl", rows), **settings)])
    with pytest.raises(UserError, match=expected):
        load_split(data, chatml, seed=1, kind=kind)


# ---- counts -----------------------------------------------------------------------------------------------------


def found(prepared: Prepared) -> dict[str, tuple[str, int, list[int]]]:
    return {f.kind: (f.severity, f.count, [row.row for row in f.rows]) for f in prepared.report.findings}


def test_every_row_is_used_filtered_not_drawn_or_left_out(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    rows = [{**FOUR, "prompt": f"Question {number}", "n": number} for number in range(8)]
    rows[1]["responses"] = ["a", "b" * 300, "c", "d"]  # four of five pairs are overlong
    rows[2]["responses"] = ["a", "b", "c", " "]
    rows[3]["responses"] = ["b", "b", "c", "d"]  # one pair is of equal answers
    rows[4]["scores"] = [1, 1, 1, 1]
    rows[5]["responses"] = ["x" * 300] * 4
    source = Source(path=write("rows.jsonl", rows), where="n > 0", pairs_from="all", count=6)
    prepared = load_split(Data(train=[source], max_length=200, duplicates="drop_exact"), chatml, seed=1)
    (counts,) = prepared.report.sources
    about = found(prepared)
    left_out = sum(about[kind][1] for kind in ("tie", "identical") if kind in about)
    assert counts.rows_in == 8 == counts.rows_used + counts.rows_filtered + counts.rows_not_drawn + left_out
    assert (counts.rows_filtered, counts.rows_not_drawn) == (1, 1)
    assert counts.examples == len(prepared.train)
    assert about["left_out_in_part"][0] == "warning"


def test_what_is_left_out_of_a_row_in_part_is_a_finding_with_its_causes(write: Write, chatml: Any) -> None:
    rows = [
        FOUR,
        {**FOUR, "prompt": "How?", "responses": ["a", "b" * 300, " ", "d"]},  # b-d, b-a overlong; d-a is left
        {**FOUR, "prompt": "Who?", "responses": ["d", "b", "c", "d"]},  # d-a are the same
    ]
    data = Data(train=[Source(path=write("rows.jsonl", rows), pairs_from="all")], max_length=200)
    prepared = load_split(data, chatml, seed=1)
    (counts,) = prepared.report.sources
    assert (counts.rows_in, counts.rows_used, counts.examples) == (3, 3, 5 + 1 + 4)
    assert found(prepared)["left_out_in_part"] == ("warning", 4, [2, 3])
    (finding,) = [finding for finding in prepared.report.findings if finding.kind == "left_out_in_part"]
    assert (
        finding.message == "4 answers or pairs left out of rows used otherwise: 2 overlong, 1 empty_text, 1 identical"
    )
    with pytest.raises(UserError, match=r"rows\.jsonl, row 2: \d+ tokens"):
        load_split(data.model_copy(update={"overlong": "error"}), chatml, seed=1)
    with pytest.raises(UserError, match=r"rows\.jsonl, row 2: `responses`, answer 3 is empty"):
        load_split(data.model_copy(update={"bad_rows": "error"}), chatml, seed=1)


def test_rows_without_a_wide_pair_are_no_fault(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    rows = [FOUR, {**FOUR, "scores": [1, 2, 1, 2]}, {**FOUR, "scores": [1, 1, 1, 1]}]
    source = Source(path=write("rows.jsonl", rows), min_margin=3)
    prepared = load_split(Data(train=[source], bad_rows="error"), chatml, seed=1)
    assert found(prepared)["small_margin"] == ("note", 1, [2])
    assert found(prepared)["tie"] == ("note", 1, [3])


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "prompts"])
def test_the_same_examples_in_the_same_order(kind: Kind, write: Write, chatml: PreTrainedTokenizerFast) -> None:
    rows = [{**FOUR, "prompt": f"Question {number}"} for number in range(300)]
    data = Data(train=[Source(path=write("rows.jsonl", rows))])
    first, second = (load_split(data, chatml, seed=1, kind=kind) for _ in range(2))
    assert first.train == second.train and first.fingerprints == second.fingerprints
    assert [origin.row for origin in first.train.origins] == [
        row for row in range(1, 301) for _ in range(2 if kind == "unpaired" else 1)
    ]
    (counts,) = first.report.sources
    assert (counts.rows_used, counts.examples) == (300, 600 if kind == "unpaired" else 300)


def test_a_benchmark_text_in_a_prompt_is_listed_once(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    benchmark = write("test.jsonl", [{"question": "What is the answer to this very long question"}])
    rows = [FOUR, {**FOUR, "prompt": "What is the answer to this very long question"}]
    source = Source(path=write("rows.jsonl", rows), pairs_from="all")
    data = Data(train=[source], decontaminate=[Benchmark(path=benchmark, column="question")])
    prepared = load_split(data, chatml, seed=1)
    assert found(prepared)["contaminated"] == ("warning", 1, [2]) and len(prepared.report.contamination) == 1


def test_a_source_of_pairs_needs_no_rule() -> None:
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    shape = find_shape([RawRow(RowId("x.jsonl", 1), row)], "x.jsonl")
    assert with_rule(shape, Source(path="x.jsonl"), "x.jsonl", "pairs") == shape
    assert {*KINDS} == {"pairs", "unpaired", "prompts"}


def test_nemo_takes_several_ranks_and_stack_exchange_its_scores() -> None:
    """All pairs of three ranked completions, and of three scored answers."""
    assert texts(records(nemo([user("Why?")], ("a", 0), ("b", 1), ("c", 2)), rule=Rule("all"))) == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    assert texts(records(stack_exchange("Why?", ("a", 3), ("b", 3), ("c", 0)), rule=Rule("adjacent"))) == [("b", "c")]


def test_what_the_user_says_between_turns_of_a_contest_is_context(
    write: Write, chatml: PreTrainedTokenizerFast
) -> None:
    rows = [
        arena(
            [user(f"Hi {n}"), assistant("Hello"), user("Why?"), assistant("So.")],
            [user(f"Hi {n}"), assistant("Hi!"), user("Why?"), assistant("No.")],
            "model_b",
        )
        for n in range(3)
    ]
    data = Data(train=[Source(path=write("rows.jsonl", rows))])
    for kind, sides in (("pairs", [("Hi!", "No."), ("Hello", "So.")]), ("unpaired", [("Hi!", "No.")])):
        tree = load_split(data, chatml, seed=1, kind=kind).train[0].tree  # type: ignore[arg-type]
        for completion, spans, (first, last) in zip(tree.completions, tree.context, sides, strict=True):
            [(start, stop)] = spans
            assert chatml.decode(completion[:start]) == f"{first}<|im_end|>\n"
            assert chatml.decode(completion[start:stop]) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
            assert chatml.decode(completion[stop:]) == f"{last}<|im_end|>\n"
