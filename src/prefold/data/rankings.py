"""Rows that order several answers, by ratings, by ranks, or the best first: lists and trees -> rankings -> pairs.

A row has one ranking, or several (a tree), of which `conversion` makes records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

from prefold.data.cells import MISSING, cell_at, listed
from prefold.data.dialogues import read_answer
from prefold.data.forms import POSTS, is_answers, is_index, level_of
from prefold.data.layouts import Answer, Kind, Layout, Ranking, Row, Rule, Shape
from prefold.data.preference import Message, RowId, Unfit, message, short
from prefold.errors import UserError, json_type
from prefold.recipe import Source
from prefold.recipe.values import as_number

ITEM_ROLES = ("answer", "rating", "rank")
"""Roles that `columns` may give to a key, or to a path of keys, inside the objects of a list of answers."""
_ANSWER_KEYS = ("answer", "response", "completion", "text", "output", "generation", "content")
# Keys that are recognised as a rating (highest is best) or a rank (lowest is best), the first ones taking precedence.
# Others have to be named, because their lowest number may be the best, as that of a toxicity score is.
_RATINGS = (
    *("overall_score", "overall_rating", "score", "rating", "reward", "pm_score", "rm_score", "reward_score"),
    *("fine-grained_score", "fine_grained_score"),
)
_KNOWN_KEYS = dict.fromkeys(_RATINGS, False) | dict.fromkeys(("rank", "ranking"), True)
_TREE_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant", "system": "system"}
_ROUNDING = 1e-9


def with_rule(shape: Shape, source: Source, name: str, kind: Kind) -> Shape:
    """The shape of a source with what the recipe asks to make of its rankings. Raises UserError: a setting does not
    apply, since the source has no rankings or no ratings for a margin, or the method takes other records."""
    layout = shape.layout.name
    is_rated = {ranking.name: ranking.is_rated for ranking in LAYOUTS}
    of_pairs, refused = ("pairs_from", "min_margin"), dict[str, str]()
    if kind == "prompts":
        refused = dict.fromkeys(of_pairs, "the method needs prompts alone")
    elif layout not in is_rated:
        refused = dict.fromkeys(of_pairs, f"its rows are {layout}: no ranking to make pairs of")
    elif kind == "pairs":
        refused = {"values": "the method needs pairs, which ratings alone decide"}
    elif source.values is not None:
        refused = dict.fromkeys(of_pairs, "`values` decides which answers are wanted")
    elif source.pairs_from != "best_worst":
        refused = {"pairs_from": "the method takes single answers: the best of a row as wanted, the worst as unwanted"}
    if is_rated.get(layout) is False:
        refused["min_margin"] = f"its rows are {layout}, without ratings that could differ by less"
    for setting, what in refused.items():
        if getattr(source, setting) is not None:
            advice = f"remove `{setting}`"
            if kind != "prompts" and layout not in is_rated:
                advice += ", or name a list of answers: `columns: {answers: ...}`"
            raise UserError(what, where=f"{name}, `{setting}`", advice=advice)
    values = source.values if layout in is_rated else None
    return replace(shape, rule=Rule(source.pairs_from, source.min_margin, kind == "unpaired", values))


def require_sure(shape: Shape, values: Sequence[dict[str, Any]], source: str) -> None:
    """Raises UserError: the first rows of a ranking leave open which answers are better."""
    undecided: list[Unfit] = []
    is_read = False
    for number, value in enumerate(values, start=1):
        try:
            is_read = bool(shape.layout.read(Row(value, shape, RowId(source, number)))) or is_read
        except Unfit as problem:
            undecided += [problem] if problem.advice else []
    contradictions = [problem for problem in undecided if problem.kind == "bad_label"]
    if first := next(iter(contradictions or ([] if is_read else undecided)), None):
        count = f" ({len(undecided)} of {len(values)} rows)" if len(values) > 1 else ""
        raise UserError(f"{first.message}{count}", where=source, advice=first.advice)
    if "choice" in shape.column_of:
        _require_counting_from_0(shape, values, source)


def pairs(ranking: Ranking, shape: Shape) -> list[tuple[Answer, Answer]]:
    """Pairs (better, worse), the best first. Equal levels make no pair. Raises Unfit: there is no pair."""
    ordered = sorted(ranking.answers, key=lambda answer: -answer.level)
    if len(ordered) < 2:
        raise next(iter(ranking.unfit), Unfit("missing_field", f"{ranking.where} has fewer than two ranked answers"))
    worst = next(answer for answer in ordered if answer.level == ordered[-1].level)
    pairs_from = shape.rule.pairs_from or shape.layout.pairs_from
    every = combinations(ordered, 2) if pairs_from == "all" else pairwise(ordered)
    couples = [(ordered[0], worst)] if pairs_from == "best_worst" else every
    margins = [(pair, pair[0].level - pair[1].level) for pair in couples if pair[0].level > pair[1].level]
    if not margins:
        raise Unfit("tie", f"the answers in {ranking.where} are ranked alike")
    wide = [pair for pair, margin in margins if margin >= (shape.rule.min_margin or 0.0) - _ROUNDING]
    if not wide:
        raise Unfit("small_margin", f"no two answers in {ranking.where} differ by {shape.rule.min_margin} or more")
    return wide


def _at(item: Any, path: str) -> Any:
    """The value at a key or path; None if there is none."""
    cell = cell_at(item, path) if isinstance(item, dict) else MISSING
    return None if cell is MISSING else cell


# ---- readers ----------------------------------------------------------------------------------------------------


def _cells(row: Row) -> dict[str, Any]:
    """The cells by the roles of the layout, without the prompt."""
    return {role: row.need(role) for role in row.shape.layout.forms if role != "prompt"}


def _items(cell: Any, where: str) -> list[Any]:
    if not isinstance(cell, list):
        raise Unfit("bad_message", f"{where} is {json_type(cell)}, not a list")
    if not cell:
        raise Unfit("empty_text", f"{where} has no answers")
    return cell


def _objects(row: Row) -> list[Ranking]:
    """A list of objects, each with an answer and its rating or rank."""
    where, columns = row.where("answers"), row.shape.column_of
    items = _items(row.need("answers"), where)
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise Unfit("bad_message", f"{where}, answer {number} is {json_type(item)}, not an object")
    present = [key for key in _ANSWER_KEYS if any(key in item for item in items)]
    if "answer" not in columns and len(present) != 1:
        names = listed(present) if present else f"none of {listed(_ANSWER_KEYS)}"
        advice = f"say which holds the text: `columns: {{answer: {present[-1] if present else '...'}}}`"
        raise Unfit("bad_label" if present else "missing_field", f"the answers in {where} have {names}", advice)
    key = columns.get("answer") or present[0]
    return [_ranking(row, where, [_at(item, key) for item in items], *_numbers_of(items, row))]


def _numbers_of(items: Sequence[dict[str, Any]], row: Row) -> tuple[list[float | None], bool]:
    """The rating or rank of each answer, and whether they are ranks. Raises Unfit: there are no numbers under a known
    key, or those of two keys contradict each other."""
    columns, where = row.shape.column_of, row.where("answers")
    named = {columns[role]: role == "rank" for role in ("rating", "rank") if role in columns}
    numbers: dict[str, list[float | None]] = {}
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
            raise Unfit("bad_label", what, f"say which decides: `columns: {{rating: {short(first)}}}`")
    return decisive, by_rank[first]


def _no_number(items: Sequence[dict[str, Any]], where: str, named: Sequence[str]) -> Unfit:
    keys = dict.fromkeys(key for item in items for key in item if key not in _ANSWER_KEYS)
    numbers = [key for key in keys if any(as_number(item.get(key)) is not None for item in items)]
    what = f"the answers in {where} have no {listed(named) or 'rating or rank that is known by its name'}"
    what += f", but numbers in {listed(numbers)}" if numbers else ""
    key = short(numbers[0]) if numbers else "..."
    advice = f"say by `columns:` which decides: `{{rating: {key}}}` (highest is best) or `{{rank: {key}}}` (lowest is)"
    return Unfit("missing_field", what, advice)


def _contradict(first: Sequence[float | None], second: Sequence[float | None], is_turned: bool) -> bool:
    both = [(a, -b if is_turned else b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return any((a - c) * (b - d) < 0 for (a, b), (c, d) in combinations(both, 2))


def _ranking(
    row: Row, where: str, answers: Sequence[Any], numbers: Sequence[float | None], by_rank: bool = False
) -> Ranking:
    """A ranking of the answers that can be read and have a rating, or a rank (0 or more, the lowest is best)."""
    ranking = Ranking([], where)
    for position, (answer, number) in enumerate(zip(answers, numbers, strict=True), start=1):
        where_answer = f"{where}, answer {position}"
        try:
            if number is None or (by_rank and number < 0):
                raise Unfit("bad_label", f"{where_answer} has no {'rank' if by_rank else 'rating'}")
            turns = read_answer(answer, where_answer, row.shape.writing)
            ranking.answers.append(Answer(turns, number, 0.0 - number if by_rank else number, where_answer))
        except Unfit as unfit:
            ranking.unfit.append(unfit)
    return ranking


def _lists(row: Row) -> list[Ranking]:
    """A list of answers, and a list of their ratings or ranks."""
    cells = _cells(row)
    where, where_numbers = map(row.where, cells)
    answers, numbers = (_items(cell, row.where(role)) for role, cell in cells.items())
    if len(answers) != len(numbers):
        raise Unfit("missing_field", f"{where} has {len(answers)} answers, {where_numbers} {len(numbers)}")
    levels = list(map(level_of, numbers))
    if all(level is None for level in levels):
        raise Unfit("bad_label", f"{where_numbers} holds no numbers")
    return [_ranking(row, where, answers, levels, by_rank="rank" in cells)]


def _best_first(row: Row) -> list[Ranking]:
    [(role, cell)] = _cells(row).items()
    answers = _items(cell, row.where(role))
    return [_ranking(row, row.where(role), answers, range(len(answers)), by_rank=True)]


def _chosen_and_rejected(row: Row) -> list[Ranking]:
    """Chosen and rejected, each an answer or a list of them."""
    sides = []
    for role, cell in _cells(row).items():
        answers = _items(cell, row.where(role)) if cell == [] or is_answers(cell) else [cell]
        side = _ranking(row, row.where(role), answers, [float(role == "chosen")] * len(answers))
        if not side.answers:
            raise side.unfit[0]
        sides.append(side)
    chosen, rejected = sides
    where = f"{chosen.where} and {rejected.where}"
    return [Ranking(chosen.answers + rejected.answers, where, None, chosen.unfit + rejected.unfit)]


def _choice(row: Row) -> list[Ranking]:
    """A list of answers, and the index of the better one, from 0."""
    cells, where = _cells(row), row.where("answers")
    answers, choice = _items(cells["answers"], where), cells["choice"]
    if not is_index(choice) or choice >= len(answers):
        raise Unfit("bad_label", f"{row.where('choice')} is no index into {where}, counted from 0")
    key = row.shape.column_of.get("answer", "text")
    texts = [_at(answer, key) if isinstance(answer, dict) else answer for answer in answers]
    ranking = _ranking(row, where, texts, [index == choice for index in range(len(answers))])
    if "post" not in cells:
        return [ranking]
    post = cells["post"]
    text = next((post[key] for key in POSTS if isinstance(post, dict) and post.get(key)), None)
    return [replace(ranking, prompt=[message("user", text, row.where("post"))])]


def _require_counting_from_0(shape: Shape, values: Sequence[dict[str, Any]], source: str) -> None:
    choices, answers = ([_at(value, shape.column_of[role]) for value in values] for role in ("choice", "answers"))
    both = [both for both in zip(choices, answers, strict=True) if is_index(both[0]) and isinstance(both[1], list)]
    beyond = [choice for choice, given in both if choice >= len(given)]
    if beyond or all(choice != 0 for choice in choices):
        where = shape.name_of["choice"]
        what = f"{where} holds {max(beyond)}, beyond its answers" if beyond else f"{where} holds no 0"
        expected = "the index of the better answer, the first one being 0"
        raise UserError(f"{what}: where does it count from?", where=source, expected=expected, advice="count from 0")


def _tree(row: Row) -> list[Ranking]:
    """A ranking for each message of the user with two or more ranked replies of the assistant; the prompt is the path
    to that message. Deleted messages are left out."""
    where = row.where("tree")
    rankings = []
    for path, replies in _branches(row.need("tree"), where):
        ranked = [reply for reply in replies if reply.get("rank") is not None and reply.get("role") == "assistant"]
        if len(ranked) > 1 and path[-1]["role"] == "user":
            texts = [reply.get("text") for reply in ranked]
            ranks = [as_number(reply["rank"]) for reply in ranked]
            where_replies = f"{where}, the replies to `{short(path[-1]['content'])}`"
            rankings.append(replace(_ranking(row, where_replies, texts, ranks, by_rank=True), prompt=path))
    if not rankings:
        raise Unfit("missing_field", f"{where} has no two ranked replies to a message")
    return rankings


def _branches(root: Any, where: str) -> Iterator[tuple[list[Message], list[dict[str, Any]]]]:
    """Each message of a tree that has replies, in order: the path from the root to it, and its replies."""
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


# ---- layouts ----------------------------------------------------------------------------------------------------

# They are tried after those of `conversion`: a row that has a chosen answer needs no ranking.
LAYOUTS: tuple[Layout, ...] = (
    Layout("rated answers", "pairs", _objects, "prompt answers:objects",
           "`answers`: [{answer, rating | rank}]; or with a list `scores`", ITEM_ROLES, is_rated=True),
    Layout("answers and ratings", "pairs", _lists, "prompt answers rating",
           "lists `responses`, `scores`", is_rated=True),
    Layout("answers and ranks", "pairs", _lists, "prompt answers rank", "lists `responses`, `ranks`", is_rated=True),
    Layout("better and worse", "pairs", _best_first, "prompt better_worse", "`output`: [better, worse]"),
    Layout("best first", "pairs", _best_first, "prompt best_first", "`best_first`: list of answers"),
    Layout("lists of chosen and rejected", "pairs", _chosen_and_rejected, "prompt chosen:several rejected:several",
           "`chosen`, `rejected`: an answer or several", pairs_from="all"),
    Layout("answers and choice", "pairs", _choice, "prompt answers:either choice",
           "`answers`, `choice`: an index", ("answer",)),
    Layout("summaries and choice", "pairs", _choice, "post answers:either choice", "`info`, `summaries`, `choice`"),
    Layout("tree", "pairs", _tree, "tree", "`prompt`: {text, replies: [{text, rank, replies}]}", is_rated=True),
)  # fmt: skip
LAYOUTS += tuple(replace(layout, kind="prompts") for layout in LAYOUTS)
READ_FROM_TEXT = ("answers", "rating", "rank", "best_first")
"""Roles whose lists may be written as text, as .csv files have them."""
# Columns of data sets whose single rows make no pairs -> what is wrong with a row, and what to do.
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
    """Raises UserError: the columns are those of a data set whose single rows make no pairs."""
    for names, (what, advice) in _OTHER.items():
        if set(names) <= set(columns):
            raise UserError(what, where=source, expected="rows that hold all that is compared", advice=advice)
