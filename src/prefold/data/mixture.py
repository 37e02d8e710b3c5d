"""The sources of a recipe -> training data, held-out data, and a report on both.

    sources -> selected rows -> records -> token trees that fit -> without repeats -> train | held out

Every row that is read becomes an example (or several, from a ranking), or is counted as filtered by `where`, as not
drawn, or as a problem. The same recipe, tokenizer and seed give the same examples in the same order.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prefold.data import findings
from prefold.data.cells import is_empty
from prefold.data.chat import Tokenized, fit, require_chat_template, tokenize_all
from prefold.data.conversion import to_records
from prefold.data.decisions import Decisions
from prefold.data.duplicates import REPEATS, Contamination, Match
from prefold.data.examples import Example, Examples
from prefold.data.findings import DataReport, SourceCount
from prefold.data.formats import RawRow
from prefold.data.preference import Preference, Problem, Record, Unpaired, short, whole_prompt
from prefold.data.selection import Selection, benchmark_texts, select_rows, shuffled, watched
from prefold.data.shapes import Kind, Shape, shape_of
from prefold.data.templates import moving_date
from prefold.errors import UserError
from prefold.recipe import Data, Source
from prefold.trees.packing import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEAD_ROWS = 1000
"""Rows from which the shape of a source is recognised."""
_TOKENIZED_AT_ONCE = 256
_NO_FAULT = ("repeated", "contaminated", "struck", "tie", "small_margin", "voted_again", "withdrawn")


@dataclass(frozen=True)
class Prepared:
    train: Examples
    held_out: Examples
    report: DataReport
    fingerprints: dict[str, str]
    """SHA-256 of the token ids of `train` and of `held_out`."""


def load_split(
    data: Data, tokenizer: PreTrainedTokenizerBase, seed: int, kind: Kind = "pairs", folder: Path | None = None
) -> Prepared:
    """Read, convert, tokenize and split everything that `data` names.

    Args:
        kind: of records that the method trains on.
        folder: where `train.arrow` and `eval.arrow` are written; None: a temporary folder.

    Raises:
        UserError: a source cannot be read, is not recognised or has fewer rows than are to be drawn; the tokenizer has
            no chat template; no usable row is left; a row is bad or too long and the policy is `error`; all rows have
            the same prompt, so that none can be held out; or `data.decisions` does not fit the sources.
    """
    if data.template == "chat":
        require_chat_template(tokenizer)
    texts = chain.from_iterable(map(benchmark_texts, data.decontaminate))
    contamination = Contamination(texts) if data.decontaminate else None
    trained = Side("train", data, tokenizer, kind, contamination, folder)
    train = trained.examples_of(data.train, seed)
    evaluated = Side("eval", data, tokenizer, kind, None, folder)
    held_out = evaluated.examples_of(data.eval, seed) if data.eval else train[:0]
    if data.shuffle:
        train = train.select(shuffled(len(train), seed))
    if data.eval_fraction:
        train, held_out = hold_out(train, data.eval_fraction, seed)
    problems = trained.problems + evaluated.problems + trained.oddities + evaluated.oddities
    about = findings.about_problems(problems, data) + findings.left_out_in_part(trained.parts + evaluated.parts)
    if data.template == "none" and tokenizer.chat_template:
        about.append(findings.template_unused())
    first = train.records[0]
    if data.template == "chat" and (written := moving_date(tokenizer, list(first.prompt), **first.template_kwargs)):
        about.append(findings.date_moves(written))
    report = DataReport(
        sources=tuple(trained.counts + evaluated.counts),
        findings=findings.by_severity(about + findings.about_sets(train, held_out, tokenizer)),
        train=findings.count_tokens(train),
        held_out=findings.count_tokens(held_out),
        contamination=tuple(trained.matches),
    )
    fingerprints = {"train": findings.fingerprint(train), "held_out": findings.fingerprint(held_out)}
    return Prepared(train, held_out, report, fingerprints)


def unpaired(example: Example) -> list[Example]:
    """The two answers of a pair as labelled examples, chosen as desirable; any other example as it is."""
    record, tree = example.record, example.tree
    if not isinstance(record, Preference):
        return [example]
    return [
        Example(
            Unpaired(record.prompt, record.answers[i], label, record.origin, record.template_kwargs),
            TokenTree(tree.prompt, tree.completions[i : i + 1], tree.context[i : i + 1]),
        )
        for i, label in enumerate((True, False))
    ]


def hold_out(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Split into (train, held out), with about `fraction` of the examples held out and all those of a prompt together.

    Which prompts are held out depends on the seed and the prompts themselves, not on the order of the rows. Raises
    UserError: all examples have the same prompt.
    """
    keys = examples.prompt_keys
    sizes = Counter(keys)
    if len(sizes) < 2:
        what = "all usable rows have the same prompt, so none can be held out"
        advice = "give held-out rows of their own in `data.eval`"
        raise UserError(what, where="`data.eval_fraction`", advice=advice)
    drawn = sorted(sizes, key=lambda key: hashlib.sha256(f"{seed} ".encode() + key).digest())
    remaining = min(round(fraction * len(examples)), len(examples) - 1)
    held_out_keys: set[bytes] = set()
    for key in drawn:
        if sizes[key] <= remaining:
            held_out_keys.add(key)
            remaining -= sizes[key]
    held_out_keys = held_out_keys or {min(drawn, key=lambda key: sizes[key])}
    held_out = np.array([key in held_out_keys for key in keys])
    return examples.select(np.flatnonzero(~held_out)), examples.select(np.flatnonzero(held_out))


@dataclass
class Side:
    """Training or held-out data: what has become of its rows so far. `problems` has one entry for each row left out;
    `parts` are pairs and answers left out of rows that are used; `oddities` are about what is used."""

    name: str
    data: Data
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    contamination: Contamination | None
    folder: Path | None
    problems: list[Problem] = field(default_factory=list)
    parts: list[Problem] = field(default_factory=list)
    oddities: list[Problem] = field(default_factory=list)
    counts: list[SourceCount] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.repeats = None if self.data.duplicates == "keep" else REPEATS[self.data.duplicates]()
        self.decisions = Decisions.of(self.data)
        chat = self.data.template == "chat"
        self.by_template = findings.system_texts_of(self.tokenizer) if chat else ("", "")

    def examples_of(self, sources: Sequence[Source], seed: int) -> Examples:
        selections = zip(sources, select_rows(sources, seed, self.decisions), strict=True)
        converted = chain.from_iterable(self._converted(source, selection) for source, selection in selections)
        examples = Examples.of(converted, self.folder and self.folder / f"{self.name}.arrow")
        if not examples:
            kinds = Counter(problem.kind for problem in self.problems)
            counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            first = "".join(f"\n    {problem.origin}: {problem.message}" for problem in self.problems[:5])
            what = f"no usable row is left of {len(self.problems)}: {counts}{first}"
            only_overlong = set(kinds) == {"overlong"}
            advice = "raise `data.max_length`" if only_overlong else "mend the rows; the first ones are named above"
            raise UserError(what, where=f"`data.{self.name}`", advice=advice)
        return examples

    def _converted(self, source: Source, selection: Selection) -> Iterator[Example]:
        head = list(head_of(selection.rows))
        shape = shape_of(head, source, self.kind)
        used = made = 0
        rows = iter(watched(chain(head, selection.rows), selection.name))
        while batch := list(islice(rows, _TOKENIZED_AT_ONCE)):
            for examples in self.usable(batch, shape):
                used += 1
                for example in examples:
                    answers = unpaired(example) if self.kind == "unpaired" else [example]
                    made += len(answers)
                    yield from answers
        for problem in selection.problems:
            self._leave_out([problem])
        left_out = selection.rows_filtered, selection.rows_not_drawn
        counts = SourceCount(
            selection.name, shape.name, selection.rows_in, used, *left_out, tuple(map(short, shape.unused)), made
        )
        self.counts.append(counts)

    def usable(self, rows: Sequence[RawRow], shape: Shape) -> Iterator[list[Example]]:
        """The examples of each row that has any. Tokenizing many rows at once keeps all cores busy."""
        results = [self.records_of(row, shape) for row in rows]
        records = [result for of_row in results for result in of_row if not isinstance(result, Problem)]
        tokenized = iter(tokenize_all(records, self.tokenizer, self.data.template))
        for row, of_row in zip(rows, results, strict=True):
            made = [
                result if isinstance(result, Problem) else self.example_of(result, next(tokenized)) for result in of_row
            ]
            examples = [result for result in made if isinstance(result, Example)]
            if len(examples) < len(made):
                self._leave_out([result for result in made if isinstance(result, Problem)], bool(examples))
            if examples:
                filled = [name for name in shape.not_understood if not is_empty((row.value or {}).get(name))]
                self.oddities += [Problem("unread_column", f"`{name}`", row.origin) for name in filled]
                self.oddities += [Problem(row.kind, "", row.origin)] if row.kind else []
                self.oddities += self.decisions.flips(row.origin) if self.decisions else []
                yield examples

    def records_of(self, row: RawRow, shape: Shape) -> list[Record | Problem]:
        records = to_records(row, shape, self.data.system)
        if self.decisions:
            records = [self.decisions.applied(record) for record in records]
        return list(map(self._uncontaminated, records)) if self.contamination else records

    def _uncontaminated(self, record: Record | Problem) -> Record | Problem:
        """The record, or a problem if it contains text of a benchmark."""
        if isinstance(record, Problem) or not self.contamination:
            return record
        match = self.contamination.find((record.prompt, *record.answers), record.origin)
        if not match:
            return record
        # Several pairs of a row may contain the same words.
        if match not in self.matches[-1:]:
            self.matches.append(match)
        return Problem("contaminated", f"holds words of {match.benchmark}: {match.words}", record.origin)

    def example_of(self, record: Record, tokenized: Tokenized | Problem) -> Example | Problem:
        if isinstance(tokenized, Problem):
            return tokenized
        tree = fit(tokenized, self.data)
        if isinstance(tree, Problem):
            return tree
        # Last, so that a row is only left out for the sake of one that is used.
        if self.repeats and (earlier := self.repeats.earlier((whole_prompt(record), *record.answers), record.origin)):
            return Problem("repeated", f"repeats {earlier}", record.origin)
        truncated = ("prompt_truncated",) if tree != tokenized.tree else ()
        kinds = (*tokenized.oddities, *truncated)
        self.oddities += [Problem(kind, tokenized.details.get(kind, ""), record.origin) for kind in kinds]
        self.oddities += findings.oddities_of(record, self.data.template, self.by_template)
        return Example(record, tree)

    def _leave_out(self, problems: Sequence[Problem], row_is_used: bool = False) -> None:
        """Record the problems of a row. Raises UserError: the policy for one of them is `error`."""
        for problem in problems:
            name = "overlong" if problem.kind == "overlong" else "bad_rows"
            # Ties and votes that do not count are no fault of a row; the others are left out as the recipe asks.
            if getattr(self.data, name) == "error" and problem.kind not in _NO_FAULT:
                advice = f"mend the row, or set `data.{name}: drop`"
                raise UserError(problem.message, where=str(problem.origin), advice=advice)
        if row_is_used:
            self.parts += problems
        else:
            self.problems.append(problems[0])


def head_of(rows: Iterator[RawRow]) -> Iterator[RawRow]:
    """The rows up to the `HEAD_ROWS`-th that could be read."""
    readable = 0
    while readable < HEAD_ROWS and (row := next(rows, None)) is not None:
        readable += row.value is not None
        yield row
