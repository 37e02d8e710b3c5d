"""A source alone: its layout, its columns, what is made of its rows, and what it can be used for."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_samples import assistant, text_rows, user

from prefold.algorithms import ALGORITHMS
from prefold.data.survey import METHODS, describe_data
from prefold.errors import UserError
from prefold.recipe import Source, make_section
from prefold.reports.survey import print_survey
from prefold.terminal import as_text

Write = Callable[..., str]
ROW = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


def test_pairs(write: Write) -> None:
    path = write("pairs.jsonl", [ROW | {"id": 1, "chosen": "So.</s>"}, ROW | {"rejected": None}, *text_rows(3)])
    facts = describe_data(path).as_json()
    assert (facts["recognised_as"], facts["kind"], facts["refused"]) == ("text", "pairs", None)
    assert (facts["rows"], facts["rows_usable"]) == (5, 4)
    roles = {name: column["role"] for name, column in facts["columns"].items()}
    assert roles == {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "id": None}
    assert facts["columns"]["rejected"]["holds"] == {"text": 4, "null": 1}
    assert facts["columns"]["id"] == {"holds": {"number": 1}, "role": None, "example": 1}
    assert {finding["kind"]: [row["row"] for row in finding["rows"]] for finding in facts["findings"]} == {
        "null_field": [2],
        "template_residue": [1],
    }
    assert facts["first"][0]["prompt"] == [user("Why?")] and facts["first"][0]["chosen"] == [assistant("So.</s>")]
    assert [first["row"]["row"] for first in facts["first"]] == [1, 3, 4]
    assert {kind: bool(use) for kind, use in facts["uses"].items()} == {
        "pairs": True,
        "unpaired": True,
        "prompts": True,
    }


def test_votes_with_their_counts(write: Write) -> None:
    votes = {"instruction": "Why?", "output_1": "So.", "output_2": "No.", "annotator1": 1, "annotator2": 2}
    rows = [votes, votes | {"annotator2": 1}, votes | {"annotator1": None}]
    facts = describe_data(write("votes.jsonl", rows)).as_json()
    assert facts["votes"] == {"annotator1": {"1": 2, "null": 1}, "annotator2": {"2": 2, "1": 1}}
    assert facts["columns"]["annotator2"]["role"] == "vote"
    assert [finding["kind"] for finding in facts["findings"]] == ["tie"]
    assert "annotator1: 1 in 2 rows, null in 1 row" in as_text(lambda console: print_survey(facts, console))


def test_answers_with_a_label_and_prompts(write: Write) -> None:
    facts = describe_data(write("a.jsonl", [{"prompt": "Why?", "completion": "So.", "label": True}] * 3)).as_json()
    assert facts["kind"] == "unpaired" and facts["votes"] == {"label": {"true": 3}}
    assert facts["uses"]["pairs"] is None and facts["uses"]["unpaired"]["methods"] == ("kto",)
    assert facts["first"][0]["completion"] == [assistant("So.")] and facts["first"][0]["label"] is True
    facts = describe_data(write("b.jsonl", [{"question": "Why?", "answer": "42"}] * 3)).as_json()
    assert facts["kind"] == "prompts" and [bool(use) for use in facts["uses"].values()] == [False, False, True]


def test_the_section_is_the_source_that_was_read(write: Write) -> None:
    path = write(
        "pairs.jsonl", [{"frage": "Why?", "chosen": "So.", "rejected": "No.", "score": row} for row in range(9)]
    )
    settings = {"columns": {"prompt": "frage"}, "where": "score > 3"}
    facts = describe_data(path, **settings).as_json()
    [section] = yaml.safe_load(facts["section"])["data"]["train"]
    assert make_section(Source, section) == Source(path=path, **settings)  # type: ignore[arg-type]
    assert (facts["rows"], facts["rows_filtered"], facts["rows_usable"]) == (9, 4, 5)
    assert facts["columns"]["frage"]["role"] == "prompt"


def test_a_limit_reads_no_further(write: Write) -> None:
    facts = describe_data(write("pairs.jsonl", text_rows(5000)), limit=10).as_json()
    assert facts["rows"] == facts["rows_usable"] == 10


def test_what_is_refused_still_shows_its_columns(write: Write) -> None:
    path = write("pairs.jsonl", [{"good_one": "So.", "bad_one": ["No."], "n": 1, "meta": {"a": 1}}] * 2)
    survey = describe_data(path)
    facts = survey.as_json()
    assert "no known shape" in facts["refused"] and facts["recognised_as"] is None
    assert {name: list(column["holds"]) for name, column in facts["columns"].items()} == {
        "good_one": ["text"],
        "bad_one": ["list of text"],
        "n": ["number"],
        "meta": ["{a}"],
    }
    shown = as_text(lambda console: print_survey(facts, console))
    assert "good_one" in shown and "list of text" in shown
    with pytest.raises(UserError, match="there is no such column"):
        raise describe_data(path, columns={"prompt": "question"}).refusal or AssertionError
    with pytest.raises(UserError, match="no such file"):
        describe_data(path + "x")


def test_the_methods_that_are_named_take_that_kind() -> None:
    assert {name: ALGORITHMS[name].kind.data for names in METHODS.values() for name in names} == {
        name: kind for kind, names in METHODS.items() for name in names
    }


def test_a_terminal_shows_it_at_80_columns(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    long = ROW | {"prompt": "Why\x1b? " * 90, "a_column_with_quite_a_long_name_indeed": ["x" * 200] * 3}
    write("pairs.jsonl", [long, ROW | {"chosen": ""}])
    facts = describe_data("pairs.jsonl").as_json()
    shown = as_text(lambda console: print_survey(facts, console))
    assert max(map(len, shown.splitlines())) <= 80 and "\x1b" not in shown
    for part in ("recognised as text", "not used", "can be used as", "row 1, as messages", "In a recipe", "path: "):
        assert part in shown


def prefold_data(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prefold", "data", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(write: Write) -> None:
    path = write("pairs.jsonl", [{"frage": "Why?", "chosen": "So.", "rejected": "No.", "score": 5}] * 2)
    named = ("--columns", "prompt=frage", "--where", "score > 3", "--json")
    shown = prefold_data(path, *named)
    assert shown.returncode == 0 and json.loads(shown.stdout)["recognised_as"] == "text"
    again = prefold_data(path, "columns.prompt=frage", "where=score > 3", "--json")
    assert again.stdout == shown.stdout
    refused = prefold_data(path)
    assert refused.returncode == 2 and "frage" in refused.stdout and "known shape" in refused.stderr
    wrong = prefold_data(path, "colums.prompt=frage")
    assert wrong.returncode == 2 and "colums" in wrong.stderr


def test_it_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, prefold.cli, prefold.data.survey, prefold.reports.survey\n"
        "sys.exit(', '.join({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)) or 0)"
    )
    result: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_rankings_paths_and_ratings(write: Write) -> None:
    answers = [{"response": "A.", "score": 1}, {"response": "B.", "score": 2}, {"score": 3}]
    path = write("ranked.jsonl", [{"prompt": "Why?", "completions": answers, "id": 3}] * 2)
    facts = describe_data(path, pairs_from="all").as_json()
    assert (facts["rows"], facts["rows_usable"], facts["examples"]) == (2, 2, 2)
    assert facts["columns"]["completions"]["holds"] == {"list of {response, score}": 2}
    assert facts["columns"]["completions"]["role"] and facts["columns"]["id"]["role"] is None
    assert [finding["kind"] for finding in facts["findings"]] == ["left_out_in_part"]
    nested = {"input": {"question": "Why?"}, "chosen": "So.", "rejected": "No.", "chosen_score": 5}
    facts = describe_data(write("nested.jsonl", [nested]), columns={"prompt": "input.question"}).as_json()
    assert facts["columns"]["input"]["role"] == "prompt" and facts["columns"]["chosen_score"]["role"] == "rating"
    refused = describe_data(write("text.jsonl", [ROW]), pairs_from="all")
    assert refused.refusal and "pairs_from" in str(refused.refusal) and refused.columns


def test_half_a_character_can_be_shown(write: Write) -> None:
    rows = '{"prompt": "Why?", "chosen": "\\ud83d", "rejected": "No.", "\\ud83d": "\\ud83d"}\n'
    facts = describe_data(write("pairs.jsonl", rows + json.dumps(ROW) + "\n")).as_json()
    assert [finding["kind"] for finding in facts["findings"]] == ["not_text"]
    as_text(lambda console: print_survey(facts, console)).encode()
    json.dumps(facts).encode()
