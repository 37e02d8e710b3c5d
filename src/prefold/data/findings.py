"""What is wrong or odd with the data, by row, and how many tokens it comes to.

A finding is for a person: what was found, in how many rows, in which, and what to do. Only one of severity `error`
stops anything. Nothing is changed here: what is dropped or cut was dropped or cut before, and is counted here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from prefold.data.preference import Problem, RowId, messages_key
from prefold.recipe import Data

if TYPE_CHECKING:
    from prefold.data.mixture import Example

Severity = Literal["error", "warning", "note"]
ROWS_SHOWN = 20
FEW_HELD_OUT = 30
_BIASED_SHARE = 0.65


@dataclass(frozen=True)
class Finding:
    """`rows` are the first `ROWS_SHOWN` of the `count` rows concerned; none where it is about the whole set."""

    kind: str
    severity: Severity
    count: int
    rows: tuple[RowId, ...]
    message: str
    advice: str


@dataclass(frozen=True)
class SourceCount:
    """A source by the name its rows carry; `rows_used` became examples."""

    path: str
    shape: str
    rows_in: int
    rows_used: int


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of a set of trees. `packed` writes each prompt once, `plain` once per completion."""

    trees: int
    prompt: int
    completions: int
    packed: int
    plain: int
    longest: int
    """Tokens of the longest prompt and completion, which is what `max_length` bounds."""

    @property
    def shared_share(self) -> float:
        """Share of the plain tokens that need not be computed, because completions share their prompt."""
        return 1 - self.packed / self.plain if self.plain else 0.0

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "shared_share": round(self.shared_share, 4)}


@dataclass(frozen=True)
class DataReport:
    sources: tuple[SourceCount, ...]
    findings: tuple[Finding, ...]
    train: TokenCounts
    held_out: TokenCounts

    def as_json(self) -> dict[str, Any]:
        return {
            "sources": [asdict(source) for source in self.sources],
            "findings": [asdict(finding) | {"rows": list(map(asdict, finding.rows))} for finding in self.findings],
            "tokens": {"train": self.train.as_json(), "held_out": self.held_out.as_json()},
        }


# ---- findings about rows ----------------------------------------------------------------------------------------

# kind -> severity, message, advice
_ABOUT_ROWS: dict[str, tuple[Severity, str, str]] = {
    "broken_row": ("warning", "{rows} left out: not a JSON object", "write one JSON object per row"),
    "missing_field": ("warning", "{rows} left out: a field is missing", "add the field or remove the rows"),
    "null_field": ("warning", "{rows} left out: a field is null", "fill it in or remove the rows"),
    "empty_text": ("warning", "{rows} left out: a text is empty", "fill it in or remove the rows"),
    "not_text": ("warning", "{rows} left out: a field is not text", "write the value as a string"),
    "bad_message": (
        "warning",
        "{rows} left out: messages that make no pair",
        "messages are {role, content}; a prompt ends before the assistant answers",
    ),
    "identical": ("warning", "{rows} left out: chosen and rejected are the same", "remove the rows"),
    "template_refused": (
        "warning",
        "{rows} left out: the model's chat template refuses them",
        "the template may know no system message, or want strict turns",
    ),
    "overlong": (
        "warning",
        "{rows} left out: longer than `data.max_length`",
        "raise `data.max_length`, or set `data.overlong: truncate_prompt`",
    ),
    "prompt_truncated": (
        "warning",
        "{rows} lost the beginning of the prompt to fit `data.max_length`",
        "raise `data.max_length` to keep prompts whole",
    ),
    "prompt_not_prefix": (
        "warning",
        "{rows}: the prompt's tokens do not all begin the conversation",
        "the tokens in common are the prompt; look at the chat template",
    ),
    "no_end_token": (
        "warning",
        "{rows}: the chat template ends the answer without an end token",
        "the model will not learn to stop; use a template that ends turns",
    ),
}


def about_rows(kind: str, rows: Sequence[RowId]) -> Finding:
    """The finding of a kind that is counted row by row."""
    severity, message, advice = _ABOUT_ROWS[kind]
    return _finding(kind, severity, rows, message.replace("{rows}", _counted(len(rows), "row")), advice)


def about_problems(problems: Sequence[Problem], data: Data) -> list[Finding]:
    """One finding per kind of problem."""
    rows: dict[str, list[RowId]] = {}
    for problem in problems:
        rows.setdefault(problem.kind, []).append(problem.origin)
    found = [about_rows(kind, origins) for kind, origins in rows.items()]
    if data.overlong == "truncate_prompt":
        advice = "raise `data.max_length`; these completions alone fill it"
        found = [replace(finding, advice=advice) if finding.kind == "overlong" else finding for finding in found]
    return found


# ---- findings about sets ----------------------------------------------------------------------------------------


def duplicate(examples: Sequence[Example]) -> Finding | None:
    """Pairs that were there before, word for word."""
    seen: set[str] = set()
    repeated: list[RowId] = []
    for example in examples:
        pair = example.preference
        key = messages_key(pair.prompt, pair.chosen, pair.rejected)
        if key in seen:
            repeated.append(pair.origin)
        seen.add(key)
    message = f"{_counted(len(repeated), 'pair')} already there, word for word"
    advice = "remove the repeats, unless they are meant"
    return _finding("duplicate", "note", repeated, message, advice) if repeated else None


def prompt_in_both_splits(train: Sequence[Example], held_out: Sequence[Example]) -> Finding | None:
    """Held-out pairs whose prompt is trained on."""
    trained = {messages_key(example.preference.prompt) for example in train}
    rows = [example.preference.origin for example in held_out if messages_key(example.preference.prompt) in trained]
    message = f"{_counted(len(rows), 'held-out pair')} with a prompt that is also trained on"
    advice = "remove them from one side, or use `data.eval_fraction` instead"
    return _finding("prompt_in_both_splits", "warning", rows, message, advice) if rows else None


def held_out_small(held_out: Sequence[Example]) -> Finding | None:
    """Too few held-out pairs to tell a better model from a lucky one."""
    if len(held_out) >= FEW_HELD_OUT:
        return None
    message = f"only {_counted(len(held_out), 'held-out pair')}: too few to tell progress from luck"
    if not held_out:
        message = "no held-out pairs: nothing will show whether the model got better"
    advice = f"hold out {FEW_HELD_OUT} pairs or more by `data.eval` or `data.eval_fraction`"
    return Finding("held_out_small", "warning", len(held_out), (), message, advice)


def length_bias(examples: Sequence[Example]) -> Finding | None:
    """One side longer in more than 65 % of the pairs, and in more than chance would explain. Ties count one half."""
    lengths = [tuple(map(len, example.tree.completions)) for example in examples]
    chosen = sum(pair[0] > pair[1] for pair in lengths)
    rejected = sum(pair[0] < pair[1] for pair in lengths)
    # Twice the standard error of the count is the root of the number: small sets lean to one side by chance.
    threshold = max((_BIASED_SHARE - 0.5) * len(lengths), math.sqrt(len(lengths)))
    if abs(chosen - rejected) / 2 <= threshold:
        return None
    shares = [f"{100 * count / len(lengths):.0f} %" for count in (chosen, rejected)]
    message = f"chosen is the longer one in {shares[0]} of the pairs, rejected in {shares[1]}"
    advice = "the model may learn length; compare answer lengths after training"
    return Finding("length_bias", "note", max(chosen, rejected), (), message, advice)


def about_sets(train: Sequence[Example], held_out: Sequence[Example]) -> list[Finding]:
    """Every finding that takes more than one row to see."""
    found = [
        duplicate(train),
        duplicate(held_out),
        prompt_in_both_splits(train, held_out),
        held_out_small(held_out),
        length_bias(train),
    ]
    return [finding for finding in found if finding is not None]


def by_severity(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings, then notes, each in the order given."""
    order = get_args(Severity)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))


# ---- counts -----------------------------------------------------------------------------------------------------


def count_tokens(examples: Sequence[Example]) -> TokenCounts:
    trees = [example.tree for example in examples]
    return TokenCounts(
        trees=len(trees),
        prompt=sum(len(tree.prompt) for tree in trees),
        completions=sum(len(ids) for tree in trees for ids in tree.completions),
        packed=sum(tree.size for tree in trees),
        plain=sum(tree.plain_size for tree in trees),
        longest=max((len(tree.prompt) + max(map(len, tree.completions)) for tree in trees), default=0),
    )


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 over the token ids in order; says whether two runs were given the same data."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.tree.prompt, example.tree.completions]).encode())
    return digest.hexdigest()


def _finding(kind: str, severity: Severity, rows: Sequence[RowId], message: str, advice: str) -> Finding:
    return Finding(kind, severity, len(rows), tuple(rows[:ROWS_SHOWN]), message, advice)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
