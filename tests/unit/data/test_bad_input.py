"""Whatever is wrong with a file or a row: the expected kind and row, or one message; never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import assistant, system, to_record, user
from transformers import PreTrainedTokenizerFast

from prefold.data.mixture import load_split
from prefold.data.preference import Problem, RowId
from prefold.data.shapes import find_shape
from prefold.data.sources import read_rows
from prefold.errors import UserError
from prefold.recipe import Data, Source

Write = Callable[..., str]
GOOD = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
GOOD_LINE = json.dumps(GOOD)
TALK = [user("Why?")]


def changed(**fields: Any) -> str:
    return json.dumps(GOOD | fields)


def without(name: str) -> str:
    return json.dumps({key: value for key, value in GOOD.items() if key != name})


def talks(chosen: Any, rejected: Any) -> str:
    return json.dumps({"chosen": chosen, "rejected": rejected})


# A line of a .jsonl file -> kind and message of its problem.
BAD_LINES = [
    ("{", "broken_row", "not JSON: Expecting property name enclosed in double quotes at character 2"),
    ("Why? So. No.", "broken_row", "not JSON: Expecting value at character 1"),
    (GOOD_LINE[:-1], "broken_row", "not JSON: Expecting ',' delimiter"),
    (GOOD_LINE + ",", "broken_row", "not JSON: Extra data"),
    (GOOD_LINE + GOOD_LINE, "broken_row", "not JSON: Extra data"),
    (GOOD_LINE.replace('"', "'"), "broken_row", "not JSON"),
    ('{"prompt": "Why?\t"}', "broken_row", "not JSON: Invalid control character"),
    ('{"prompt": "\\x"}', "broken_row", "not JSON: Invalid \\escape"),
    ("[" * 100_000, "broken_row", "nested too deeply"),
    ('{"n": ' + "9" * 5_000 + "}", "broken_row", "too many digits"),
    ("[1, 2]", "broken_row", "not a JSON object but a list"),
    ('"Why?"', "broken_row", "not a JSON object but a string"),
    ("7", "broken_row", "not a JSON object but a number"),
    ("NaN", "broken_row", "not a JSON object but a number"),
    ("null", "broken_row", "not a JSON object but null"),
    ("true", "broken_row", "not a JSON object but true or false"),
    ("{}", "missing_field", "`chosen` is missing"),
    (without("prompt"), "missing_field", "`prompt` is missing"),
    (without("chosen"), "missing_field", "`chosen` is missing"),
    (without("rejected"), "missing_field", "`rejected` is missing"),
    (changed(prompt=None), "null_field", "`prompt` is null"),
    (changed(chosen=None), "null_field", "`chosen` is null"),
    (changed(rejected=None), "null_field", "`rejected` is null"),
    (
        talks([*TALK, {"role": "assistant", "content": None}], TALK),
        "null_field",
        "`chosen`, message 2: `content` is null",
    ),
    (changed(prompt=""), "empty_text", "`prompt` is empty"),
    (changed(chosen=" \n\t"), "empty_text", "`chosen` is empty"),
    (changed(rejected="\u00a0\u3000"), "empty_text", "`rejected` is empty"),
    (changed(prompt=[]), "empty_text", "`prompt` has no messages"),
    (changed(chosen=[]), "empty_text", "`chosen` has no messages"),
    (changed(rejected=[assistant(" ")]), "empty_text", "`rejected`, message 1 is empty"),
    (talks(TALK, [*TALK, assistant("No.")]), "empty_text", "`chosen` has no answer"),
    (changed(prompt=3), "not_text", "`prompt` is a number, not text"),
    (changed(chosen=True), "not_text", "`chosen` is true or false, not text"),
    (changed(rejected={"text": "No."}), "not_text", "`rejected` is an object, not text"),
    (changed(system=["Be brief."]), "not_text", "`system` is a list, not text"),
    (changed(system=0), "not_text", "`system` is a number, not text"),
    (changed(prompt=[{"role": "user", "content": 5}]), "not_text", "`prompt`, message 1 is a number, not text"),
    (
        changed(prompt=[{"role": "user", "content": [{"type": "text"}]}]),
        "not_text",
        "message 1 has a part whose `text` is null",
    ),
    (changed(chosen="\ud83d"), "not_text", "`chosen` has half a character (a lone surrogate)"),
    (changed(prompt=["Why?"]), "bad_message", "`prompt`, message 1 is a string, not {role, content}"),
    (changed(prompt=[{"content": "Why?"}]), "bad_message", "`prompt`, message 1 has no `role`"),
    (changed(prompt=[{"role": "user"}]), "bad_message", "`prompt`, message 1 has no `content`"),
    (changed(prompt=[{"from": "human", "value": "Why?"}]), "bad_message", "`prompt`, message 1 has no `role`"),
    (
        changed(prompt=[{"role": "narrator", "content": "Why?"}]),
        "bad_message",
        "the role `narrator`, not one of system, user",
    ),
    (changed(prompt=[{"role": ["user"], "content": "Why?"}]), "bad_message", "the role `['user']`"),
    (changed(prompt=[*TALK, assistant("So.")]), "bad_message", "the last message of `prompt` is the assistant's"),
    (changed(prompt=[system("A"), *TALK], system="B"), "bad_message", "a system message of its own beside `system`"),
    (changed(chosen=[*TALK, assistant("So.")]), "bad_message", "the answer in `chosen` has a message of the role user"),
    (changed(rejected=[assistant("No."), user("Really?")]), "bad_message", "the answer in `rejected` has a message of"),
    (talks([*TALK, assistant("So.")], "No."), "bad_message", "`rejected` is a string, not a list of messages"),
    (
        talks([user("Why?"), assistant("So.")], [user("How?"), assistant("No.")]),
        "bad_message",
        "do not begin with the same",
    ),
    (
        talks([*TALK, assistant("A"), user("B"), assistant("C")], [*TALK, assistant("D")]),
        "prompts_differ",
        "within `chosen` and `rejected` the user says different things",
    ),
    (changed(rejected="So."), "identical", "`chosen` and `rejected` are the same"),
    (changed(rejected=" So.\n"), "identical", "`chosen` and `rejected` are the same"),
    (changed(rejected=[assistant("So.")]), "identical", "`chosen` and `rejected` are the same"),
    (talks([*TALK, assistant("So.")], [*TALK, assistant("So. ")]), "identical", "`chosen` and `rejected` are the same"),
]


@pytest.mark.parametrize("line, kind, message", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_row_is_left_out_and_named(
    write: Write, chatml: PreTrainedTokenizerFast, line: str, kind: str, message: str
) -> None:
    path = write("pairs.jsonl", f"{GOOD_LINE}\n\n{line}\n{changed(prompt='How?')}\n")
    rows = list(read_rows(Source(path=path)))
    shape = find_shape(rows, path, kinds=("pairs",))
    problems = [result for row in rows if isinstance(result := to_record(row, shape), Problem)]
    assert [(problem.kind, problem.origin) for problem in problems] == [(kind, RowId(path, 3))]
    assert message in problems[0].message
    assert len(problems[0].message) <= 100
    prepared = load_split(Data(train=[Source(path=path)]), chatml, seed=1)
    assert [origin.row for origin in prepared.train.origins] == [1, 4]
    counted = [(finding.kind, finding.count, finding.rows) for finding in prepared.report.findings]
    assert (kind, 1, (RowId(path, 3),)) in counted


# Name and content of a file -> what its message says.
BAD_FILES: list[tuple[str, bytes, list[str]]] = [
    ("pairs.jsonl", b"", ["there are no rows in it"]),
    ("pairs.jsonl", b"\n \n\r\n", ["there are no rows in it"]),
    ("pairs.jsonl", b"\xef\xbb\xbf", ["there are no rows in it"]),
    ("pairs.json", b"", ["there are no rows in it"]),
    ("pairs.json", b" \n", ["there are no rows in it"]),
    ("pairs.json", b"[]", ["there are no rows in it"]),
    ("pairs.jsonl", b'{"prompt": "caf\xe9"}\n', ["no usable row is left", "not UTF-8 at byte 16 of the line (0xe9)"]),
    ("pairs.jsonl", "{}\n".encode("utf-16"), ["not UTF-8 but, it seems, UTF-16", "convert the file to UTF-8"]),
    ("pairs.jsonl", b"\x1f\x8b\x08\x00", ["row 1: not UTF-8 at byte 2 of the line (0x8b)"]),
    ("pairs.json", b'[{"a": "\xe9"}]', ["not UTF-8 at byte 8 (0xe9)"]),
    ("pairs.json", b'{"data": []}', ["the file holds an object", "a list of objects"]),
    ("pairs.json", b'"text"', ["the file holds a string"]),
    ("pairs.json", b"null", ["the file holds null"]),
    ("pairs.json", b'[{"a": 1},\n {"b": }]', [", line 2, column 8: not JSON: Expecting value"]),
    ("pairs.json", b'{"a": 1}\n{"a": 2}\n', [", line 2, column 1: not JSON: Extra data", "end in .jsonl"]),
    ("pairs.json", b"[" * 100_000, ["nested too deeply"]),
    ("pairs.csv", b"prompt,chosen,rejected\n", ["there are no rows in it"]),
    ("pairs.csv", b"", ["there are no rows in it"]),
    ("pairs.csv", b"prompt,prompt\na,b\n", ["does not name the columns: a column is named twice"]),
    ("pairs.csv", b'prompt,"chosen\na,b\n', ["does not name the columns: a quote is not closed"]),
    ("pairs.csv", "a,b\nc,d\n".encode("utf-16"), ["not UTF-8 but, it seems, UTF-16"]),
    ("pairs.jsonl.gz", b"\x1f\x8b", ["cannot be read"]),
    ("pairs.jsonl.gz", b"{}\n", ["cannot be read (Not a gzipped file"]),
    ("pairs.jsonl.xz", b"{}\n", ["cannot be read"]),
    ("pairs.jsonl.bz2", b"{}\n", ["cannot be read"]),
    ("pairs.jsonl.zst", b"{}\n", ["cannot be read"]),
    ("pairs.parquet", b"{}\n", ["cannot be read"]),
    ("pairs.parquet.gz", b"{}\n", ["files that end in `.gz` are not read"]),
    ("pairs", GOOD_LINE.encode(), ["the file name has no ending"]),
    ("pairs.jsonl", b'{"question": "Why?", "answer": "So."}\n', ["no known shape of pairs: `question`, `answer`"]),
    ("pairs.jsonl", b'{"chosen": "A", "rejected": "B"}\n', ["no known shape of pairs: `chosen`, `rejected`"]),
    ("pairs.jsonl", b"{}\n", ["its rows have no columns"]),
    ("pairs.jsonl", b"one\ntwo\n", ["no usable row is left of 2: 2 broken_row", "row 1: not JSON: Expecting value"]),
]


@pytest.mark.parametrize("name, content, expected", BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_file_is_one_message(
    write: Write, chatml: PreTrainedTokenizerFast, name: str, content: bytes, expected: list[str]
) -> None:
    path = write(name, content)
    with pytest.raises(UserError) as caught:
        load_split(Data(train=[Source(path=path)]), chatml, seed=1)
    message = str(caught.value)
    assert path in message and all(text in message for text in expected), message
    assert max(map(len, message.replace(path, "").split("\n"))) <= 80


# A path (or path and split) that names nothing readable, in a folder with pairs.jsonl, notes.txt and folder/.
BAD_PATHS: list[tuple[str, str | None, list[str]]] = [
    ("pair.jsonl", None, ["pair.jsonl: no such file", "did you mean `pairs.jsonl`?"]),
    ("./pairs.json", None, ["./pairs.json: no such file", "did you mean `pairs.jsonl`?"]),
    ("zzz", None, ["zzz: no such file", "readable files in that folder: pairs.jsonl"]),
    ("folder/x.jsonl", None, ["no such file", "that folder has no file that can be read"]),
    ("absent/pairs.jsonl", None, ["absent/pairs.jsonl: no such file: its folder does not exist either"]),
    ("folder/some_set", None, ["folder/some_set: no such file", "that folder has no"]),
    ("a/b/c", None, ["its folder does not exist either"]),
    ("https://example.org/pairs.jsonl", None, ["no such file"]),
    ("folder", None, ["folder: no file in this folder can be read"]),
    ("*.txt", None, ["notes.txt: files that end in `.txt` are not read"]),
    ("*.csv", None, ["*.csv: no file matches"]),
    ("pairs.jsonl", "train", ["pairs.jsonl: a file has no `split`, but `split: train` is given", "remove `split`"]),
    ("notes.txt", None, ["files that end in `.txt` are not read"]),
    ("x" * 300 + ".jsonl", None, ["cannot be read (File name too long)"]),
    ("~nobody_of_this_name/pairs.jsonl", None, ["~nobody_of_this_name/pairs.jsonl: no such file"]),
    ("pairs\0.jsonl", None, ["no such file"]),
    ("builtin:nothing", None, ["builtin:nothing: there is no built-in set `nothing`"]),
]


@pytest.mark.parametrize("path, split, expected", BAD_PATHS, ids=range(len(BAD_PATHS)))
def test_a_bad_path_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, split: str | None, expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(GOOD_LINE)
    Path("notes.txt").write_text("notes")
    Path("folder").mkdir()
    with pytest.raises(UserError) as caught:
        read_rows(Source(path=path, split=split))
    message = str(caught.value)
    assert all(text in message for text in expected), message
    assert str(tmp_path) not in message
