"""The sources of a recipe -> what is trained on, what is held out, and a report on both.

    sources -> rows -> preferences -> token trees that fit -> train | held out

Every row that is read is either an example or counted as a problem. The same recipe, tokenizer and seed give the same
examples in the same order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import track

from prefold.data import findings
from prefold.data.chat import fit, require_chat_template, tokenize
from prefold.data.findings import DataReport, SourceCount
from prefold.data.preference import Preference, Problem, RowId, find_shape, messages_key, to_preference
from prefold.data.sources import RawRow, read_rows, source_name
from prefold.errors import UserError
from prefold.recipe import Data, Source
from prefold.trees.packing import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBLEMS_SHOWN = 5


@dataclass(frozen=True)
class Example:
    """A pair as it was written and as it is trained on: `tree.completions` is `(chosen, rejected)`."""

    preference: Preference
    tree: TokenTree


@dataclass(frozen=True)
class Prepared:
    train: list[Example]
    held_out: list[Example]
    report: DataReport


@dataclass
class _Collected:
    """What has come of the rows so far; `oddities` are rows that are used, by kind of finding."""

    examples: list[Example] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    oddities: dict[str, list[RowId]] = field(default_factory=dict)
    sources: list[SourceCount] = field(default_factory=list)


def load_split(data: Data, tokenizer: PreTrainedTokenizerBase, seed: int) -> Prepared:
    """Read, convert, tokenize and split everything that `data` names.

    Raises:
        UserError: a source cannot be read or has no known columns, the tokenizer has no chat template, no usable row is
            left, a bad or overlong row where the policy is `error`, or nothing to hold out of a single prompt.
    """
    require_chat_template(tokenizer)
    collected = _Collected()
    train = _collect(data.train, "data.train", data, tokenizer, collected)
    held_out = _collect(data.eval, "data.eval", data, tokenizer, collected) if data.eval else []
    if data.eval_fraction:
        train, held_out = hold_out(train, data.eval_fraction, seed)
    about_rows = [findings.about_rows(kind, rows) for kind, rows in collected.oddities.items()]
    report = DataReport(
        sources=tuple(collected.sources),
        findings=findings.by_severity(
            findings.about_problems(collected.problems, data) + about_rows + findings.about_sets(train, held_out)
        ),
        train=findings.count_tokens(train),
        held_out=findings.count_tokens(held_out),
    )
    return Prepared(train, held_out, report)


def hold_out(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split into (train, held out), about `fraction` of the examples held out, all pairs of a prompt on one side.

    Which prompts are held out hangs on the seed and on the prompts themselves, not on the order of the rows.

    Raises:
        UserError: all examples have the same prompt.
    """
    sizes = Counter(messages_key(example.preference.prompt) for example in examples)
    if len(sizes) < 2:
        raise UserError(
            "all usable rows have the same prompt, so none can be held out",
            where="`data.eval_fraction`",
            advice="give held-out pairs of their own in `data.eval`",
        )
    drawn = sorted(sizes, key=lambda prompt: hashlib.sha256(f"{seed} {prompt}".encode()).digest())
    wanted = min(round(fraction * len(examples)), len(examples) - 1)
    chosen: set[str] = set()
    for prompt in drawn:
        if sizes[prompt] <= wanted:
            chosen.add(prompt)
            wanted -= sizes[prompt]
    chosen = chosen or {min(drawn, key=lambda prompt: sizes[prompt])}
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        sides[messages_key(example.preference.prompt) in chosen].append(example)
    return sides


def _collect(
    sources: Sequence[Source], where: str, data: Data, tokenizer: PreTrainedTokenizerBase, into: _Collected
) -> list[Example]:
    """Read `sources` into `into` and return their examples."""
    examples_before, problems_before = len(into.examples), len(into.problems)
    for source in sources:
        rows = list(read_rows(source))
        name = source_name(source)
        shape = find_shape(rows, name)
        used_before = len(into.examples)
        for row in _watched(rows, name):
            _take(row, data, tokenizer, into)
        into.sources.append(SourceCount(name, shape, len(rows), len(into.examples) - used_before))
    examples = into.examples[examples_before:]
    if not examples:
        raise _nothing_left(into.problems[problems_before:], where)
    return examples


def _watched(rows: Sequence[RawRow], name: str) -> Iterable[RawRow]:
    """The rows, with a progress bar on stderr where a person sits before it."""
    console = Console(stderr=True)
    return track(rows, f"reading {escape(name)}", console=console, transient=True, disable=not console.is_terminal)


def _take(row: RawRow, data: Data, tokenizer: PreTrainedTokenizerBase, into: _Collected) -> None:
    """Make one row an example or a problem."""
    result = _example(row, data, tokenizer, into.oddities)
    if isinstance(result, Example):
        into.examples.append(result)
        return
    name, policy = ("overlong", data.overlong) if result.kind == "overlong" else ("bad_rows", data.bad_rows)
    if policy == "error":
        raise UserError(
            result.message,
            where=f"{result.origin.source}, row {result.origin.row}",
            advice=f"mend the row, or set `data.{name}: drop`",
        )
    into.problems.append(result)


def _example(
    row: RawRow, data: Data, tokenizer: PreTrainedTokenizerBase, oddities: dict[str, list[RowId]]
) -> Example | Problem:
    preference = to_preference(row)
    if isinstance(preference, Problem):
        return preference
    tokenized = tokenize(preference, tokenizer)
    if isinstance(tokenized, Problem):
        return tokenized
    tree = fit(tokenized, data)
    if isinstance(tree, Problem):
        return tree
    truncated = "prompt_truncated" if tree != tokenized.tree else None
    for kind in (tokenized.boundary, tokenized.ending, truncated):
        if kind is not None:
            oddities.setdefault(kind, []).append(row.origin)
    return Example(preference, tree)


def _nothing_left(problems: Sequence[Problem], where: str) -> UserError:
    kinds = Counter(problem.kind for problem in problems)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    first = "".join(
        f"\n    {problem.origin.source}, row {problem.origin.row}: {problem.message}"
        for problem in problems[:_PROBLEMS_SHOWN]
    )
    only_overlong = set(kinds) == {"overlong"}
    return UserError(
        f"no usable row is left of {len(problems)}: {counts}{first}",
        where=f"`{where}`",
        advice="raise `data.max_length`" if only_overlong else "mend the rows; the first ones are named above",
    )
