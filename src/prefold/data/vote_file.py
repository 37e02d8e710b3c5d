"""`votes.jsonl`: people's votes on two answers to a prompt, one a line; and such a file as a source of data.

    {"id", "voter", "prompt": messages, "answer_a", "answer_b", "model_a", "model_b", "winner", "note", "time"}
    {"undo": the id of a vote, "voter", "time"}

The file is append-only. Of the votes of a voter on the same two answers, in either order, the last one that was not
undone counts.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from prefold.data.formats import RawRow, read_file
from prefold.data.preference import short
from prefold.errors import UserError
from prefold.files import without_home

WINNERS = ("a", "b", "tie", "both bad")
_FIELDS = ("prompt", "answer_a", "answer_b", "winner", "voter")
_OF_ONE_VOTE = ("id", "voter", "note", "time")


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append a line of JSON, and flush it to the disk. What a crash left of a last line is removed first, since it was
    not yet acknowledged; a last line that only lacks its newline is kept. Raises UserError: it cannot be written."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
    try:
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if torn := _last_line(file):
                if _is_json(torn):
                    line = b"\n" + line
                else:
                    file.truncate(file.seek(0, os.SEEK_END) - len(torn))
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=without_home(str(path))) from None


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _last_line(file: Any) -> bytes:
    """What follows the last newline."""
    end, tail = file.seek(0, os.SEEK_END), b""
    while b"\n" not in tail and len(tail) < end:
        start = max(0, end - len(tail) - 4096)
        file.seek(start)
        tail = file.read(end - len(tail) - start) + tail
    return tail.rpartition(b"\n")[2]


# ---- what counts ------------------------------------------------------------------------------------------------


def read_votes(path: Path) -> list[dict[str, Any]]:
    """The votes that count, in line order; empty if there is no file. Raises UserError: it cannot be
    read."""
    rows = read_file(path, without_home(str(path))) if path.exists() else ()
    lines = {row.origin.row: row.value for row in rows if row.value is not None}
    votes = {number: line for number, line in lines.items() if "undo" in line or not _misfit(line)}
    return [
        votes[number]
        for number in sorted(chain.from_iterable(by_voter.values() for by_voter in _counting(votes).values()))
    ]


def holds_votes(path: Path) -> bool:
    """Whether any line is a vote, undone or not."""
    return any(not _misfit(row.value) for row in read_file(path, without_home(str(path))) if row.value is not None)


def compared_key(prompt: Any, answers: Iterable[Any]) -> str:
    """A text that is the same for the same two answers to a prompt, in either order."""
    return json.dumps([prompt, sorted(map(json.dumps, answers))], sort_keys=True)


def key_of(vote: Mapping[str, Any]) -> str:
    return compared_key(vote["prompt"], (vote["answer_a"], vote["answer_b"]))


def preference_for(answer: Any, vote: Mapping[str, Any]) -> float:
    """1 where a vote prefers this one of its two answers, 0 for the other one, 0.5 for neither."""
    share = {"a": 1.0, "b": 0.0}.get(vote["winner"], 0.5)
    return share if vote["answer_a"] == answer else 1 - share


def _counting(lines: Mapping[int, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """The numbers of the votes that count, by `key_of` the vote and by voter."""
    undone = {str(line["undo"]) for line in lines.values() if "undo" in line}
    standing: dict[str, dict[str, int]] = {}
    for number, line in lines.items():
        if "undo" not in line and str(line.get("id")) not in undone:
            standing.setdefault(key_of(line), {})[line["voter"].strip()] = number
    return standing


def _misfit(line: Mapping[str, Any]) -> str:
    """Why a line is not a vote; empty if it is one."""
    if missing := [name for name in _FIELDS if name not in line]:
        return f"`{missing[0]}` is missing"
    if line["winner"] not in WINNERS:
        return f"`winner` is `{short(str(line['winner']))}`, not one of {', '.join(WINNERS)}"
    return "" if isinstance(line["voter"], str) and line["voter"].strip() else "`voter` is no name"


# ---- as data ----------------------------------------------------------------------------------------------------


def joined_votes(rows: Iterable[RawRow]) -> Iterator[RawRow]:
    """Rows as they are, unless the first one that can be read is a vote. Then the votes that count on the same two
    answers become one row, in place of the first: its `winner` is that of the majority, and `voters` are those who
    voted. The other lines are left out, each with the kind of the finding that counts it."""
    reading, head = iter(rows), list[RawRow]()
    while not (head and head[-1].value is not None) and (row := next(reading, None)) is not None:
        head.append(row)
    if not head or not set(_FIELDS) <= (head[-1].value or {}).keys():
        yield from chain(head, reading)
        return
    all_rows = [*head, *reading]
    lines = {number: row.value for number, row in enumerate(all_rows) if row.value is not None}
    misfits = {number: _misfit(line) for number, line in lines.items() if "undo" not in line}
    votes = {number: line for number, line in lines.items() if not misfits.get(number)}
    joined = {min(by_voter.values()): list(by_voter.values()) for by_voter in _counting(votes).values()}
    first_of = {number: first for first, numbers in joined.items() for number in numbers}
    for number, row in enumerate(all_rows):
        if number in joined:
            yield _joined(row, [votes[at] for at in joined[number]])
        elif row.value is None:
            yield row
        elif misfits.get(number):
            yield RawRow(row.origin, None, misfits[number], kind="bad_label")
        elif number in first_of:
            yield RawRow(row.origin, None, f"counts with {all_rows[first_of[number]].origin}", kind="voted_again")
        else:
            yield RawRow(row.origin, None, "undone, replaced, or what undoes a vote", kind="withdrawn")


def _joined(row: RawRow, votes: Sequence[Mapping[str, Any]]) -> RawRow:
    assert row.value is not None
    shares = [preference_for(row.value["answer_a"], vote) for vote in votes]
    lead = shares.count(1.0) - shares.count(0.0)
    neither = "both bad" if all(vote["winner"] == "both bad" for vote in votes) else "tie"
    kept = {name: cell for name, cell in row.value.items() if name not in _OF_ONE_VOTE}
    kept |= {
        "winner": "a" if lead > 0 else "b" if lead < 0 else neither,
        "voters": [vote["voter"].strip() for vote in votes],
    }
    return replace(row, value=kept, kind="voters_differ" if len(set(shares)) > 1 else "")
