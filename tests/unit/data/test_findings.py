"""Findings say what is there, count it, name the rows, and can be read at 80 columns."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from data_samples import example, examples, pair
from transformers import PreTrainedTokenizerFast

from prefold.data import findings
from prefold.data.examples import Example
from prefold.data.findings import DataReport, Finding, SourceCount, TokenCounts
from prefold.data.preference import Preference, Problem, RowId
from prefold.recipe import Data, Source
from prefold.trees.packing import TokenTree

DATA = Data(train=[Source(path="pairs.jsonl")])
EMPTY = TokenCounts(0, 0, 0, 0, 0, 0)


def test_problems_are_counted_by_kind_with_the_first_rows() -> None:
    problems = [Problem("empty_text", "`chosen` is empty", RowId("pairs.jsonl", row)) for row in range(1, 226)]
    problems.insert(3, Problem("identical", "the same", RowId("pairs.jsonl", 99)))
    empty, identical = findings.about_problems(problems, DATA)
    assert (empty.kind, empty.severity, empty.count) == ("empty_text", "warning", 225)
    assert [row.row for row in empty.rows] == list(range(1, 201))
    assert empty.message == "225 rows left out: a text is empty"
    assert (identical.count, identical.rows) == (1, (RowId("pairs.jsonl", 99),))
    assert identical.message == "1 row left out: chosen and rejected are the same"


def test_the_advice_on_overlong_rows_is_not_the_policy_that_is_set_already() -> None:
    problems = [Problem("overlong", "too long", RowId("pairs.jsonl", 1))]
    truncating = DATA.model_copy(update={"overlong": "truncate_prompt"})
    assert "truncate_prompt" in findings.about_problems(problems, DATA)[0].advice
    assert "truncate_prompt" not in findings.about_problems(problems, truncating)[0].advice


def test_duplicates_are_the_rows_that_were_there_before() -> None:
    same_answers_other_prompt = example(4, prompt="How?")
    found = findings.duplicate(
        examples(example(1), example(2, chosen="Yes."), example(3), same_answers_other_prompt, example(5))
    )
    assert found is not None and (found.severity, found.count) == ("note", 2)
    assert [row.row for row in found.rows] == [3, 5]
    assert findings.duplicate(examples(example(1), example(2, chosen="Yes."))) is None


def test_prompts_in_both_splits_are_named_by_their_held_out_rows() -> None:
    train = examples(example(1, prompt="Why?"), example(2, prompt="How?"))
    held_out = examples(example(7, prompt="Who?"), example(8, prompt="How?", chosen="Otherwise."))
    found = findings.prompt_in_both_splits(train, held_out)
    assert found is not None and (found.severity, found.count, found.rows) == ("warning", 1, (RowId("pairs.jsonl", 8),))
    assert findings.prompt_in_both_splits(train, held_out[:1]) is None


@pytest.mark.parametrize(
    "number, message", [(0, "no held-out rows"), (1, "only 1 held-out row:"), (49, "only 49"), (50, None)]
)
def test_few_held_out_pairs(number: int, message: str | None) -> None:
    found = findings.small_held_out(examples(*map(example, range(number))))
    assert (found is None) == (message is None)
    if found is not None:
        assert found.message.startswith(message) and (found.severity, found.count) == ("warning", number)


@pytest.mark.parametrize(
    "chosen_longer, rejected_longer, ties, message",
    [
        (66, 34, 0, "chosen is the longer one in 66 % of the pairs, rejected in 34 %"),
        (65, 35, 0, None),
        (34, 66, 0, "chosen is the longer one in 34 % of the pairs, rejected in 66 %"),
        (35, 65, 0, None),
        (0, 0, 100, None),
        (34, 0, 66, "chosen is the longer one in 34 % of the pairs, rejected in 0 %"),
        (4, 0, 0, None),
        (10, 0, 0, "chosen is the longer one in 100 % of the pairs, rejected in 0 %"),
        (0, 0, 0, None),
    ],
)
def test_length_bias(chosen_longer: int, rejected_longer: int, ties: int, message: str | None) -> None:
    lengths = [(3, 2)] * chosen_longer + [(2, 3)] * rejected_longer + [(2, 2)] * ties
    found = findings.length_bias(findings.facts_of(examples(*(example(lengths=pair) for pair in lengths))))
    assert (found.message if found else None) == message
    if found is not None:
        assert (found.severity, found.count) == ("note", max(chosen_longer, rejected_longer))


def test_findings_are_ordered_by_severity_and_then_as_given() -> None:
    given = [
        Finding(str(place), severity, 1, (), "", "")
        for place, severity in enumerate(["note", "warning", "error", "note"])
    ]
    assert [finding.kind for finding in findings.by_severity(given)] == ["2", "1", "0", "3"]


def test_token_counts() -> None:
    # Packed: 4 + 3 + 2 and 6 + 1 + 5; plain: a second copy of each prompt.
    counts = findings.count_tokens(examples(example(1, lengths=(3, 2)), example(2, lengths=(1, 5), prompt_length=6)))
    assert counts == TokenCounts(trees=2, prompt=10, completions=11, packed=21, plain=31, longest=11)
    assert counts.as_json()["shared_share"] == 0.3226
    assert findings.count_tokens(examples()) == EMPTY and EMPTY.as_json()["shared_share"] == 0.0


def test_report_as_json() -> None:
    finding = Finding("identical", "warning", 1, (RowId("pairs.jsonl", 4),), "message", "advice")
    train = findings.count_tokens(examples(example(1)))
    report = DataReport((SourceCount("pairs.jsonl", "text", 2, 1),), (finding,), train, EMPTY)
    none = {"trees": 0, "prompt": 0, "completions": 0, "packed": 0, "plain": 0, "longest": 0, "shared_share": 0.0}
    assert report.as_json() == {
        "sources": [
            {
                "path": "pairs.jsonl",
                "shape": "text",
                "rows_in": 2,
                "rows_used": 1,
                "rows_filtered": 0,
                "rows_not_drawn": 0,
                "unused": [],
                "examples": 0,
            }
        ],
        "findings": [
            {
                "kind": "identical",
                "severity": "warning",
                "count": 1,
                "rows": [{"source": "pairs.jsonl", "row": 4}],
                "message": "message",
                "advice": "advice",
            }
        ],
        "tokens": {
            "train": {
                "trees": 1,
                "prompt": 4,
                "completions": 6,
                "packed": 10,
                "plain": 14,
                "longest": 7,
                "shared_share": 0.2857,
            },
            "held_out": none,
        },
        "contamination": [],
    }


def test_fingerprint_is_that_of_the_token_ids_in_order() -> None:
    one, other = example(1, lengths=(3, 2)), example(2, lengths=(2, 3))
    expected = hashlib.sha256(b"((0, 1, 2, 3), ((0, 1, 2), (0, 1)))").hexdigest()
    elsewhere = example(9, "Other text", lengths=(3, 2))
    assert findings.fingerprint(examples(one)) == expected == findings.fingerprint(examples(elsewhere))
    # The same ids in the same order, but the border between prompt and completion moved; and with context.
    sets = [[one, other], [other, one], [one], [other], [], [example(1, lengths=(3, 2), prompt_length=5)]]
    sets += [[replace(one, tree=replace(one.tree, context=context))] for context in ((((0, 1),), ()), (((1, 2),), ()))]
    assert len({findings.fingerprint(examples(*one_set)) for one_set in sets}) == len(sets)


# ---- pairs ------------------------------------------------------------------------------------------------------


def worded(row: int, chosen: tuple[int, ...], rejected: tuple[int, ...]) -> Example:
    return Example(pair(row=row), TokenTree((9, 9), (chosen, rejected)))


def test_pairs_that_are_there_both_ways_round_contradict_each_other() -> None:
    given = examples(worded(1, (1, 2), (3,)), worded(2, (3,), (1, 2)), worded(3, (1, 2), (4,)), worded(4, (1, 2), (3,)))
    found = findings.contradiction(findings.facts_of(given), given.origins)
    assert found is not None and (found.severity, [row.row for row in found.rows]) == ("warning", [1, 2, 4])
    assert findings.contradiction(findings.facts_of(given[1:3]), given.origins) is None


@pytest.mark.parametrize(
    "rejected_sure, chosen_sure, told", [(60, 0, True), (30, 0, True), (30, 15, False), (15, 0, False)]
)
def test_an_opening_that_gives_the_side_away(
    chatml: PreTrainedTokenizerFast, rejected_sure: int, chosen_sure: int, told: bool
) -> None:
    sure, plain = tuple(chatml.encode("Sure! It is")), tuple(chatml.encode("It is"))
    given = [
        worded(row, sure if row < chosen_sure else plain, sure if row < rejected_sure else plain) for row in range(100)
    ]
    # Other words on either side, so that the plain opening tells nothing.
    found = findings.telling_opening(findings.facts_of(examples(*given)), chatml)
    assert (found is not None) == told
    if found is not None:
        assert f"of the chosen and {rejected_sure} % of the rejected answers" in found.message or (
            f"{100 - rejected_sure} % of the rejected" in found.message
        )


def test_text_and_ratings_give_cause_for_findings() -> None:
    def kinds(preference: Preference) -> list[str]:
        return [problem.kind for problem in findings.oddities_of(preference)]

    assert kinds(pair()) == []
    assert kinds(pair("Why\x00?")) == kinds(pair(rejected="caf\ufffd")) == ["control_character"]
    assert kinds(pair("tabs\tand\r\nlines")) == []
    for residue in ("<|im_end|>", "</s>", "[INST] x", "<start_of_turn>", "<|eot_id|>"):
        assert kinds(pair(chosen=f"So.{residue}")) == ["template_residue"], residue
    assert kinds(pair("a < b | c > d, <b>bold</b>, [1], Human: no")) == []
    assert kinds(replace(pair(), ratings=(2.0, 7.0))) == ["flipped_rating"]
    assert kinds(replace(pair(), ratings=(7.0, 7.0))) == ["tied_rating"]
    assert kinds(replace(pair(), ratings=(7.0, 2.0))) == []


@pytest.mark.parametrize("kind", findings._ABOUT_ROWS)
def test_every_message_fits_80_columns(kind: str) -> None:
    [found] = findings.about_problems([Problem(kind, "", RowId("pairs.jsonl", row)) for row in range(1234)], DATA)
    assert found.kind == kind and found.message.startswith("1234 rows")
    assert max(len(found.message), len(found.advice)) <= 76


def test_messages_about_sets_fit_80_columns(chatml: PreTrainedTokenizerFast) -> None:
    twins = examples(*(example(row, lengths=(3, 2)) for row in range(29)))
    both_ways = examples(
        worded(1, (1, 2), (3,)), worded(2, (3,), (1, 2)), *(worded(3, (50,), (60,)) for _ in range(40))
    )
    given = ((twins, twins), (twins, examples()), (both_ways, twins))
    found = [finding for sets in given for finding in findings.about_sets(*sets, chatml)] + [findings.template_unused()]
    assert {finding.kind for finding in found} == {
        "contradiction",
        "duplicate",
        "length_bias",
        "prompt_in_both_splits",
        "small_held_out",
        "telling_opening",
        "template_unused",
    }
    for finding in found:
        assert max(len(finding.message), len(finding.advice)) <= 76, finding
