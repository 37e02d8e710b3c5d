"""Rows that order several answers, by ratings, by ranks, or the best first; lists and trees -> rankings -> pairs.

A row holds a ranking, or several of them (a tree). `shapes` knows the columns of these layouts, `conversion` makes
records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any, Literal

from prefold.data.cells import MISSING, cell_at
from prefold.data.dialogues import read_answer
from prefold.data.preference import Message, Unfit, Writing, message, short
from prefold.errors import UserError, json_type
from prefold.recipe import Source
from prefold.recipe.values import Values, as_number

PairsFrom = Literal["best_worst", "adjacent", "all"]
ITEM_ROLES = ("answer", "rating", "rank")
"""Roles that `columns` may give to a key, or to a path of keys, inside the objects of a list of answers."""
_ANSWER_KEYS = ("answer", "response", "completion", "text", "output", "generation", "content")
# Keys that are taken for a rating (highest best) or a rank (lowest best) by themselves, the first before others. Other
# numbers may be lowest at the best answer, a toxicity score for one, so they have to be named.
_RATINGS = (
    *("overall_score", "overall_rating", "score", "rating", "reward", "pm_score", "rm_score", "reward_score"),
    *("fine-grained_score", "fine_grained_score"),
)
_KNOWN_KEYS = dict.fromkeys(_RATINGS, False) | dict.fromkeys(("rank", "ranking"), True)
_WORDS = {"chosen": 1.0, "rejected": 0.0}
_TREE_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant", "system": "system"}
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Rule:
    """What is made of a ranking: pairs (see `Source.pairs_from` and `Source.min_margin`), or unpaired answers: those of
    the pairs, or those whose rating has one of the `values`."""

    pairs_from: PairsFrom | None = None
    min_margin: float | None = None
    unpaired: bool = False
    values: Values | None = None


BY_DEFAULT = Rule()


@dataclass(frozen=True)
class Answer:
    """`given` is the number that the file has; `level` orders the answers, the best highest: a rating, or minus a
    rank."""

    turns: list[Message]
    given: float
    level: float
    where: str


@dataclass(frozen=True)
class Ranking:
    """Answers to a prompt (None: that of the row's prompt column); `unfit` says what is wrong with those left out."""

    answers: list[Answer]
    where: str
    prompt: list[Message] | None = None
    unfit: list[Unfit] = field(default_factory=list)


class _Unsure(Unfit):
    """It is not known for sure what the row means; refuses the source where its first rows are like that."""

    def __init__(self, kind: str, message: str, advice: str):
        super().__init__(kind, message)
        self.advice = advice


def rule_of(source: Source, layout: str, name: str, kind: str) -> Rule:
    """What the recipe asks to be made of a source's rankings. Raises UserError: the source is no ranking, has no
    ratings for a margin, or nothing of that kind is made of it."""
    refused = {}
    if kind == "prompts":
        refused = dict.fromkeys(("pairs_from", "min_margin"), "the method needs prompts alone")
    elif layout not in LAYOUTS:
        refused = dict.fromkeys(("pairs_from", "min_margin"), f"its rows are {layout}: no ranking to make pairs of")
    elif kind == "pairs":
        refused = {"values": "the method needs pairs, which ratings alone decide"}
    elif source.values is not None:
        refused = dict.fromkeys(("pairs_from", "min_margin"), "`values` decides which answers are wanted")
    elif source.pairs_from != "best_worst":
        refused = {"pairs_from": "the method takes single answers: the best of a row as wanted, the worst as unwanted"}
    if layout in LAYOUTS and not LAYOUTS[layout].is_rated:
        refused["min_margin"] = f"its rows are {layout}, without ratings that could differ by less"
    for setting, what in refused.items():
        if getattr(source, setting) is not None:
            advice = f"remove `{setting}`"
            if kind != "prompts" and layout not in LAYOUTS:
                advice += ", or name a list of answers: `columns: {answers: ...}`"
            raise UserError(what, where=f"{name}, `{setting}`", advice=advice)
    return Rule(source.pairs_from, source.min_margin, kind == "unpaired", source.values if layout in LAYOUTS else None)


@dataclass(frozen=True)
class Row:
    """The cells of a row by role, and the names of their columns."""

    cells: Mapping[str, Any]
    columns: Mapping[str, str]
    writing: Writing

    def where(self, role: str) -> str:
        return f"`{short(self.columns[role])}`"

    def items(self, role: str) -> list[Any]:
        if not isinstance(cell := self.cells[role], list):
            raise Unfit("bad_message", f"{self.where(role)} is {json_type(cell)}, not a list")
        if not cell:
            raise Unfit("empty_text", f"{self.where(role)} has no answers")
        return cell


def read(layout: str, row: Row) -> list[Ranking]:
    """The rankings of a row. Raises Unfit: it has none, or it is not sure which answer is better."""
    return LAYOUTS[layout].read(row)


def require_sure(
    layout: str, columns: Mapping[str, str], writing: Writing, values: Sequence[dict[str, Any]], source: str
) -> None:
    """Raises UserError: by the first rows of a ranking it is not sure which answers are better."""
    if layout not in LAYOUTS:
        return
    unsure: list[_Unsure] = []
    are_read = False
    for value in values:
        cells = {role: _at(value, columns[role]) for role in LAYOUTS[layout].roles}
        try:
            are_read = bool(LAYOUTS[layout].read(Row(cells, columns, writing))) or are_read
        except _Unsure as problem:
            unsure.append(problem)
        except Unfit:
            continue
    contradictions = [problem for problem in unsure if problem.kind == "bad_label"]
    if first := next(iter(contradictions or ([] if are_read else unsure)), None):
        count = f" ({len(unsure)} of {len(values)} rows)" if len(values) > 1 else ""
        raise UserError(f"{first.message}{count}", where=source, advice=first.advice)
    if "choice" in columns:
        _require_counting_from_0(columns, values, source)


def pairs(ranking: Ranking, rule: Rule, layout: str) -> list[tuple[Answer, Answer]]:
    """(better, worse), the best first. Equal levels make no pair. Raises Unfit: there is none."""
    ordered = sorted(ranking.answers, key=lambda answer: -answer.level)
    if len(ordered) < 2:
        raise next(iter(ranking.unfit), Unfit("missing_field", f"{ranking.where} has fewer than two ranked answers"))
    worst = next(answer for answer in ordered if answer.level == ordered[-1].level)
    couples = {
        "best_worst": [(ordered[0], worst)],
        "adjacent": list(pairwise(ordered)),
        "all": list(combinations(ordered, 2)),
    }[rule.pairs_from or LAYOUTS[layout].pairs_from]
    unequal = [(better, other) for better, other in couples if better.level > other.level]
    if not unequal:
        raise Unfit("tie", f"the answers in {ranking.where} are ranked alike")
    least = (rule.min_margin or 0.0) - _ROUNDING
    wide = [(better, other) for better, other in unequal if better.level - other.level >= least]
    if not wide:
        raise Unfit("small_margin", f"no two answers in {ranking.where} differ by {rule.min_margin} or more")
    return wide


# ---- cells ------------------------------------------------------------------------------------------------------


def is_list_of_objects(value: Any) -> bool:
    """Objects that are no turns of a dialogue."""
    return isinstance(value, list) and value != [] and all(isinstance(x, dict) and not _speaks(x) for x in value)


def is_list_of_answers(value: Any) -> bool:
    """Texts, or lists of the assistant's turns; some may be null, but not all."""
    return isinstance(value, list) and any(map(_is_answer, value)) and all(x is None or _is_answer(x) for x in value)


def is_list_of_numbers(value: Any) -> bool:
    """Numbers or `chosen` and `rejected`; some may be null, but not all."""
    return (
        isinstance(value, list)
        and any(item is not None for item in value)
        and all(item is None or _number(item) is not None for item in value)
    )


def is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_post(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(value.get(key), str) for key in ("post", "article"))


def is_tree(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("text"), str) and isinstance(value.get("replies"), list)


def _speaks(item: dict[str, Any]) -> bool:
    return "role" in item or "from" in item


def _is_answer(value: Any) -> bool:
    turns = isinstance(value, list) and value != [] and all(isinstance(item, dict) and _speaks(item) for item in value)
    return isinstance(value, str) or turns


def _number(value: Any) -> float | None:
    return _WORDS[value] if isinstance(value, str) and value in _WORDS else as_number(value)


def is_part_of_ranking(value: Any) -> bool:
    return is_list_of_objects(value) or is_list_of_answers(value) or is_list_of_numbers(value) or is_tree(value)


def _at(item: Any, path: str) -> Any:
    """What is at a key or path, None where there is nothing."""
    cell = cell_at(item, path) if isinstance(item, dict) else MISSING
    return None if cell is MISSING else cell


# ---- layouts ----------------------------------------------------------------------------------------------------


def _objects(row: Row) -> list[Ranking]:
    """A list of objects, each with an answer and its rating or rank."""
    items, where = row.items("answers"), row.where("answers")
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise Unfit("bad_message", f"{where}, answer {number} is {json_type(item)}, not an object")
    present = [key for key in _ANSWER_KEYS if any(key in item for item in items)]
    if "answer" not in row.columns and len(present) != 1:
        names = _listed(present) if present else f"none of {_listed(_ANSWER_KEYS)}"
        advice = f"say which holds the text: `columns: {{answer: {present[-1] if present else '...'}}}`"
        raise _Unsure("bad_label" if present else "missing_field", f"the answers in {where} have {names}", advice)
    key = row.columns.get("answer") or present[0]
    return [_ranking([_at(item, key) for item in items], *_numbers_of(items, row), where, row.writing)]


def _numbers_of(items: Sequence[dict[str, Any]], row: Row) -> tuple[list[float | None], bool]:
    """The rating or rank of each answer, and whether they are ranks. Raises Unfit: nothing known says it, or two things
    that contradict each other."""
    named = {row.columns[role]: role == "rank" for role in ("rating", "rank") if role in row.columns}
    where, numbers = row.where("answers"), dict[str, list[float | None]]()
    for key in named or _KNOWN_KEYS:
        numbers[key] = [as_number(_at(item, key)) for item in items]
        if all(number is None for number in numbers[key]):
            if any(_at(item, key) is not None for item in items):
                raise Unfit("bad_label", f"{where}: `{short(key)}` holds no numbers")
            del numbers[key]
    if not numbers:
        raise _no_number(items, where, list(named))
    by_rank = named or _KNOWN_KEYS
    (first, decisive), *others = numbers.items()
    for key, other in others:
        if _contradict(decisive, other, by_rank[first] != by_rank[key]):
            what = f"`{short(first)}` and `{short(key)}` order the answers in {where} differently"
            raise _Unsure("bad_label", what, f"say which decides: `columns: {{rating: {short(first)}}}`")
    return decisive, by_rank[first]


def _no_number(items: Sequence[dict[str, Any]], where: str, named: Sequence[str]) -> _Unsure:
    keys = dict.fromkeys(key for item in items for key in item if key not in _ANSWER_KEYS)
    numbers = [key for key in keys if any(as_number(item.get(key)) is not None for item in items)]
    what = f"the answers in {where} have no {_listed(named) or 'rating or rank that is known by its name'}"
    what += f", but numbers in {_listed(numbers)}" if numbers else ""
    key = short(numbers[0]) if numbers else "..."
    advice = f"say by `columns:` which decides: `{{rating: {key}}}` (highest is best) or `{{rank: {key}}}` (lowest is)"
    return _Unsure("missing_field", what, advice)


def _contradict(first: Sequence[float | None], second: Sequence[float | None], is_turned: bool) -> bool:
    both = [(a, -b if is_turned else b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return any((a - c) * (b - d) < 0 for (a, b), (c, d) in combinations(both, 2))


def _ranking(
    answers: Sequence[Any], numbers: Sequence[float | None], by_rank: bool, where: str, writing: Writing
) -> Ranking:
    """The answers that can be read and have a rating; a rank is 0 or more, and the lowest is best."""
    ranking = Ranking([], where)
    for place, (answer, number) in enumerate(zip(answers, numbers, strict=True), start=1):
        where_answer = f"{where}, answer {place}"
        try:
            if number is None or (by_rank and number < 0):
                raise Unfit("bad_label", f"{where_answer} has no {'rank' if by_rank else 'rating'}")
            turns = read_answer(answer, where_answer, writing)
            ranking.answers.append(Answer(turns, number, 0.0 - number if by_rank else number, where_answer))
        except Unfit as unfit:
            ranking.unfit.append(unfit)
    return ranking


def _lists(row: Row) -> list[Ranking]:
    """A list of answers, and a list of their ratings or ranks."""
    role = "rank" if "rank" in row.columns else "rating"
    answers, numbers, where = row.items("answers"), row.items(role), row.where("answers")
    if len(answers) != len(numbers):
        raise Unfit("missing_field", f"{where} has {len(answers)} answers, {row.where(role)} {len(numbers)}")
    levels = list(map(_number, numbers))
    if all(level is None for level in levels):
        raise Unfit("bad_label", f"{row.where(role)} holds no numbers")
    return [_ranking(answers, levels, role == "rank", where, row.writing)]


def _best_first(row: Row) -> list[Ranking]:
    role = "best_first" if "best_first" in row.columns else "better_worse"
    answers = row.items(role)
    return [_ranking(answers, range(len(answers)), True, row.where(role), row.writing)]


def _chosen_and_rejected(row: Row) -> list[Ranking]:
    """A text or a list of them as chosen, and as rejected."""
    sides = []
    for role, level in (("chosen", 1.0), ("rejected", 0.0)):
        cell = row.cells[role]
        answers = row.items(role) if cell == [] or is_list_of_answers(cell) else [cell]
        side = _ranking(answers, [level] * len(answers), False, row.where(role), row.writing)
        if not side.answers:
            raise side.unfit[0]
        sides.append(side)
    chosen, rejected = sides
    where = f"{chosen.where} and {rejected.where}"
    return [Ranking(chosen.answers + rejected.answers, where, None, chosen.unfit + rejected.unfit)]


def _choice(row: Row) -> list[Ranking]:
    """A list of answers, and the index of the better one, from 0."""
    answers, where, choice = row.items("answers"), row.where("answers"), row.cells["choice"]
    if not is_index(choice) or choice >= len(answers):
        raise Unfit("bad_label", f"{row.where('choice')} is no index into {where}, counted from 0")
    key = row.columns.get("answer", "text")
    texts = [_at(answer, key) if isinstance(answer, dict) else answer for answer in answers]
    ranking = _ranking(texts, [place == choice for place in range(len(answers))], False, where, row.writing)
    if "post" not in row.columns:
        return [ranking]
    post = row.cells["post"]
    text = next((post[key] for key in ("post", "article") if isinstance(post, dict) and post.get(key)), None)
    return [replace(ranking, prompt=[message("user", text, row.where("post"))])]


def _require_counting_from_0(columns: Mapping[str, str], values: Sequence[dict[str, Any]], source: str) -> None:
    rows = [[_at(value, columns[role]) for role in ("choice", "answers")] for value in values]
    beyond = [
        choice for choice, answers in rows if is_index(choice) and isinstance(answers, list) and choice >= len(answers)
    ]
    if beyond or all(choice != 0 for choice, _ in rows):
        where = f"`{short(columns['choice'])}`"
        what = f"{where} holds {max(beyond)}, beyond its answers" if beyond else f"{where} holds no 0"
        expected = "the index of the better answer, the first one being 0"
        raise UserError(f"{what}: where does it count from?", where=source, expected=expected, advice="count from 0")


def _tree(row: Row) -> list[Ranking]:
    """Every set of replies of the assistant that are ranked, after the messages that lead to them. Deleted messages
    are not read."""
    where = row.where("tree")
    rankings = []
    for path, replies in _branches(row.cells["tree"], where):
        ranked = [reply for reply in replies if reply.get("rank") is not None and reply.get("role") == "assistant"]
        if len(ranked) > 1 and path[-1]["role"] == "user":
            texts = [reply.get("text") for reply in ranked]
            ranks = [as_number(reply["rank"]) for reply in ranked]
            where_replies = f"{where}, the replies to `{short(path[-1]['content'])}`"
            rankings.append(replace(_ranking(texts, ranks, True, where_replies, "plain"), prompt=path))
    if not rankings:
        raise Unfit("missing_field", f"{where} has no two ranked replies to a message")
    return rankings


def _branches(root: Any, where: str) -> Iterator[tuple[list[Message], list[dict[str, Any]]]]:
    """The messages of a tree that have replies, in its order: what leads to each and itself, and its replies."""
    pending: list[tuple[list[Message], Any]] = [([], root)]
    while pending:
        before, node = pending.pop()
        replies = node.get("replies") or [] if isinstance(node, dict) else None
        if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
            raise Unfit("bad_message", f"{where} has a message that is not {{role, text, replies}}")
        if (role := _TREE_ROLES.get(str(node.get("role", "user")))) is None:
            raise Unfit("bad_message", f"{where} has a message of the role `{short(node['role'])}`")
        path = [*before, message(role, node.get("text"), f"a message in {where}")]
        if replies := [reply for reply in replies if not reply.get("deleted")]:
            yield path, replies
        pending += [(path, reply) for reply in reversed(replies) if reply.get("replies")]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{short(name)}`" for name in names)


@dataclass(frozen=True)
class _Layout:
    """`roles`: of the cells that it needs beside the prompt; `is_rated`: the numbers that order the answers are the
    row's, not an order alone; `pairs_from`: where the recipe says nothing."""

    read: Callable[[Row], list[Ranking]]
    roles: tuple[str, ...]
    is_rated: bool = False
    pairs_from: PairsFrom = "best_worst"


LAYOUTS = {
    "rated answers": _Layout(_objects, ("answers",), True),
    "answers and ratings": _Layout(_lists, ("answers", "rating"), True),
    "answers and ranks": _Layout(_lists, ("answers", "rank"), True),
    "better and worse": _Layout(_best_first, ("better_worse",)),
    "best first": _Layout(_best_first, ("best_first",)),
    "lists of chosen and rejected": _Layout(_chosen_and_rejected, ("chosen", "rejected"), False, "all"),
    "answers and choice": _Layout(_choice, ("answers", "choice")),
    "summaries and choice": _Layout(_choice, ("answers", "choice", "post")),
    "tree": _Layout(_tree, ("tree",), True),
}
READ_FROM_TEXT = ("answers", "rating", "rank", "best_first")
"""Roles whose lists may be written as text, as .csv files have them."""
# Columns that tell a layout which needs more than a row, and what to do.
_OTHER = {
    ("message_id", "parent_id", "text", "role"): (
        "each row is a message of a tree, and its pairs lie in other rows",
        "use the export as trees ({prompt: {text, role, replies}}, such as OpenAssistant's ready.trees.jsonl)",
    ),
    ("prompt", "response", "helpfulness", "correctness"): (
        "each row rates a single answer, and what it is compared with lies in another row",
        "join the two rows of each prompt into prompt, chosen, rejected; or use the export with preferences",
    ),
    ("prompt", "completions", "labels"): (
        "`completions` are the steps of a single answer and `labels` judge each: stepwise supervision, no pairs",
        "train a process reward model on it, or bring data with two answers to a prompt",
    ),
}


def require_whole_rows(columns: Sequence[str], source: str) -> None:
    """Raises UserError: the columns are known to need other rows, or to hold no pairs."""
    for names, (what, advice) in _OTHER.items():
        if set(names) <= set(columns):
            raise UserError(what, where=source, expected="rows that hold all that is compared", advice=advice)
