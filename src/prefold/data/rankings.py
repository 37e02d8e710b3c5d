"""Rows that order several answers: lists with ratings or ranks, lists with the best first, trees, and conversations
with a winner -> rankings -> pairs by a stated rule.

A row holds a ranking, or several of them (a tree). `shapes` knows the columns of these layouts, `conversion` makes
records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any, Literal

from prefold.data.dialogues import part, read_answer
from prefold.data.preference import Message, Unfit, Writing, message, messages, short
from prefold.data.votes import as_flag, as_number
from prefold.errors import UserError, json_type
from prefold.recipe import Source

PairsFrom = Literal["best_worst", "adjacent", "all"]
ITEM_ROLES = ("answer", "rating", "rank")
"""Roles that `columns` may give to a key, or to a path of keys, inside the objects of a list of answers."""
_ANSWER_KEYS = ("answer", "response", "completion", "text", "output", "generation", "content")
# Keys that are taken for a rating or a rank by themselves, those before others where a row has several. Other numbers
# may be lowest at the best answer (a toxicity score), so they have to be named.
_RATING_KEYS = ("overall_score", "overall_rating", "score", "rating", "reward", "pm_score", "rm_score", "reward_score")
_RATING_KEYS += ("fine-grained_score", "fine_grained_score")
_RANK_KEYS = ("rank", "ranking")
_WORDS = {"chosen": 1.0, "rejected": 0.0}
_WINNERS = {"model_a": 1, "model_b": 2, "tie": 0, "tie (bothbad)": 0, "both_bad": 0}
_TREE_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant", "system": "system"}
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Rule:
    """What is made of a ranking: see `Source.pairs_from` and `Source.min_margin`; or unpaired answers, of the answers
    that would make a pair."""

    pairs_from: PairsFrom | None = None
    min_margin: float | None = None
    unpaired: bool = False


BY_DEFAULT = Rule()


@dataclass(frozen=True)
class Answer:
    """`level` orders the answers, the best highest: a rating, or a rank below 0."""

    turns: list[Message]
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
    ratings for a margin, or makes no pairs of that kind."""
    given = {"pairs_from": source.pairs_from, "min_margin": source.min_margin}
    for setting, value in given.items():
        where = f"{name}, `{setting}: {value}`"
        if value is not None and kind == "prompts":
            raise UserError("no pairs are made where the method needs prompts alone", where=where, advice="remove it")
        if value is not None and layout not in LAYOUTS:
            advice = "remove it, or name the list of answers: `columns: {answers: ...}`"
            raise UserError(f"its rows are {layout}, and no ranking to make pairs of", where=where, advice=advice)
    if source.min_margin is not None and layout not in RATED:
        what = f"its rows are {layout}, without ratings that could differ by less"
        raise UserError(what, where=f"{name}, `min_margin`", advice="remove it")
    if kind == "unpaired" and source.pairs_from not in (None, "best_worst"):
        what = "the method takes unpaired answers: the best of a row as desirable, the worst as undesirable"
        raise UserError(what, where=f"{name}, `pairs_from: {source.pairs_from}`", advice="remove it")
    return Rule(source.pairs_from, source.min_margin, kind == "unpaired")


def read(layout: str, value: dict[str, Any], columns: Mapping[str, str], writing: Writing) -> list[Ranking]:
    """The rankings of a row. Raises Unfit: it has none, or it is not sure which answer is better."""
    return LAYOUTS[layout](value, columns, writing)


def require_sure(
    layout: str, columns: Mapping[str, str], writing: Writing, values: Sequence[dict[str, Any]], source: str
) -> None:
    """Raises UserError: by the first rows of a ranking it is not sure which answers are better."""
    if layout not in LAYOUTS:
        return
    unsure: list[_Unsure] = []
    are_read = False
    for value in values:
        try:
            are_read = bool(LAYOUTS[layout](value, columns, writing)) or are_read
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


def pairs(ranking: Ranking, rule: Rule, each_with_each: bool = False) -> list[tuple[Answer, Answer]]:
    """(better, worse), the best first. Equal levels make no pair.

    Args:
        each_with_each: what an unset rule means, instead of the best against the worst.

    Raises:
        Unfit: there is none.
    """
    ordered = sorted(ranking.answers, key=lambda answer: -answer.level)
    if len(ordered) < 2:
        raise next(iter(ranking.unfit), Unfit("missing_field", f"{ranking.where} has fewer than two ranked answers"))
    worst = next(answer for answer in ordered if answer.level == ordered[-1].level)
    couples = {
        "best_worst": [(ordered[0], worst)],
        "adjacent": list(pairwise(ordered)),
        "all": list(combinations(ordered, 2)),
    }[rule.pairs_from or ("all" if each_with_each else "best_worst")]
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


def is_pair_of_texts(value: Any) -> bool:
    return is_list_of_texts(value) and len(value) == 2


def is_list_of_numbers(value: Any) -> bool:
    """Numbers or `chosen` and `rejected`; some may be null, but not all."""
    return (
        isinstance(value, list)
        and any(item is not None for item in value)
        and all(item is None or _level(item) is not None for item in value)
    )


def is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_winner(value: Any) -> bool:
    return isinstance(value, str) and value in _WINNERS


def is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(item is None or isinstance(item, str) for item in value)


def is_post(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(value.get(key), str) for key in ("post", "article"))


def is_tree(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("text"), str) and isinstance(value.get("replies"), list)


def _speaks(item: dict[str, Any]) -> bool:
    return "role" in item or "from" in item


def _is_answer(value: Any) -> bool:
    turns = isinstance(value, list) and value != [] and all(isinstance(item, dict) and _speaks(item) for item in value)
    return isinstance(value, str) or turns


def _level(value: Any) -> float | None:
    return _WORDS[value] if isinstance(value, str) and value in _WORDS else as_number(value)


def _at(item: Any, path: str) -> Any:
    """What lies in an object at a key, or at a path such as `annotations.helpfulness`; None where there is nothing."""
    if isinstance(item, dict) and path in item:
        return item[path]
    key, _, rest = path.partition(".")
    return _at(item.get(key), rest) if rest and isinstance(item, dict) else None


def _list(value: dict[str, Any], column: str) -> list[Any]:
    if not isinstance(cell := value.get(column), list):
        kind = "missing_field" if column not in value else "null_field" if cell is None else "bad_message"
        raise Unfit(kind, f"`{short(column)}` is {json_type(cell)}, not a list")
    if not cell:
        raise Unfit("empty_text", f"`{short(column)}` has no answers")
    return cell


# ---- layouts ----------------------------------------------------------------------------------------------------


def _objects(value: dict[str, Any], columns: Mapping[str, str], writing: Writing) -> list[Ranking]:
    """A list of objects, each with an answer and its rating or rank."""
    items, where = _list(value, columns["answers"]), f"`{short(columns['answers'])}`"
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise Unfit("bad_message", f"{where}, answer {number} is {json_type(item)}, not an object")
    present = [key for key in _ANSWER_KEYS if any(key in item for item in items)]
    if "answer" not in columns and len(present) != 1:
        names = ", ".join(f"`{key}`" for key in present) or "none of " + ", ".join(f"`{key}`" for key in _ANSWER_KEYS)
        advice = f"say which holds the text: `columns: {{answer: {present[-1] if present else '...'}}}`"
        raise _Unsure("bad_label" if present else "missing_field", f"the answers in {where} have {names}", advice)
    key = columns.get("answer") or present[0]
    answers = [_at(item, key) for item in items]
    return [_ranking(answers, _levels_of(items, columns, where), where, writing, _prompt_of(value, columns))]


def _prompt_of(value: dict[str, Any], columns: Mapping[str, str]) -> list[Message] | None:
    if "context" not in columns:
        return None
    return messages(value.get(columns["context"]), f"`{short(columns['context'])}`")


def _levels_of(items: Sequence[dict[str, Any]], columns: Mapping[str, str], where: str) -> list[float | None]:
    """The level of each answer. Raises Unfit: nothing known says it, or two things that contradict each other."""
    named = {columns[role]: role == "rank" for role in ("rating", "rank") if role in columns}
    known = dict.fromkeys(_RATING_KEYS, False) | dict.fromkeys(_RANK_KEYS, True)
    levels: dict[str, list[float | None]] = {}
    for key, lowest_best in (named or known).items():
        numbers = [as_number(_at(item, key)) for item in items]
        if any(number is not None for number in numbers):
            levels[key] = [_rank_level(number) if lowest_best else number for number in numbers]
        elif any(_at(item, key) is not None for item in items):
            raise Unfit("bad_label", f"{where}: `{short(key)}` holds no numbers")
    if not levels:
        numbers = [
            key
            for key in dict.fromkeys(key for item in items for key in item)
            if as_number(items[0].get(key)) is not None
        ]
        what = f"the answers in {where} have no rating or rank that is known by its name"
        what += f", but numbers in {', '.join(f'`{short(key)}`' for key in numbers)}" if numbers else ""
        key = short(numbers[0]) if numbers else "..."
        advice = (
            f"say by `columns:` which decides: `{{rating: {key}}}` (highest is best), `{{rank: {key}}}` (lowest is)"
        )
        raise _Unsure("missing_field", what, advice)
    (first, decisive), *others = levels.items()
    for key, other in others:
        if _contradict(decisive, other):
            what = f"`{short(first)}` and `{short(key)}` order the answers in {where} differently"
            raise _Unsure("bad_label", what, f"say which decides: `columns: {{rating: {short(first)}}}`")
    return decisive


def _rank_level(rank: float | None) -> float | None:
    return None if rank is None or rank < 0 else 0.0 - rank


def _contradict(first: Sequence[float | None], second: Sequence[float | None]) -> bool:
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    return any((a - c) * (b - d) < 0 for (a, b), (c, d) in combinations(both, 2))


def _ranking(
    answers: Sequence[Any],
    levels: Sequence[float | None],
    where: str,
    writing: Writing,
    prompt: list[Message] | None = None,
) -> Ranking:
    ranking = Ranking([], where, prompt)
    for number, (answer, level) in enumerate(zip(answers, levels, strict=True), start=1):
        where_answer = f"{where}, answer {number}"
        try:
            if level is None:
                raise Unfit("bad_label", f"{where_answer} has no rating or rank")
            ranking.answers.append(Answer(read_answer(answer, where_answer, writing), level, where_answer))
        except Unfit as unfit:
            ranking.unfit.append(unfit)
    return ranking


def _lists(value: dict[str, Any], columns: Mapping[str, str], writing: Writing) -> list[Ranking]:
    """A list of answers, and a list of their ratings or ranks."""
    role = "rank" if "rank" in columns else "rating"
    answers, numbers = _list(value, columns["answers"]), _list(value, columns[role])
    where = f"`{short(columns['answers'])}`"
    if len(answers) != len(numbers):
        what = f"{where} has {len(answers)} answers, `{short(columns[role])}` {len(numbers)}"
        raise Unfit("missing_field", what)
    levels = [_level(number) for number in numbers]
    if all(level is None for level in levels):
        raise Unfit("bad_label", f"`{short(columns[role])}` holds no numbers")
    if role == "rank":
        levels = [_rank_level(level) for level in levels]
    return [_ranking(answers, levels, where, writing)]


def _best_first(value: dict[str, Any], columns: Mapping[str, str], writing: Writing) -> list[Ranking]:
    column = columns.get("best_first") or columns["better_worse"]
    answers = _list(value, column)
    return [_ranking(answers, [0.0 - number for number in range(len(answers))], f"`{short(column)}`", writing)]


def _chosen_and_rejected(value: dict[str, Any], columns: Mapping[str, str], writing: Writing) -> list[Ranking]:
    """A text or a list of them as chosen, and as rejected."""
    sides = []
    for role, level in (("chosen", 1.0), ("rejected", 0.0)):
        cell, where = value.get(columns[role]), f"`{short(columns[role])}`"
        answers = _list(value, columns[role]) if is_list_of_answers(cell) or cell in (None, []) else [cell]
        sides.append(_ranking(answers, [level] * len(answers), where, writing))
    chosen, rejected = sides
    for side in sides:
        if not side.answers:
            raise side.unfit[0]
    where = f"{chosen.where} and {rejected.where}"
    return [Ranking(chosen.answers + rejected.answers, where, None, chosen.unfit + rejected.unfit)]


def _choice(value: dict[str, Any], columns: Mapping[str, str], writing: Writing) -> list[Ranking]:
    """A list of answers, and the index of the better one, from 0."""
    answers, where, choice = (
        _list(value, columns["answers"]),
        f"`{short(columns['answers'])}`",
        value.get(columns["choice"]),
    )
    if not is_index(choice) or choice >= len(answers):
        raise Unfit("bad_label", f"`{short(columns['choice'])}` is no index into {where}, counted from 0")
    texts = [_at(answer, columns.get("answer", "text")) if isinstance(answer, dict) else answer for answer in answers]
    prompt = None
    if "post" in columns:
        post = value.get(columns["post"])
        text = next((post[key] for key in ("post", "article") if isinstance(post, dict) and post.get(key)), None)
        prompt = [message("user", text, f"`{short(columns['post'])}`")]
    levels = [float(number == choice) for number in range(len(answers))]
    return [_ranking(texts, levels, where, writing, prompt)]


def _require_counting_from_0(columns: Mapping[str, str], values: Sequence[dict[str, Any]], source: str) -> None:
    column = columns["choice"]
    given = [(value[column], value.get(columns["answers"])) for value in values if is_index(value.get(column))]
    beyond = [choice for choice, answers in given if isinstance(answers, list) and choice >= len(answers)]
    if beyond or not any(choice == 0 for choice, _ in given):
        what = (
            f"`{short(column)}` holds {max(beyond)}, beyond its answers" if beyond else f"`{short(column)}` holds no 0"
        )
        expected = "the index of the better answer, the first one being 0; rows with a 0 show that it counts from there"
        raise UserError(f"{what}: where does it count from?", where=source, expected=expected, advice="count from 0")


def _conversations(value: dict[str, Any], columns: Mapping[str, str], writing: Writing) -> list[Ranking]:
    """Two conversations of the same user, and the winner."""
    names = [columns["conversation_a"], columns["conversation_b"]]
    first, second = (messages(_list(value, name), f"`{short(name)}`", writing) for name in names)
    winner = value.get(columns["winner"])
    if not is_winner(winner):
        shown = f"`{short(winner)}`" if isinstance(winner, str) else json_type(winner)
        raise Unfit("bad_label", f"`{short(columns['winner'])}` is {shown}, not one of {', '.join(_WINNERS)}")
    return [_contest(first, second, (names[0], names[1]), _WINNERS[winner])]


def _lists_of_turns(value: dict[str, Any], columns: Mapping[str, str], writing: Writing) -> list[Ranking]:
    """A list of the user's turns, one of each model's answers, and flags for the winner."""
    names = [columns[role] for role in ("prompt", "response_a", "response_b")]
    prompts, *sides = (_list(value, name) for name in names)
    if {len(side) for side in sides} != {len(prompts)}:
        raise Unfit("bad_message", f"{', '.join(f'`{short(name)}`' for name in names)} are lists of different lengths")
    conversations = [
        [
            turn
            for number, (prompt, answer) in enumerate(zip(prompts, side, strict=True), start=1)
            for turn in (
                message("user", prompt, f"`{short(names[0])}`, turn {number}"),
                message("assistant", answer, f"`{short(name)}`, turn {number}"),
            )
        ]
        for side, name in zip(sides, names[1:], strict=True)
    ]
    flags = [as_flag(value.get(columns[role])) for role in ("winner_a", "winner_b")]
    if None in flags or flags == [True, True]:
        raise Unfit("bad_label", f"`{short(columns['winner_a'])}` and `{short(columns['winner_b'])}` name no winner")
    return [_contest(*conversations, (names[1], names[2]), 1 if flags[0] else 2 if flags[1] else 0)]


def _contest(first: list[Message], second: list[Message], names: tuple[str, str], winner: int) -> Ranking:
    where = (f"`{short(names[0])}`", f"`{short(names[1])}`")
    asked = [[turn for turn in side if turn["role"] == "user"] for side in (first, second)]
    if asked[0] != asked[1]:
        raise Unfit("prompts_differ", f"the user's turns in {where[0]} and {where[1]} differ")
    prompt, *answers = part(first, second, where)
    levels = (float(winner == 1), float(winner == 2))
    both = [Answer(*sides) for sides in zip(answers, levels, where, strict=True)]
    return Ranking(both, " and ".join(where), prompt)


def _tree(value: dict[str, Any], columns: Mapping[str, str], writing: Writing) -> list[Ranking]:
    """Every set of replies of the assistant that are ranked, after the messages that lead to them. Deleted messages
    are not read."""
    where = f"`{short(columns['tree'])}`"
    rankings = []
    for path, replies in _branches(value.get(columns["tree"]), where):
        ranked = [reply for reply in replies if reply.get("rank") is not None and reply.get("role") == "assistant"]
        if len(ranked) > 1 and path[-1]["role"] == "user":
            levels = [_rank_level(as_number(reply["rank"])) for reply in ranked]
            where_replies = f"{where}, the replies to `{short(path[-1]['content'])}`"
            rankings.append(_ranking([reply.get("text") for reply in ranked], levels, where_replies, writing, path))
    if not rankings:
        raise Unfit("missing_field", f"{where} has no two ranked replies to a message")
    return rankings


def _branches(root: Any, where: str) -> Iterator[tuple[list[Message], list[dict[str, Any]]]]:
    """The messages of a tree that have replies, in its order: what leads to each and itself, and its replies."""
    pending: list[tuple[list[Message], Any]] = [([], root)]
    while pending:
        before, node = pending.pop()
        if not isinstance(node, dict) or not isinstance(node.get("replies") or [], list):
            raise Unfit("bad_message", f"{where} has a message that is not {{role, text, replies}}")
        if (role := _TREE_ROLES.get(node.get("role", "user"))) is None:
            raise Unfit("bad_message", f"{where} has a message of the role `{short(node['role'])}`")
        path = [*before, message(role, node.get("text"), f"a message in {where}")]
        replies = [reply for reply in node.get("replies") or [] if isinstance(reply, dict) and not reply.get("deleted")]
        if replies:
            yield path, replies
        pending += [(path, reply) for reply in reversed(replies) if reply.get("replies")]


_Reader = Callable[[dict[str, Any], Mapping[str, str], Writing], list[Ranking]]
LAYOUTS: dict[str, _Reader] = {
    "rated answers": _objects,
    "rated completions": _objects,
    "answers and ratings": _lists,
    "answers and ranks": _lists,
    "best first": _best_first,
    "lists of chosen and rejected": _chosen_and_rejected,
    "answers and choice": _choice,
    "summaries and choice": _choice,
    "two conversations": _conversations,
    "two lists of turns": _lists_of_turns,
    "tree": _tree,
}
RATED = ("rated answers", "rated completions", "answers and ratings", "answers and ranks", "tree")
"""Layouts whose levels are numbers of the row; in the others they are an order alone."""
EACH_WITH_EACH = ("lists of chosen and rejected",)
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
