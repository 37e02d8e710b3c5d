"""A row of a recipe's data, from its file to its tokens, prepared by the same code as all rows.

Data in: where the row is (`12`, `pairs.jsonl:12`); data out: `SeenRow`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, takewhile
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast

from prefold.data.chat import Writer, require_chat_template, tokenize_all
from prefold.data.duplicates import Contamination
from prefold.data.findings import about_problems
from prefold.data.formats import RawRow
from prefold.data.mixture import HEAD_ROWS, Side, head_of, unpaired
from prefold.data.preference import Problem, Record, RowId, Unpaired
from prefold.data.selection import benchmark_texts, select_rows
from prefold.data.shapes import Kind, shape_of
from prefold.data.sources import names_of_rows, read_rows
from prefold.data.survey import messages_of, parts_of
from prefold.errors import UserError
from prefold.recipe import Data, Source
from prefold.recipe.where import Mismatch, Where
from prefold.trees.packing import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Seen = tuple[Record, list[str] | None, TokenTree | None]
"""A record, its rendered texts (the prompt, and the conversation with each answer), and its tree; None if there is
none."""
LONGEST_CHARACTER = 4
"""The most tokens that a character can take: one for each byte in UTF-8."""


@dataclass(frozen=True)
class SeenRow:
    """A row as it is read, and the records made of it; `left_out` says why it, or a part of it, is not trained on."""

    raw: RawRow
    split: str
    shape: str
    records: list[Seen]
    left_out: list[Problem]
    oddities: list[Problem]
    data: Data
    tokenizer: PreTrainedTokenizerBase

    def as_json(self) -> dict[str, Any]:
        """With an entry of `messages`, `rendered` and `tokens` for each record."""
        findings = [{**asdict(finding), "rows": []} for finding in about_problems(self.oddities, self.data)]
        return {
            "row": asdict(self.raw.origin),
            "split": self.split,
            "recognised_as": self.shape,
            "left_out": [{"kind": problem.kind, "message": problem.message} for problem in self.left_out],
            "findings": findings,
            "read": self.raw.value,
            "messages": [messages_of(record) for record, _, _ in self.records],
            "rendered": [texts and dict(zip(parts_of(of), texts, strict=True)) for of, texts, _ in self.records],
            "tokens": [tree and tokens_of(record, tree, self.tokenizer) for record, _, tree in self.records],
        }


def tokens_of(record: Record, tree: TokenTree, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[dict[str, Any]]]:
    """The tokens of each part of a record as `{id, text, part}`, where `part` is prompt, context or scored."""
    context = tree.context or ((),) * len(tree.completions)
    parts = [["prompt"] * len(tree.prompt)]
    for ids, spans in zip(tree.completions, context, strict=True):
        unscored = {index for start, stop in spans for index in range(start, stop)}
        parts.append(["context" if index in unscored else "scored" for index in range(len(ids))])
    return {
        name: [
            {"id": token, "text": text, "part": part}
            for token, text, part in zip(ids, _texts(ids, tokenizer), of_tokens, strict=True)
        ]
        for name, ids, of_tokens in zip(parts_of(record), (tree.prompt, *tree.completions), parts, strict=True)
    }


def _texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """What each token adds to the text; a character of several tokens is added by the last of them."""

    def decoded(first: int, last: int) -> str:
        settings = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return cast(str, tokenizer.decode(list(ids[first:last]), **settings))

    before = start = 0
    for stop in range(1, len(ids) + 1):
        # Decoded with the tokens before it, since some decoders drop a space at the start.
        known, text = decoded(before, start), decoded(before, stop)
        if text.endswith("\ufffd") and stop - start < LONGEST_CHARACTER and stop < len(ids):
            yield ""
        else:
            yield text[len(known) :]
            before, start = start, stop


def see_row(
    row: str,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    kind: Kind,
    value: dict[str, Any] | None = None,
) -> SeenRow:
    """Read up to a row and convert it as `load_split` would. If the source is drawn from, all its rows are read.

    Args:
        row: its 1-based number as in findings, after the name of its source or file and a colon if there are several.
        value: the content of the row if it is known, so that its file need not be read up to it.

    Raises:
        UserError: the row does not exist, the name is ambiguous, or its source cannot be read or recognised.
    """
    if data.template == "chat":
        require_chat_template(tokenizer)
    # A bad row, which may stop a run, is shown here.
    lenient = data.model_copy(update={"bad_rows": "drop", **({"overlong": "drop"} if data.overlong == "error" else {})})
    name, matches = _matches(row, data)
    seen = []
    for split, source in matches:
        origin = RowId(name, int(row.rpartition(":")[2]))
        contamination = None
        if split == "train" and data.decontaminate:
            contamination = Contamination(chain.from_iterable(map(benchmark_texts, data.decontaminate)))
        side = Side(split, lenient, tokenizer, kind, contamination, None)
        raw = _read(source, origin) if value is None else RawRow(origin, value)
        seen.append(_seen(raw, source, getattr(data, split), side, seed))
    # The same file may be a source twice, with conditions that leave the row to one of them.
    return min(seen, key=lambda candidate: bool(candidate.left_out))


def _matches(row: str, data: Data) -> tuple[str, list[tuple[str, Source]]]:
    """The name of the source in the row's origin, and the sources that may contain the row, each with its split."""
    wanted, _, number = row.rpartition(":")
    if not number.isdecimal() or not int(number):
        raise UserError(f"`{row}` is no row", where="`--row`", expected="its number, such as 12 or pairs.jsonl:12")
    by_name: dict[str, list[tuple[str, Source]]] = {}
    for split in ("train", "eval"):
        for source in getattr(data, split):
            for name in names_of_rows(source):
                by_name.setdefault(name, []).append((split, source))
    fitting = {
        name: sources
        for name, sources in by_name.items()
        if not wanted or wanted in (name, PurePath(name).name) or any(wanted == source.path for _, source in sources)
    }
    if wanted in by_name:  # a source's path may be the name of another's rows as well
        return wanted, by_name[wanted]
    if len(fitting) == 1:
        return next(iter(fitting.items()))
    shown = "".join(f"\n    {name}:{number}" for name in list(fitting or by_name)[:8])
    what = f"`{wanted}` is no source of the recipe" if not fitting else f"there are {len(fitting)} sources with rows"
    raise UserError(what, where="`--row`", expected=f"the source and the row, such as{shown}")


def _read(source: Source, origin: RowId) -> RawRow:
    last = 0
    for raw in read_rows(source):
        if raw.origin == origin:
            return raw
        if raw.origin.source == origin.source:
            last = raw.origin.row
            if last > origin.row:
                raise UserError(f"row {origin.row} is empty", where=origin.source, advice=f"the next is {last}")
    raise UserError(f"there is no row {origin.row}", where=origin.source, expected=f"1 to {last}")


def _seen(raw: RawRow, source: Source, sources: Sequence[Source], side: Side, seed: int) -> SeenRow:
    before = [other for other in sources[: sources.index(source)] if side.repeats]
    weighted = [other for other in sources if source.weight and other.weight]
    needed = [other for other in sources if other is source or other in before or other in weighted]
    selections = dict(zip(map(id, needed), select_rows(needed, seed), strict=True))
    rows = selections[id(source)].rows
    head = list(head_of(rows))
    shape = shape_of(head, source, side.kind)
    left_out = _filtered(raw, source)
    if not left_out and (source.count or source.weight or side.repeats):
        for other in before:
            _read_through(list(selections[id(other)].rows), other, side)
        drawn = list(chain(head, rows))
        earlier = list(takewhile(lambda row: row.origin != raw.origin, drawn))
        if len(earlier) == len(drawn):
            left_out = [Problem("not_drawn", "`count` or `weight` does not draw it", raw.origin)]
        elif side.repeats:
            _read_through(earlier, source, side)
    side.oddities.clear()
    if side.decisions:
        side.decisions.check(raw)
        side.oddities += side.decisions.flips(raw.origin)
    records = []
    for result in side.records_of(raw, shape):
        more, problem = ([], result) if isinstance(result, Problem) else _tokenized(result, side)
        records += more
        left_out += [problem] if problem else []
    return SeenRow(raw, side.name, shape.name, records, left_out, side.oddities, side.data, side.tokenizer)


def _filtered(raw: RawRow, source: Source) -> list[Problem]:
    """Why `where` leaves the row out, if it does."""
    try:
        if raw.value is None or not source.where or Where(source.where)(raw.value):
            return []
        return [Problem("filtered", f"`where: {source.where}` leaves it out", raw.origin)]
    except Mismatch as mismatch:
        return [Problem("where_failed", str(mismatch), raw.origin)]


def _read_through(rows: Sequence[RawRow], source: Source, side: Side) -> None:
    """Convert earlier rows, so that the side knows what a row may repeat."""
    for _ in side.usable(rows, shape_of(rows[:HEAD_ROWS], source, side.kind)):
        pass


def _tokenized(record: Record, side: Side) -> tuple[list[Seen], Problem | None]:
    written = Writer(side.tokenizer, side.data.template).written(record)
    if isinstance(written, Problem):
        return [(record, None, None)], written
    texts = [written.prompt, *written.conversations]
    [tokenized] = tokenize_all([record], side.tokenizer, side.data.template)
    if isinstance(tokenized, Problem):
        return [(record, texts, None)], tokenized
    example = side.example_of(record, tokenized)
    if isinstance(example, Problem):
        return [(record, texts, tokenized.tree)], example
    if side.kind != "unpaired" or isinstance(record, Unpaired):
        return [(record, texts, example.tree)], None
    answers = zip(unpaired(example), texts[1:], strict=True)
    return [(answer.record, [texts[0], text], answer.tree) for answer, text in answers], None
