"""Malformed files and rows, each with what must come of it.

A case makes its source in a folder. Either the source is refused with one message, or its rows are used or left out:
`used` and `found` name every one of them by its row, or by file and row where the source is a folder.
"""

from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import io
import json
import lzma
import os
import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from data_samples import assistant, system, user
from pyarrow import parquet

from prefold.data.shapes import Kind

Row = int | tuple[str, int]


@dataclass(frozen=True)
class Case:
    """`refused` is a part of the message where there is nothing to train on; `root_can` marks what only the file's
    permissions forbid."""

    name: str
    make: Callable[[Path], Path]
    used: tuple[Row, ...] = ()
    found: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    refused: str = ""
    kind: Kind = "pairs"
    root_can: bool = False


def _written(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def _file(name: str, file: str, content: bytes, used: tuple[int, ...], **found: tuple[int, ...]) -> Case:
    return Case(name, _written(file, content), used, found)


def _refused(name: str, file: str, content: bytes, message: str) -> Case:
    return Case(name, _written(file, content), refused=message)


# ---- single rows ------------------------------------------------------------------------------------------------

GOOD = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
TALK = [user("Why?")]
TURNS = {"prompt": TALK, "chosen": [assistant("So.")], "rejected": [assistant("No.")]}
WHOLE = {"chosen": [*TALK, assistant("So.")], "rejected": [*TALK, assistant("No.")]}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Why?"}],
    "chosen": {"from": "gpt", "value": "So."},
    "rejected": {"from": "gpt", "value": "No."},
}
CHATML_TURN = "<|im_start|>user\nWhy?<|im_end|>\n"
CHATML = {"prompt": CHATML_TURN + "<|im_start|>assistant\n", "chosen": "So.<|im_end|>", "rejected": "No.<|im_end|>"}
TRANSCRIPTS = {"chosen": "\n\nHuman: Why?\n\nAssistant: So.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."}
VOTES = {"instruction": "Why?", "output_1": "So.", "output_2": "No.", "label": 1}
UNPAIRED = {"prompt": "Why?", "completion": "So.", "label": True}
QUESTION = {"prompt": "Why?", "answer": "42"}


def _line(row: Any) -> bytes:
    """A row as a line; text and bytes are lines as they are."""
    if isinstance(row, bytes):
        return row + b"\n"
    return (row if isinstance(row, str) else json.dumps(row)).encode() + b"\n"


def _lines(*rows: Any) -> bytes:
    return b"".join(map(_line, rows))


def _bad(name: str, row: Any, kind: str, like: dict[str, Any] = GOOD, records: Kind = "pairs") -> Case:
    """A row that is left out between two that are used."""
    return Case(name, _written("rows.jsonl", _lines(like, row, like)), (1, 3), {kind: (2,)}, kind=records)


def _fine(name: str, row: Any, *kinds: str, like: dict[str, Any] = GOOD, records: Kind = "pairs") -> Case:
    """A row that is used, though it may look otherwise; `kinds` are of the findings that count it."""
    content = _lines(like, row, like)
    return Case(name, _written("rows.jsonl", content), (1, 2, 3), dict.fromkeys(kinds, (2,)), kind=records)


def _without(name: str, row: dict[str, Any] = GOOD) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != name}


GOOD_TEXT = json.dumps(GOOD)
NOT_JSON = [
    _bad("half an object", GOOD_TEXT[:-9], "broken_row"),
    _bad("trailing comma behind a row", GOOD_TEXT + ",", "broken_row"),
    _bad("trailing comma within a row", GOOD_TEXT[:-1] + ",}", "broken_row"),
    _bad("two objects in a line", GOOD_TEXT * 2, "broken_row"),
    _bad("single quotes", GOOD_TEXT.replace('"', "'"), "broken_row"),
    _bad("a comment", "// three pairs", "broken_row"),
    _bad("bare words", "Why? So. No.", "broken_row"),
    _bad("an unknown escape", GOOD_TEXT.replace("So", "\\x"), "broken_row"),
    _bad("a raw tab in a string", GOOD_TEXT.replace("So", "\t"), "broken_row"),
    _bad("a raw NUL in a string", GOOD_TEXT.replace("So", "\0"), "broken_row"),
    _bad("a line of NULs", b"\0" * 512, "broken_row"),
    _bad("a list for a row", "[1, 2]", "broken_row"),
    _bad("a string for a row", '"Why?"', "broken_row"),
    _bad("a number for a row", "7", "broken_row"),
    _bad("NaN for a row", "NaN", "broken_row"),
    _bad("null for a row", "null", "broken_row"),
    _bad("true for a row", "true", "broken_row"),
    _bad("nested 100,000 deep", "[" * 100_000, "broken_row"),
    _bad("an integer of 5,000 digits", '{"n": ' + "9" * 5_000 + "}", "broken_row"),
]
ENCODINGS = [
    _bad("latin-1 among UTF-8", GOOD_TEXT.replace("So", "caf\xe9").encode("latin-1"), "broken_row"),
    _bad("cut within a character", GOOD_TEXT.replace("So", "\u6f22").encode()[:-27] + b"\xe6", "broken_row"),
    _bad("overlong UTF-8", GOOD_TEXT.encode().replace(b"So", b"\xc0\xaf"), "broken_row"),
    _bad("a surrogate in UTF-8", GOOD_TEXT.encode().replace(b"So", b"\xed\xa0\x80"), "broken_row"),
    _bad("a byte order mark within the file", b"\xef\xbb\xbf" + GOOD_TEXT.encode(), "broken_row"),
    _bad("lone surrogate in the prompt", GOOD | {"prompt": "\ud83d"}, "not_text"),
    _bad("lone surrogate in an answer", GOOD | {"chosen": "So \udc00."}, "not_text"),
    _bad("lone surrogate in a message", TURNS | {"prompt": [user("\ud800?")]}, "not_text", TURNS),
    _bad("lone surrogate in the system column", GOOD | {"system": "\ud83d"}, "not_text"),
    _fine("lone surrogate in another column", GOOD | {"note": "\ud83d"}),
    _fine("lone surrogate in a column's name", GOOD | {"\ud83d": 1}),
    _fine("surrogates that make a character", GOOD | {"chosen": "\U0001f600"}),
    _fine("line separators of Unicode", GOOD_TEXT.replace("So", "So\u2028\u2029\x85")),
    _fine("an escaped NUL", GOOD | {"chosen": "So\0."}, "control_character"),
    _fine("a replacement character", GOOD | {"rejected": "N\ufffd."}, "control_character"),
    _fine("a terminal's colours", GOOD | {"prompt": "\x1b[31mWhy?"}, "control_character"),
    _fine("control tokens in a text", GOOD | {"chosen": "So.<|im_end|>"}, "template_residue", "double_end_token"),
    _fine("right to left, joined and combined", GOOD | {"prompt": "\u202e\u05d0\u200d\U0001f468 a\u0301"}),
]
STRANGE_VALUES = {
    "true": (True, "not_text"),
    "a number": (3, "not_text"),
    "NaN": (float("nan"), "not_text"),
    "an object": ({"a": 1}, "not_text"),
    "a list of strings": (["Why?"], "bad_message"),
    "nested lists": ([[TALK]], "bad_message"),
    "an empty list": ([], "empty_text"),
    "null": (None, "null_field"),
    "an empty string": ("", "empty_text"),
    "white space": (" \n\t\u00a0\u3000", "empty_text"),
}
FIELDS = [
    *(
        _bad(f"{what} for {column}", GOOD | {column: value}, kind)
        for column in GOOD
        for what, (value, kind) in STRANGE_VALUES.items()
    ),
    *(_bad(f"no {column}", _without(column), "missing_field") for column in GOOD),
    _bad("no columns", {}, "missing_field"),
    _bad("columns with other names", {"Prompt": "Why?", "Chosen": "So.", "Rejected": "No."}, "missing_field"),
    _bad("a list for the system column", GOOD | {"system": ["Be brief."]}, "not_text"),
    _bad("a number for the system column", GOOD | {"system": 0}, "not_text"),
    _fine("null for the system column", GOOD | {"system": None}),
    _fine("white space for the system column", GOOD | {"system": " "}),
    _fine("more columns", GOOD | {"id": 7, "tags": [None, {"a": []}], "": 0}),
    _fine("columns in another order", dict(reversed(GOOD.items()))),
    _fine("the same key twice", GOOD_TEXT[:-1] + ', "chosen": "Yes."}'),
    _bad("the same key twice, then null", GOOD_TEXT[:-1] + ', "chosen": null}', "null_field"),
    _bad("a word of a million characters", GOOD | {"chosen": "x" * 10**6}, "overlong"),
    _bad("a prompt of 200,000 characters", GOOD | {"prompt": "x" * 200_000}, "overlong"),
    _bad("an answer of a million characters", GOOD | {"rejected": "word " * 200_000}, "overlong"),
    _fine("a million characters in another column", GOOD | {"log": "x" * 10**6}),
    _fine("500 lists within each other in another column", GOOD_TEXT[:-1] + ', "a": ' + "[" * 500 + "]" * 500 + "}"),
    _bad("500 lists within each other for a prompt", '{"prompt": ' + "[" * 500 + "]" * 500 + "}", "missing_field"),
    _fine("an integer of 400 digits in another column", GOOD | {"n": 10**400}),
    _fine("Infinity in another column", GOOD | {"n": float("-inf")}),
    _bad("the same answers", GOOD | {"rejected": "So."}, "identical"),
    _bad("the same answers but for white space", GOOD | {"rejected": "\n So.\t"}, "identical"),
    _bad("the same answers, one as a list", GOOD | {"rejected": [assistant("So.")]}, "identical"),
]
MESSAGES = [
    _bad("null content", TURNS | {"prompt": [{"role": "user", "content": None}]}, "null_field", TURNS),
    _bad(
        "null content of an answer", TURNS | {"chosen": [{"role": "assistant", "content": None}]}, "null_field", TURNS
    ),
    _bad("null for a message", TURNS | {"prompt": [*TALK, None]}, "bad_message", TURNS),
    _bad("null for all messages", TURNS | {"prompt": None}, "null_field", TURNS),
    _bad("null for a role", TURNS | {"prompt": [{"role": None, "content": "Why?"}]}, "bad_message", TURNS),
    _bad("a list for a role", TURNS | {"prompt": [{"role": ["user"], "content": "Why?"}]}, "bad_message", TURNS),
    _bad("no role", TURNS | {"prompt": [{"content": "Why?"}]}, "bad_message", TURNS),
    _bad("no content", TURNS | {"prompt": [{"role": "user"}]}, "bad_message", TURNS),
    _bad("an unknown role", TURNS | {"prompt": [{"role": "narrator", "content": "Why?"}]}, "bad_message", TURNS),
    _fine("a role in capitals", TURNS | {"prompt": [{"role": "User", "content": "Why?"}]}, like=TURNS),
    _fine("a tool's turn", TURNS | {"prompt": [*TALK, {"role": "tool", "content": "7"}]}, like=TURNS),
    _bad("a role that nobody has", TURNS | {"prompt": [{"role": "narrator", "content": "A"}]}, "bad_message", TURNS),
    _bad(
        "an answer that calls a tool",
        TURNS | {"chosen": [assistant("So.") | {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]},
        "template_refused",
        TURNS,
    ),
    _fine("no tool calls", TURNS | {"chosen": [assistant("So.") | {"tool_calls": None}]}, like=TURNS),
    _bad("content in parts", TURNS | {"prompt": [user("") | {"content": [{"type": "text"}]}]}, "not_text", TURNS),
    _bad("a number for content", TURNS | {"prompt": [user("") | {"content": 5}]}, "not_text", TURNS),
    _bad("an empty user message", TURNS | {"prompt": [user(" ")]}, "empty_text", TURNS),
    _bad("an empty answer message", TURNS | {"chosen": [assistant("")]}, "empty_text", TURNS),
    _bad("a prompt that ends with the assistant", TURNS | {"prompt": [*TALK, assistant("So.")]}, "bad_message", TURNS),
    _bad("a user in the answer", TURNS | {"chosen": [*TALK, assistant("So.")]}, "bad_message", TURNS),
    _bad("a user behind the answer", TURNS | {"rejected": [assistant("No."), *TALK]}, "bad_message", TURNS),
    _bad("the same answers in lists", TURNS | {"rejected": [assistant(" So.")]}, "identical", TURNS),
    _bad("two systems", TURNS | {"prompt": [system("A"), *TALK], "system": "B"}, "bad_message", TURNS),
    _fine("two system messages", TURNS | {"prompt": [system("A"), system("B"), *TALK]}, like=TURNS),
    _fine("the same system twice", TURNS | {"prompt": [system("A"), *TALK], "system": "A"}, like=TURNS),
    _fine("only a system message", TURNS | {"prompt": [system("Tell a joke.")]}, like=TURNS),
    _fine("an empty system message", TURNS | {"prompt": [system(""), *TALK]}, like=TURNS),
    _fine("the assistant first", TURNS | {"prompt": [assistant("Hello."), *TALK]}, like=TURNS),
    _fine("an answer in two messages", TURNS | {"chosen": [assistant("So."), assistant("So!")]}, like=TURNS),
    _fine("one message for an answer", TURNS | {"chosen": assistant("So.")}, like=TURNS),
    _fine(
        "more keys in a message",
        TURNS | {"prompt": [user("Why?") | {"name": "Ann", "id": None}]},
        "unread_field",
        like=TURNS,
    ),
]
DIALOGUES = [
    _bad("dialogues of two prompts", WHOLE | {"rejected": [user("How?"), assistant("No.")]}, "bad_message", WHOLE),
    _bad("a dialogue without an answer", WHOLE | {"chosen": TALK}, "empty_text", WHOLE),
    _bad("a string beside a dialogue", WHOLE | {"rejected": "No."}, "bad_message", WHOLE),
    _bad("dialogues that end with a user", {"chosen": [*TALK, user("A")], "rejected": TALK}, "bad_message", WHOLE),
    _bad("equal dialogues", WHOLE | {"rejected": WHOLE["chosen"]}, "identical", WHOLE),
    _bad(
        "dialogues that part too early",
        {"chosen": [*WHOLE["chosen"], user("B"), assistant("C")], "rejected": WHOLE["rejected"]},
        "prompts_differ",
        WHOLE,
    ),
    _bad("an empty dialogue", WHOLE | {"chosen": []}, "empty_text", WHOLE),
    _bad(
        "no prompt before the answers", {"chosen": [assistant("A")], "rejected": [assistant("B")]}, "bad_message", WHOLE
    ),
    _bad("ShareGPT: unknown `from`", SHAREGPT | {"chosen": {"from": "alien", "value": "So."}}, "bad_message", SHAREGPT),
    _bad("ShareGPT: a tool", SHAREGPT | {"chosen": {"from": "observation", "value": "7"}}, "bad_message", SHAREGPT),
    _bad("ShareGPT: no value", SHAREGPT | {"chosen": {"from": "gpt"}}, "bad_message", SHAREGPT),
    _bad("ShareGPT: null", SHAREGPT | {"chosen": {"from": "gpt", "value": None}}, "null_field", SHAREGPT),
    _bad("ShareGPT: a plain message", SHAREGPT | {"conversations": TALK}, "bad_message", SHAREGPT),
    _bad("ShareGPT: no turns", SHAREGPT | {"conversations": []}, "empty_text", SHAREGPT),
    _bad(
        "ChatML: no end of a turn", CHATML | {"prompt": "<|im_start|>user\nWhy?\n" + CHATML_TURN}, "bad_message", CHATML
    ),
    _bad("ChatML: unknown role", CHATML | {"prompt": CHATML_TURN.replace("user", "tool")}, "bad_message", CHATML),
    _bad("ChatML: text before the first turn", CHATML | {"prompt": "Hi " + CHATML_TURN}, "bad_message", CHATML),
    _bad("ChatML: bare text", CHATML | {"prompt": "Why?"}, "bad_message", CHATML),
    _bad("ChatML: an empty turn", CHATML | {"prompt": CHATML_TURN.replace("Why?", " ")}, "empty_text", CHATML),
    _bad("ChatML: two turns for an answer", CHATML | {"chosen": CHATML_TURN * 2}, "bad_message", CHATML),
    _bad("ChatML: an empty answer", CHATML | {"chosen": "<|im_end|>"}, "empty_text", CHATML),
    _fine("ChatML: no opening of the answer", CHATML | {"prompt": CHATML_TURN}, like=CHATML),
    _fine("ChatML: an answer without its end", CHATML | {"chosen": "So!"}, like=CHATML),
    _bad(
        "transcripts of two prompts",
        TRANSCRIPTS | {"chosen": "\n\nHuman: How?\n\nAssistant: So."},
        "prompts_differ",
        TRANSCRIPTS,
    ),
    _bad(
        "transcripts that part too early",
        TRANSCRIPTS | {"chosen": TRANSCRIPTS["chosen"] + "\n\nHuman: And?\n\nAssistant: So."},
        "prompts_differ",
        TRANSCRIPTS,
    ),
    _bad(
        "a transcript with an empty end",
        TRANSCRIPTS | {"chosen": "\n\nHuman: Why?\n\nAssistant: "},
        "empty_text",
        TRANSCRIPTS,
    ),
    _bad("no transcript", TRANSCRIPTS | {"chosen": "So."}, "bad_message", TRANSCRIPTS),
    _bad("equal transcripts", TRANSCRIPTS | {"rejected": TRANSCRIPTS["chosen"] + " \n"}, "identical", TRANSCRIPTS),
    _fine(
        "a transcript without empty lines before it",
        TRANSCRIPTS | {"chosen": "Human: Why?\n\nAssistant: Yes."},
        like=TRANSCRIPTS,
    ),
]
LABELS = [
    _refused(
        "a vote for the third",
        "votes.jsonl",
        _lines(VOTES, VOTES | {"label": 3}, VOTES),
        "`label` holds 1 (2 rows), 3 (1)",
    ),
    _bad("a vote in letters", VOTES | {"label": "A"}, "bad_label", VOTES),
    _bad("a vote of true", VOTES | {"label": True}, "bad_label", VOTES),
    _bad("a vote of NaN", VOTES | {"label": float("nan")}, "bad_label", VOTES),
    _bad("a vote of 400 digits", VOTES | {"label": 10**400}, "bad_label", VOTES),
    _bad("a vote in a list", VOTES | {"label": [1]}, "bad_label", VOTES),
    _bad("a null vote", VOTES | {"label": None}, "null_field", VOTES),
    _bad("no vote", _without("label", VOTES), "missing_field", VOTES),
    _bad("a tie", VOTES | {"label": 0}, "tie", VOTES | {"label": 2}),
    _bad("a vote between both", VOTES | {"label": 1.5}, "tie", VOTES),
    _fine("a vote as text", VOTES | {"label": " 2 "}, like=VOTES),
    _bad("outputs that are the same", VOTES | {"output_2": "So."}, "identical", VOTES),
    _bad("a null output", VOTES | {"output_2": None}, "null_field", VOTES),
    _refused("nothing but 0", "votes.jsonl", _lines(*[VOTES | {"label": 0}] * 3), "`label` holds 0 (3 rows)"),
    _refused(
        "nothing but ties", "votes.jsonl", _lines(*[VOTES | {"label": 1.5}] * 3), "no usable row is left of 3: 3 tie"
    ),
    _refused(
        "votes from 0", "votes.jsonl", _lines(*[VOTES | {"label": 0}, VOTES] * 6), "`label` holds 0 (6 rows), 1 (6)"
    ),
    _fine("ratings as text", GOOD | {"chosen_score": "3", "rejected_score": "5"}, "flipped_rating"),
    _fine("ratings in words", GOOD | {"chosen_score": "high", "rejected_score": "low"}),
    _fine("equal ratings", GOOD | {"score_chosen": 4, "score_rejected": 4.0}, "tied_rating"),
    _fine("ratings of 400 digits", GOOD | {"chosen_score": 10**400, "rejected_score": 1}),
    _fine("ratings of NaN", GOOD | {"chosen_score": float("nan"), "rejected_score": 5}),
    _fine("ratings of true", GOOD | {"chosen_score": True, "rejected_score": 5}),
    _bad("a flag of maybe", UNPAIRED | {"label": "maybe"}, "bad_label", UNPAIRED, "unpaired"),
    _bad("a flag of 2", UNPAIRED | {"label": 2}, "bad_label", UNPAIRED, "unpaired"),
    _bad("a flag of null", UNPAIRED | {"label": None}, "null_field", UNPAIRED, "unpaired"),
    _bad("an empty completion", UNPAIRED | {"completion": " "}, "empty_text", UNPAIRED, "unpaired"),
    _bad("a null completion", UNPAIRED | {"completion": None}, "null_field", UNPAIRED, "unpaired"),
    _bad("a null question", QUESTION | {"prompt": None}, "null_field", QUESTION, "prompts"),
    _bad("an empty question", QUESTION | {"prompt": "\n"}, "empty_text", QUESTION, "prompts"),
    _fine(
        "strange columns for rewards",
        QUESTION | {"answer": {"\ud83d": [None, 10**400]}},
        like=QUESTION,
        records="prompts",
    ),
]

# ---- files of lines ---------------------------------------------------------------------------------------------

LINE = _line(GOOD)
JSON_LINES = [
    _refused("an empty file", "rows.jsonl", b"", "there are no rows in it"),
    _refused("blank lines alone", "rows.jsonl", b"\n \r\n\t\n", "there are no rows in it"),
    _refused("a byte order mark alone", "rows.jsonl", b"\xef\xbb\xbf", "there are no rows in it"),
    _file("blank lines", "rows.jsonl", b"\n" + LINE + b"\n \r\n" + LINE + b"\n\n", (2, 5)),
    _file("Windows line ends", "rows.jsonl", LINE.replace(b"\n", b"\r\n") * 2, (1, 2)),
    _file("no newline at the end", "rows.jsonl", (LINE * 2)[:-1], (1, 2)),
    _file("a writer that was stopped", "rows.jsonl", (LINE * 3)[:-10], (1, 2), broken_row=(3,)),
    _file("NULs at the end", "rows.jsonl", LINE * 2 + b"\0" * 99, (1, 2), broken_row=(3,)),
    _file("a byte order mark", "rows.jsonl", b"\xef\xbb\xbf" + LINE * 2, (1, 2)),
    _file("a first row that is broken", "rows.jsonl", b"{\n" + LINE, (2,), broken_row=(1,)),
    _file("a last row that is broken", "rows.jsonl", LINE + b"{", (1,), broken_row=(2,)),
    _refused("old Mac line ends", "rows.jsonl", LINE.replace(b"\n", b"\r") * 2, "1 broken_row"),
    _refused("UTF-16", "rows.jsonl", (LINE * 2).decode().encode("utf-16"), "UTF-16"),
    _refused("UTF-16, big endian", "rows.jsonl", b"\xfe\xff" + LINE.decode().encode("utf-16-be"), "UTF-16"),
    _refused("UTF-16 without a mark", "rows.jsonl", LINE.decode().encode("utf-16-le"), "no usable row is left of 2"),
    _refused("UTF-32", "rows.jsonl", LINE.decode().encode("utf-32"), "not UTF-8"),
    _refused("gzip named .jsonl", "rows.jsonl", gzip.compress(LINE, mtime=0), "not UTF-8 at byte 2"),
    _refused("Parquet named .jsonl", "rows.jsonl", b"PAR1\x15\x04\x15\xc0\n\x00PAR1", "no usable row is left"),
    _refused("a JSON list in lines", "rows.jsonl", json.dumps([GOOD], indent=1).encode(), "broken_row"),
    _refused("an unknown shape", "rows.jsonl", _lines({"text": "Why? So."}), "no known shape of pairs: `text`"),
    _refused("rows without columns", "rows.jsonl", b"{}\n{}\n", "its rows have no columns"),
    _file("rows of two shapes", "rows.jsonl", LINE * 2 + _lines(VOTES), (1, 2), missing_field=(3,)),
    _file("whole dialogues among pairs", "rows.jsonl", LINE * 2 + _lines(WHOLE), (1, 2, 3)),
]
JSON_LISTS = [
    _refused("JSON: an empty file", "rows.json", b"", "there are no rows in it"),
    _refused("JSON: an empty list", "rows.json", b" [ ]\n", "there are no rows in it"),
    _refused("JSON: one object", "rows.json", LINE, "the file holds an object"),
    _refused("JSON: rows under a key", "rows.json", b'{"data": [' + LINE + b"]}", "the file holds an object"),
    _refused("JSON: a string", "rows.json", b'"Why?"', "the file holds a string"),
    _refused("JSON: null", "rows.json", b"null", "the file holds null"),
    _refused("JSON: a row a line", "rows.json", LINE * 2, "let its name end in .jsonl"),
    _refused("JSON: a trailing comma", "rows.json", b"[" + LINE + b",]", ", line 2, column "),
    _refused("JSON: not closed", "rows.json", b"[" + LINE + b",", "not JSON"),
    _refused("JSON: latin-1", "rows.json", b'[{"prompt": "caf\xe9"}]', "not UTF-8 at byte"),
    _refused("JSON: UTF-16", "rows.json", "[]".encode("utf-16"), "UTF-16"),
    _refused("JSON: nested 100,000 deep", "rows.json", b"[" * 100_000, "nested too deeply"),
    _refused("JSON: a number of 5,000 digits", "rows.json", b"[" + b"9" * 5_000 + b"]", "too many digits"),
    _refused("JSON: a list in a list", "rows.json", b"[[" + LINE + b"]]", "not a JSON object but a list"),
    _refused("JSON: cut gzip", "rows.json.gz", gzip.compress(b"[" + LINE + b"]", mtime=0)[:-12], "cannot be read"),
    _file("JSON: a byte order mark", "rows.json", b"\xef\xbb\xbf[" + LINE + b"]", (1,)),
    _file(
        "JSON: mixed items",
        "rows.json",
        json.dumps([GOOD, 7, "Why?", None, [GOOD], GOOD | {"chosen": None}, GOOD]).encode(),
        (1, 7),
        broken_row=(2, 3, 4, 5),
        null_field=(6,),
    ),
    _file("JSON: NaN within a row", "rows.json", b'[{"n": NaN, ' + LINE.strip()[1:] + b"]", (1,)),
]

# ---- CSV --------------------------------------------------------------------------------------------------------

HEAD = b"prompt,chosen,rejected\n"
RECORD = b"Why?,So.,No.\n"
CSV = [
    _refused("CSV: an empty file", "rows.csv", b"", "there are no rows in it"),
    _refused("CSV: only a header", "rows.csv", HEAD, "there are no rows in it"),
    _refused("CSV: semicolons", "rows.csv", (HEAD + RECORD).replace(b",", b";"), "no known shape of pairs"),
    _refused("CSV: tabs", "rows.csv", (HEAD + RECORD).replace(b",", b"\t"), "no known shape of pairs"),
    _refused("CSV: no header", "rows.csv", RECORD * 2, "no known shape of pairs"),
    _refused("CSV: a column twice", "rows.csv", b"prompt,chosen,chosen\n" + RECORD, "a column is named twice"),
    _refused("CSV: a header that is not closed", "rows.csv", b'prompt,"chosen,rejected\n' + RECORD, "does not name"),
    _refused("CSV: a header in latin-1", "rows.csv", b"prompt,chosen,rejected,caf\xe9\n" + RECORD, "not UTF-8"),
    _refused("CSV: UTF-16", "rows.csv", (HEAD + RECORD).decode().encode("utf-16"), "UTF-16"),
    _refused("CSV: old Mac line ends", "rows.csv", (HEAD + RECORD).replace(b"\n", b"\r"), "does not name the columns"),
    _file("CSV: an empty header cell", "rows.csv", b"," + HEAD + b"0," + RECORD, (1,)),
    _file("CSV: a byte order mark", "rows.csv", b"\xef\xbb\xbf" + HEAD + RECORD, (1,)),
    _file("CSV: Windows line ends", "rows.csv", (HEAD + RECORD * 2).replace(b"\n", b"\r\n"), (1, 2)),
    _file("CSV: blank lines", "rows.csv", HEAD + b"\n" + RECORD + b"\r\n" + RECORD, (1, 2)),
    _file("CSV: no newline at the end", "rows.csv", HEAD + RECORD[:-1], (1,)),
    _file("CSV: newlines in cells", "rows.csv", HEAD + b'"Why\n\nnot?","So,\r\nso.",No.\n' + RECORD, (1, 2)),
    _file("CSV: quotes in cells", "rows.csv", HEAD + b'"Why ""not""?",5" wide,"a\n""b"""\n' + RECORD, (1, 2)),
    _file(
        "CSV: a quote left open, first row", "rows.csv", HEAD + b'"Why?,So.,No.\n' + RECORD * 2, (2, 3), broken_row=(1,)
    ),
    _file(
        "CSV: a quote left open, middle row",
        "rows.csv",
        HEAD + RECORD + b'Why?,"So.,No.\n' + b'"Why?","So.","No."\n' + RECORD,
        (1, 3, 4),
        broken_row=(2,),
    ),
    _file(
        "CSV: a quote left open, last row", "rows.csv", HEAD + RECORD * 2 + b'Why?,So.,"No.', (1, 2), broken_row=(3,)
    ),
    _file("CSV: every quote left open", "rows.csv", HEAD + b'"Why?,So.,No.\n' * 3 + RECORD, (4,), broken_row=(1, 2, 3)),
    _file("CSV: text behind a quote", "rows.csv", HEAD + b'"Why"?,So.,No.\n' + RECORD, (2,), broken_row=(1,)),
    _file("CSV: too few cells", "rows.csv", HEAD + RECORD + b"Why?,So.\n" + RECORD, (1, 3), broken_row=(2,)),
    _file("CSV: too many cells", "rows.csv", HEAD + RECORD + b"Why?,So.,No.,\n" + RECORD, (1, 3), broken_row=(2,)),
    _file("CSV: white space for a row", "rows.csv", HEAD + RECORD + b"  \n", (1,), broken_row=(2,)),
    _file("CSV: empty cells", "rows.csv", HEAD + b",,\n" + RECORD, (2,), empty_text=(1,)),
    _file("CSV: a NUL", "rows.csv", HEAD + b"Why\0,So.,No.\n" + RECORD, (2,), broken_row=(1,)),
    _file("CSV: latin-1", "rows.csv", HEAD + b"caf\xe9,So.,No.\n" + RECORD, (2,), broken_row=(1,)),
    _file("CSV: a million characters", "rows.csv", HEAD + b"x" * 10**6 + RECORD + RECORD, (2,), broken_row=(1,)),
    _refused(
        "CSV: nothing but a million characters", "rows.csv", HEAD + b"x" * 10**6 + RECORD, "a value has more than"
    ),
    _file("CSV: the header again", "rows.csv", HEAD + RECORD + HEAD + RECORD, (1, 2, 3)),
]

# ---- compressed files -------------------------------------------------------------------------------------------

_draw = random.Random(0)
# 256 bytes each; pyarrow reads as many of a .zst file at once.
LONG_LINES = [_line(GOOD | {"prompt": _draw.randbytes(110).hex()[: 256 - len(_line(GOOD)) + 4]}) for _ in range(40)]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda content: gzip.compress(content, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


def _cut(ending: str, share: float, name: str) -> Case:
    """Four members of ten rows each, cut: the rows of whole members are used, and those of a cut one that still can
    be read."""
    members = [COMPRESS[ending](b"".join(LONG_LINES[start : start + 10])) for start in range(0, 40, 10)]
    cut = b"".join(members)[: int(share * len(b"".join(members)))]
    whole, size = 0, 0
    while size + len(members[whole]) <= len(cut):
        size += len(members[whole])
        whole += 1
    good = 10 * whole + _readable_lines(ending, cut[size:])
    if not good:
        return _refused(name, f"rows.jsonl.{ending}", cut, "cannot be read")
    return _file(name, f"rows.jsonl.{ending}", cut, tuple(range(1, good + 1)), broken_row=(good + 1,))


def _readable_lines(ending: str, member: bytes) -> int:
    decompressors = {"gz": zlib.decompressobj(31), "bz2": bz2.BZ2Decompressor(), "xz": lzma.LZMADecompressor()}
    return decompressors[ending].decompress(member).count(b"\n") if ending in decompressors else 0


def _spoilt(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


COMPRESSED = [
    *(
        _cut(ending, share, f"{ending}: cut at {share:.1%}")
        for ending in COMPRESS
        for share in (0.002, 0.2, 0.4, 0.6, 0.8, 0.99)
    ),
    *(
        _file(f"{ending}: members", f"rows.jsonl.{ending}", COMPRESS[ending](LINE) * 3, (1, 2, 3))
        for ending in COMPRESS
    ),
    *(_refused(f"{ending}: not compressed", f"rows.jsonl.{ending}", LINE, "cannot be read") for ending in COMPRESS),
    *(
        _refused(
            f"{ending}: of an empty file", f"rows.jsonl.{ending}", COMPRESS[ending](b""), "there are no rows in it"
        )
        for ending in COMPRESS
    ),
    _refused("gz: an empty file", "rows.jsonl.gz", b"", "there are no rows in it"),
    _refused("gz: Parquet", "rows.parquet.gz", b"", "files that end in `.gz` are not read"),
    _file("gz: padded with NULs", "rows.jsonl.gz", COMPRESS["gz"](LINE * 2) + b"\0" * 64, (1, 2)),
    _file(
        "gz: blank lines, and rubbish behind it",
        "rows.jsonl.gz",
        COMPRESS["gz"](LINE + b"\n\n" + LINE) + b"rubbish!",
        (1, 4),
        broken_row=(5,),
    ),
    _file("gz: rubbish behind it", "rows.jsonl.gz", COMPRESS["gz"](LINE * 2) + b"rubbish!", (1, 2), broken_row=(3,)),
    _file("gz: a wrong checksum", "rows.jsonl.gz", _spoilt(COMPRESS["gz"](LINE * 2), -6), (1, 2), broken_row=(3,)),
    _file("gz: CSV", "rows.csv.gz", COMPRESS["gz"](HEAD + RECORD), (1,)),
    _file("gz: an ending in capitals", "ROWS.JSONL.GZ", COMPRESS["gz"](LINE), (1,)),
    _refused("gz: twice", "rows.jsonl.gz", COMPRESS["gz"](COMPRESS["gz"](LINE)), "not UTF-8"),
]

# ---- Parquet ----------------------------------------------------------------------------------------------------


def _parquet(columns: dict[str, Any], **options: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


def _texts(*values: str | None, of: Any = None) -> pa.Array:
    return pa.array(values, of or pa.string())


_TURN = pa.struct([("role", pa.string()), ("content", pa.string())])
_ANSWERS = {"chosen": _texts("So.", "So!", "So?"), "rejected": _texts("No.", "No!", "No?")}
_QUESTIONS = {"prompt": _texts("Why?", "How?", "Who?"), **_ANSWERS}
_WHOLE = _parquet(_QUESTIONS)
_BROKEN_UTF8 = pa.array([b"Why?", b"caf\xe9", b"Who?"]).view(pa.string())
PARQUET = [
    _refused("Parquet: an empty file", "rows.parquet", b"", "cannot be read"),
    _refused("Parquet: cut", "rows.parquet", _WHOLE[: len(_WHOLE) // 2], "cannot be read"),
    _refused("Parquet: cut within its end", "rows.parquet", _WHOLE[:-3], "cannot be read"),
    _refused("Parquet: its marks alone", "rows.parquet", b"PAR1PAR1", "cannot be read"),
    _refused("Parquet: JSON", "rows.parquet", LINE, "cannot be read"),
    _refused("Parquet: no rows", "rows.parquet", _parquet({"prompt": _texts()}), "there are no rows in it"),
    _refused("Parquet: other columns", "rows.parquet", _parquet({"text": _texts("Why?")}), "no known shape of pairs"),
    _refused(
        "Parquet: numbers for texts", "rows.parquet", _parquet({**_ANSWERS, "prompt": [1, 2, 3]}), "is a number that"
    ),
    _refused(
        "Parquet: bytes for texts",
        "rows.parquet",
        _parquet({**_ANSWERS, "prompt": pa.array([b"Why?", b"How?", b"Who?"])}),
        "no known shape of pairs",
    ),
    _file("Parquet: three rows", "rows.parquet", _WHOLE, (1, 2, 3)),
    _file(
        "Parquet: a null text",
        "rows.parquet",
        _parquet({**_ANSWERS, "prompt": _texts("Why?", None, "Who?")}),
        (1, 3),
        null_field=(2,),
    ),
    _file(
        "Parquet: text that is not UTF-8",
        "rows.parquet",
        _parquet({**_ANSWERS, "prompt": _BROKEN_UTF8}),
        (1, 3),
        broken_row=(2,),
    ),
    _file(
        "Parquet: dictionaries",
        "rows.parquet",
        _parquet({**_ANSWERS, "prompt": _texts("Why?", "Why?", "Who?").dictionary_encode()}),
        (1, 2, 3),
    ),
    _file(
        "Parquet: large strings",
        "rows.parquet",
        _parquet({**_ANSWERS, "prompt": _texts("Why?", "How?", "Who?", of=pa.large_string())}),
        (1, 2, 3),
    ),
    _file(
        "Parquet: lists of messages",
        "rows.parquet",
        _parquet(
            {
                **_ANSWERS,
                "prompt": pa.array(
                    [[user("Why?")], None, [{"role": "user", "content": None}]],
                    pa.list_(_TURN),
                ),
            }
        ),
        (1,),
        null_field=(2, 3),
    ),
    _file(
        "Parquet: empty lists and null messages",
        "rows.parquet",
        _parquet({**_ANSWERS, "prompt": pa.array([[user("Why?")], [], [None]], pa.list_(_TURN))}),
        (1,),
        empty_text=(2,),
        bad_message=(3,),
    ),
    _file(
        "Parquet: times that no calendar has",
        "rows.parquet",
        _parquet({**_QUESTIONS, "time": pa.array([0, 2**62, 0], pa.timestamp("us"))}),
        (1, 3),
        broken_row=(2,),
    ),
    _file(
        "Parquet: dates, bytes, decimals and nanoseconds in other columns",
        "rows.parquet",
        _parquet(
            {
                **_QUESTIONS,
                "day": [datetime.date(1, 1, 1)] * 3,
                "raw": [b"\xff"] * 3,
                "score_chosen": [decimal.Decimal("1.5")] * 3,
                "at": pa.array([1, 2, 3], pa.timestamp("ns")),
                "of": pa.array([{"a": 1}] * 3, pa.map_(pa.string(), pa.int8())),
            }
        ),
        (1, 2, 3),
    ),
    Case(
        "Parquet: dates and bytes for rewards",
        _written("rows.parquet", _parquet({"prompt": ["Why?"], "day": [datetime.date(1, 1, 1)], "raw": [b"\xff"]})),
        used=(1,),
        kind="prompts",
    ),
]

# ---- paths ------------------------------------------------------------------------------------------------------


def _folder(files: Mapping[str, bytes | None]) -> Callable[[Path], Path]:
    """A folder of files, and of folders for None."""

    def make(folder: Path) -> Path:
        (folder / "rows").mkdir()
        for name, content in files.items():
            path = folder / "rows" / name
            path.mkdir() if content is None else path.write_bytes(content)
        return folder / "rows"

    return make


def _path(name: str, do: Callable[[Path], None]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        do(folder / name)
        return folder / name

    return make


def _mistyped(name: str) -> Callable[[Path], Path]:
    """A path that is not there, beside a file of that name."""
    return lambda folder: _written(name, LINE)(folder).with_name("row.jsonl")


def _forbidden(path: Path) -> None:
    path.write_bytes(LINE)
    path.chmod(0)


def _beside_a_pipe(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / "a.jsonl")
    (path / "b.jsonl").write_bytes(LINE)


_CUT_FILE = COMPRESS["gz"](b"".join(LONG_LINES[:10]))[:-40]
_CUT_ROWS = _readable_lines("gz", _CUT_FILE)
PATHS = [
    Case("no such file", _path("rows.jsonl", lambda path: None), refused="no such file"),
    Case("no such file, but a like one", _mistyped("rows.jsonl"), refused="did you mean `rows.jsonl`"),
    Case("no such file, but one not in UTF-8", _mistyped(os.fsdecode(b"rows\xe9.jsonl")), refused="`rows\\xe9.jsonl`"),
    Case("no such file, but another not in UTF-8", _mistyped(os.fsdecode(b"\xe9.json")), refused="folder: \\xe9.json"),
    Case(
        "no ending", _path("rows", lambda path: path.write_bytes(LINE) and None), refused="the file name has no ending"
    ),
    Case("an unknown ending", _written("rows.txt", LINE), refused="files that end in `.txt` are not read"),
    Case("an empty folder", _folder({}), refused="no file in this folder can be read"),
    Case("a folder named like a file", _path("rows.jsonl", Path.mkdir), refused="no file in this folder can be read"),
    Case("a folder of other files", _folder({"a.txt": LINE, ".b.jsonl": LINE}), refused="no file in this folder"),
    Case("a folder in a folder", _folder({"a.jsonl": LINE, "b.jsonl": None}), used=(("a.jsonl", 1),)),
    Case("a link to itself", _path("rows.jsonl", lambda path: path.symlink_to(path)), refused="leads nowhere"),
    Case("a link to nothing", _path("rows.jsonl", lambda path: path.symlink_to("gone")), refused="leads nowhere"),
    Case("a pipe", _path("rows.jsonl", os.mkfifo), refused="no regular file"),
    Case("a folder with a pipe", _path("rows", _beside_a_pipe), used=(("b.jsonl", 1),)),
    Case("/dev/null", lambda folder: Path("/dev/null"), refused="no regular file"),
    Case("/dev/zero", lambda folder: Path("/dev/zero"), refused="no regular file"),
    Case("a pattern without a match", lambda folder: folder / "*.jsonl", refused="no file matches"),
    Case("a name like a pattern", _written("rows[1].jsonl", LINE), used=(1,)),
    Case("a name with a newline", _written("ro\nws.jsonl", LINE), used=(1,)),
    Case("a name that is not UTF-8", _folder({os.fsdecode(b"caf\xe9.jsonl"): LINE}), used=(("caf\\xe9.jsonl", 1),)),
    Case("a name too long", lambda folder: folder / ("x" * 300 + ".jsonl"), refused="cannot be read"),
    Case("a path through a file", lambda folder: _written("a.jsonl", LINE)(folder) / "b.jsonl", refused="no such file"),
    Case("a forbidden file", _path("rows.jsonl", _forbidden), refused="Permission denied", root_can=True),
    Case(
        "a folder with empty files",
        _folder({"a.jsonl": b"", "b.csv": HEAD, "c.json": b"[]", "d.jsonl": LINE}),
        used=(("d.jsonl", 1),),
    ),
    Case(
        "a folder with a cut file",
        _folder({"a.jsonl": LINE, "b.jsonl.gz": _CUT_FILE, "c.csv": HEAD + RECORD}),
        used=(("a.jsonl", 1), *(("b.jsonl.gz", row) for row in range(1, _CUT_ROWS + 1)), ("c.csv", 1)),
        found={"broken_row": (("b.jsonl.gz", _CUT_ROWS + 1),)},
    ),
    Case(
        "a folder with a file of another kind",
        _folder({"a.jsonl": LINE * 2, "b.parquet": LINE}),
        refused="b.parquet: cannot be read",
    ),
    Case(
        "a folder of two shapes",
        _folder({"a.jsonl": LINE * 2, "b.jsonl": _lines(VOTES)}),
        used=(("a.jsonl", 1), ("a.jsonl", 2)),
        found={"missing_field": (("b.jsonl", 1),)},
    ),
]

CASES = [
    *NOT_JSON,
    *ENCODINGS,
    *FIELDS,
    *MESSAGES,
    *DIALOGUES,
    *LABELS,
    *JSON_LINES,
    *JSON_LISTS,
    *CSV,
    *COMPRESSED,
    *PARQUET,
    *PATHS,
]
