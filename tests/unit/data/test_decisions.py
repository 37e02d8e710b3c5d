"""Rows that people struck or flipped: what is trained on, what is said of it, and when it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import text_rows
from transformers import PreTrainedTokenizerFast

from prefold.data.decisions import Decision, append_decision, digest_of_row, read_decisions
from prefold.data.formats import RawRow
from prefold.data.mixture import Prepared, load_split
from prefold.data.preference import RowId
from prefold.data.prepared_cache import key_of_data, prepare
from prefold.data.row import see_row
from prefold.data.sources import read_rows
from prefold.errors import UserError
from prefold.recipe import Data, Source, make_recipe
from prefold.runs.fingerprints import inputs_of

Write = Callable[..., str]
RANKING = {"prompt": "Why?", "responses": ["a b", "c d", "e f"], "scores": [3, 2, 1]}


def decided(tmp_path: Path, path: str, *actions: tuple[int, str], **settings: Any) -> Data:
    """Data of one file, with decisions about rows of it."""
    file = tmp_path / "decisions.jsonl"
    rows = {row.origin.row: row for row in read_rows(Source(path=path))}
    for number, action in actions:
        append_decision(file, Path(path), rows[number], action, f"because {number}")
    return Data(train=[Source(path=path, **settings)], decisions=str(file))


def shown(prepared: Prepared) -> list[tuple[str, str]]:
    return [(record.answers[0][0]["content"], record.answers[-1][0]["content"]) for record in prepared.train.records]


def test_a_struck_row_is_left_out_and_a_flipped_one_turned_round(
    tmp_path: Path, write: Write, chatml: PreTrainedTokenizerFast
) -> None:
    path = write("pairs.jsonl", text_rows(4))
    plain = load_split(Data(train=[Source(path=path)]), chatml, 0)
    prepared = load_split(decided(tmp_path, path, (2, "strike"), (3, "flip"), (4, "strike"), (4, "keep")), chatml, 0)
    before = shown(plain)
    assert shown(prepared) == [before[0], before[2][::-1], before[3]]
    about = {finding.kind: finding for finding in prepared.report.findings}
    assert (about["struck"].count, about["struck"].severity, about["struck"].rows[0].row) == (1, "note", 2)
    assert "because 2" in about["struck"].message
    assert about["flipped"].count == 1 and "because 3" in about["flipped"].message
    assert prepared.report.sources[0].rows_used == 3 and prepared.report.sources[0].rows_in == 4
    assert prepared.fingerprints["train"] != plain.fingerprints["train"]


def test_flipping_turns_ratings_and_labels_too(tmp_path: Path, write: Write, chatml: PreTrainedTokenizerFast) -> None:
    rated = [row | {"chosen_score": 1, "rejected_score": 4} for row in text_rows(2)]
    prepared = load_split(decided(tmp_path, write("rated.jsonl", rated), (1, "flip")), chatml, 0)
    assert [record.ratings for record in prepared.train.records] == [(4, 1), (1, 4)]  # type: ignore[union-attr]
    about = {finding.kind: [row.row for row in finding.rows] for finding in prepared.report.findings}
    assert about["flipped_rating"] == [2]
    labelled = write("labels.jsonl", [{"prompt": "Why?", "completion": f"word {i}", "label": i == 0} for i in range(3)])
    (tmp_path / "decisions.jsonl").unlink()
    prepared = load_split(decided(tmp_path, labelled, (1, "flip"), (2, "flip")), chatml, 0, "unpaired")
    assert [record.label for record in prepared.train.records] == [False, True, False]  # type: ignore[union-attr]


def test_a_row_of_several_pairs_is_counted_once(tmp_path: Path, write: Write, chatml: PreTrainedTokenizerFast) -> None:
    path = write("ranked.jsonl", [RANKING, RANKING | {"prompt": "How?"}, RANKING | {"prompt": "Who?"}])
    data = decided(tmp_path, path, (1, "flip"), (2, "strike"), pairs_from="all")
    prepared = load_split(data, chatml, 0)
    assert len(prepared.train) == 6
    counts = {finding.kind: finding.count for finding in prepared.report.findings}
    assert (counts["flipped"], counts["struck"]) == (1, 1)


def test_which_rows_are_drawn_does_not_hang_on_decisions(
    tmp_path: Path, write: Write, chatml: PreTrainedTokenizerFast
) -> None:
    path = write("pairs.jsonl", text_rows(20))
    drawn = load_split(Data(train=[Source(path=path, count=10)]), chatml, 0).train.origins
    struck = drawn[3].row
    prepared = load_split(decided(tmp_path, path, (struck, "strike"), count=10), chatml, 0)
    assert list(prepared.train.origins) == [origin for origin in drawn if origin.row != struck]


def test_the_row_shown_alone_is_as_decided(tmp_path: Path, write: Write, chatml: PreTrainedTokenizerFast) -> None:
    data = decided(tmp_path, write("pairs.jsonl", text_rows(3)), (1, "flip"), (2, "strike"))
    flipped, struck = (see_row(str(row), data, chatml, 0, "pairs").as_json() for row in (1, 2))
    assert flipped["messages"][0]["chosen"][0]["content"] == flipped["read"]["rejected"]
    assert [finding["kind"] for finding in flipped["findings"]] == ["flipped"]
    assert struck["left_out"] == [{"kind": "struck", "message": "because 2"}]


def test_a_row_that_has_changed_or_moved_is_refused(
    tmp_path: Path, write: Write, chatml: PreTrainedTokenizerFast
) -> None:
    data = decided(tmp_path, write("pairs.jsonl", text_rows(4)), (4, "strike"))
    write("pairs.jsonl", [*text_rows(3), text_rows(5)[4]])
    with pytest.raises(UserError, match=r"row 4 has changed since it was decided about"):
        load_split(data, chatml, 0)
    with pytest.raises(UserError, match=r"row 4 has changed since"):
        see_row("4", data, chatml, 0, "pairs")
    write("pairs.jsonl", text_rows(3))
    with pytest.raises(UserError, match=r"row 4 is not there, the last is 3"):
        load_split(data, chatml, 0)


def test_what_has_no_other_side_cannot_be_flipped(
    tmp_path: Path, write: Write, chatml: PreTrainedTokenizerFast
) -> None:
    data = decided(tmp_path, write("prompts.jsonl", [{"prompt": "Why?"}, {"prompt": "How?"}]), (1, "flip"))
    with pytest.raises(UserError, match="is a prompt alone, and cannot be flipped"):
        load_split(data, chatml, 0, "prompts")


def test_decisions_about_another_file_are_refused(
    tmp_path: Path, write: Write, chatml: PreTrainedTokenizerFast
) -> None:
    data = decided(tmp_path, write("pairs.jsonl", text_rows(3)), (1, "strike"))
    other = data.model_copy(update={"train": [Source(path=write("other.jsonl", text_rows(3)))]})
    with pytest.raises(UserError, match=r"row 1 of pairs\.jsonl, which is none of the recipe's sources"):
        load_split(other, chatml, 0)


def test_a_file_is_the_same_under_any_path(
    tmp_path: Path, write: Write, chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    decided(tmp_path, write("pairs.jsonl", text_rows(3)), (1, "strike"))
    monkeypatch.chdir(tmp_path)
    for path in ("pairs.jsonl", "./pairs.jsonl", "*.jsonl"):
        if path == "*.jsonl":
            Path("decisions.jsonl").rename("decided")
        name = "decisions.jsonl" if path != "*.jsonl" else "decided"
        assert len(load_split(Data(train=[Source(path=path)], decisions=name), chatml, 0).train) == 2


def test_prepared_data_are_those_of_these_decisions(
    tmp_path: Path, write: Write, chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))
    path = write("pairs.jsonl", text_rows(4))
    data = decided(tmp_path, path, (1, "strike"))
    first = key_of_data(data, chatml, 0, "pairs")
    assert first is not None and len(prepare(data, chatml, 0).train) == 3
    decided(tmp_path, path, (2, "strike"))
    assert key_of_data(data, chatml, 0, "pairs") != first and len(prepare(data, chatml, 0).train) == 2


LINE = {"source": "pairs.jsonl", "row": 1, "action": "strike", "reason": "why", "digest": "0"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "not an object but a list"),
        (json.dumps({**LINE, "rows": 1}), "`rows` is not a field of a decision"),
        (json.dumps({name: LINE[name] for name in LINE if name != "reason"}), "`reason` is missing"),
        (json.dumps({**LINE, "row": "1"}), "`row` is a string"),
        (json.dumps({**LINE, "row": True}), "`row` is true or false"),
        (json.dumps({**LINE, "row": 0}), "`row` is below 1"),
        (json.dumps({**LINE, "reason": " "}), "`reason` is empty"),
        (json.dumps({**LINE, "action": "strikes"}), "`action` is `strikes`"),
    ],
)
def test_a_line_that_is_no_decision_is_refused(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "decisions.jsonl"
    file.write_text(json.dumps(LINE) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_decisions(file)
    assert message in str(error.value) and "line 2" in str(error.value)


def test_a_file_of_decisions_that_is_not_there_is_refused(tmp_path: Path, write: Write, chatml: Any) -> None:
    data = Data(train=[Source(path=write("pairs.jsonl", text_rows(3)))], decisions=str(tmp_path / "none.jsonl"))
    for read in (load_split, prepare):
        with pytest.raises(UserError, match=r"`data\.decisions`.*cannot be read"):
            read(data, chatml, 0)


def test_decisions_are_appended_and_the_last_counts(tmp_path: Path) -> None:
    file, row = tmp_path / "decisions.jsonl", RawRow(RowId("x", 3), {"prompt": "a", "n": 1})
    file.write_text(json.dumps(LINE), encoding="utf-8")  # without an end of line
    append_decision(file, tmp_path / "data" / "pairs.jsonl", row, "strike", " too\nlong ")
    append_decision(file, tmp_path / "data" / "pairs.jsonl", row, "flip", "wrong")
    same = digest_of_row({"n": 1, "prompt": "a"})
    assert list(read_decisions(file).values()) == [
        Decision(**LINE),
        Decision("data/pairs.jsonl", 3, "flip", "wrong", same),
    ]
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3
    with pytest.raises(UserError, match="without a reason"):
        append_decision(file, tmp_path / "pairs.jsonl", row, "strike", "  ")


def test_a_run_has_read_the_decisions(tmp_path: Path, write: Write) -> None:
    path = write("pairs.jsonl", text_rows(3))
    data = decided(tmp_path, path, (1, "strike"))
    values = {"method": "dpo", "model": {"name": "a/b"}, "output_dir": "x"}
    recipe = make_recipe({**values, "data": {"train": [{"path": path}], "decisions": data.decisions}})
    before = inputs_of(recipe)["check"]["data.decisions"].files
    decided(tmp_path, path, (2, "flip"))
    after = inputs_of(recipe)["check"]["data.decisions"].files
    assert before and after and list(before) == list(after) == ["decisions.jsonl"] and before != after
