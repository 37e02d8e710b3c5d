"""Votes of people: a file that a crash leaves whole, and what it is as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast as Tokenizer

from prefold.data.mixture import load_split
from prefold.data.survey import describe_data
from prefold.data.vote_file import append_line, preference_for, read_votes
from prefold.errors import UserError
from prefold.recipe import Data

Line = dict[str, Any]


def vote(number: int, winner: str, voter: str = "Ann", turned: bool = False, **more: Any) -> Line:
    """On the answers `New n` and `Old n` to question n; `turned`: shown the other way round."""
    answers = (f"Old {number}.", f"New {number}.") if turned else (f"New {number}.", f"Old {number}.")
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    given = dict(zip(("answer_a", "answer_b"), answers, strict=True))
    return {"id": f"{voter}{number}{winner}", "voter": voter, "prompt": prompt, **given, "winner": winner, **more}


def write(path: Path, *lines: Line) -> Path:
    path.parent.mkdir(exist_ok=True)
    for line in lines:
        append_line(path, line)
    return path


LINES = (
    *[vote(number, "a") for number in range(3)],
    vote(3, "tie"),
    vote(4, "both bad"),
    *(vote(0, "b", "Bo", turned=True), vote(1, "a", "Bo", turned=True), vote(1, "tie", "Cy")),
    *(vote(5, "a"), {"undo": "Ann5a", "voter": "Ann"}),
    vote(2, "b"),
)
"""Of three people on six pairs of answers. On the first all agree; on the second Ann and Bo are of two minds, and Cy of
neither; on the third Ann thought again; of the last nothing is left."""


def test_a_file_of_votes_trains_by_its_path(chatml: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "votes.jsonl", *LINES, vote(6, "a"))
    data = Data(train=[{"path": str(path)}], eval=[{"path": str(path), "where": "winner == 'b'"}])
    prepared = load_split(data, chatml, seed=0)
    chosen = {record.prompt[0]["content"]: record.answers[0][0]["content"] for record in prepared.train.records}
    assert chosen == {"Question 0?": "New 0.", "Question 2?": "Old 2.", "Question 6?": "New 6."}
    assert [record.answers[0][0]["content"] for record in prepared.held_out.records] == ["Old 2."]
    source = prepared.report.sources[0]
    assert (source.shape, source.rows_in, source.rows_used, source.examples) == ("votes", 12, 3, 3)


def test_what_is_left_out_is_counted_by_row(tmp_path: Path) -> None:
    path = write(tmp_path / "votes.jsonl", *LINES, vote(2, "a", "Bo"), vote(2, "a", "Cy"), vote(7, "c"))
    facts = describe_data(str(path)).as_json()
    assert (facts["recognised_as"], facts["rows"], facts["rows_usable"]) == ("votes", 14, 2)
    found = {finding["kind"]: [row["row"] for row in finding["rows"]] for finding in facts["findings"]}
    assert found == {
        "tie": [2, 4, 5],
        "voted_again": [6, 7, 8, 12, 13],
        "voters_differ": [11],
        "withdrawn": [3, 9, 10],
        "bad_label": [14],
    }
    assert facts["votes"]["winner"] == {'"tie"': 2, '"a"': 2, '"both bad"': 1}


def test_votes_are_counted_by_voters_and_not_by_lines(tmp_path: Path) -> None:
    """One voter who votes three times on the same answers is one voter, in whatever order they were shown."""
    path = write(tmp_path / "votes.jsonl", vote(0, "a"), vote(0, "b", turned=True), vote(0, "a"), vote(0, "b", "Bo"))
    facts = describe_data(str(path)).as_json()
    assert facts["rows_usable"] == 0 and {finding["kind"] for finding in facts["findings"]} >= {"tie", "withdrawn"}


def test_votes_of_several_files_belong_together(tmp_path: Path) -> None:
    write(tmp_path / "votes" / "ann.jsonl", vote(0, "a"), vote(1, "a"))
    write(tmp_path / "votes" / "bo.jsonl", vote(0, "b", "Bo"), vote(1, "a", "Bo"))
    facts = describe_data(str(tmp_path / "votes")).as_json()
    assert facts["rows_usable"] == 1 and facts["first"][0]["row"] == {
        "source": facts["first"][0]["row"]["source"],
        "row": 2,
    }


def test_ties_alone_are_no_pairs(chatml: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "votes.jsonl", vote(0, "tie"), vote(1, "both bad"))
    with pytest.raises(UserError, match="no usable row is left of 2: 2 tie"):
        load_split(Data(train=[{"path": str(path)}], eval_fraction=0.5), chatml, seed=0)


@pytest.mark.parametrize("policy", ["drop", "error"])
def test_no_vote_is_a_bad_row_but_one_that_says_nothing(chatml: Tokenizer, tmp_path: Path, policy: str) -> None:
    path = write(tmp_path / "votes.jsonl", *LINES, vote(6, "a"))
    data = Data(train=[{"path": str(path)}], eval_fraction=0.5, bad_rows=policy)
    prepared = load_split(data, chatml, seed=0)
    assert len(prepared.train) + len(prepared.held_out) == 3
    write(path, vote(7, "c"))
    if policy == "error":
        with pytest.raises(UserError, match=r"`winner` is `c`, not one of a, b, tie, both bad"):
            load_split(data, chatml, seed=0)


def test_rows_that_are_no_votes_are_read_as_they_are(tmp_path: Path) -> None:
    """Such as those of an arena, each of which is a row of its own."""
    path = tmp_path / "arena.jsonl"
    row = {"prompt": "Why?", "answer_a": "So.", "answer_b": "No.", "winner": "a"}
    path.write_text(f"{json.dumps(row)}\n" * 3)
    assert describe_data(str(path)).as_json()["rows_usable"] == 3


# ---- the file ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 40, 3000])
def test_a_line_that_a_crash_tore_is_tolerated_and_mended(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "votes.jsonl", vote(0, "a"), vote(1, "a", note="ü" * 5000))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    # What lacks nothing but the end of its line is a vote.
    assert [vote["winner"] for vote in read_votes(path)] == ["a"] * (2 if cut == 1 else 1)
    write(path, vote(2, "b"))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["Ann0a", "Ann1a", "Ann2b"] if cut == 1 else ["Ann0a", "Ann2b"]
    assert path.read_bytes().startswith(whole[: whole.index(b"\n") + 1])


def test_half_a_character_does_not_break_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "votes.jsonl", vote(0, "a", note="\ud800 \u2028\n"), vote(1, "a"))
    assert [vote.get("note") for vote in read_votes(path)] == ["\ud800 \u2028\n", None]


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"votes.jsonl: cannot be written \(Is a directory\)"):
        (tmp_path / "votes.jsonl").mkdir()
        append_line(tmp_path / "votes.jsonl", vote(0, "a"))


def test_what_counts(tmp_path: Path) -> None:
    votes = read_votes(write(tmp_path / "votes.jsonl", *LINES, {"odd": 1}, vote(8, "c"), vote(8, "a", "  ")))
    assert [vote["id"] for vote in votes] == [
        *("Ann0a", "Ann1a", "Ann3tie", "Ann4both bad", "Bo0b", "Bo1a", "Cy1tie", "Ann2b"),
    ]
    assert [preference_for(f"New {number}.", votes[at]) for at, number in ((4, 0), (5, 1), (6, 1), (7, 2))] == [
        *(1.0, 0.0, 0.5, 0.0),
    ]
    assert read_votes(tmp_path / "none.jsonl") == []


def test_undoing_brings_the_earlier_vote_back(tmp_path: Path) -> None:
    path = write(tmp_path / "votes.jsonl", vote(0, "a"), vote(0, "b"), {"undo": "Ann0b", "voter": "Ann"})
    assert [vote["winner"] for vote in read_votes(path)] == ["a"]
