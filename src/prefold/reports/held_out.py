"""Before and after on held-out data: the rows of the table that page, card and terminal show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from prefold.reports.numbers import decimal, finite, interval, percent, points, signed, written
from prefold.reports.run_files import RunRecord, Values, section

NOT_BEFORE = "measured against the model before training"


@dataclass(frozen=True)
class Row:
    """`values` and `intervals` are by column: before, after, change. `unit` is that of the change."""

    name: str
    note: str
    values: Mapping[str, Any]
    write: Callable[[Any], str] = signed
    write_change: Callable[[Any], str] = signed
    intervals: Mapping[str, Any] = field(default_factory=dict)
    unit: str = ""

    def writer(self, column: str) -> Callable[[Any], str]:
        return self.write_change if column == "change" else self.write

    def text(self, column: str) -> str:
        return written(self.values.get(column), self.writer(column), self.unit if column == "change" else "")


def columns_of(run: RunRecord) -> tuple[str, ...]:
    """What the run has values for."""
    return ("after",) if run.scores else ("before", "after", "change")


def rows_of(run: RunRecord) -> list[Row]:
    if run.scores:
        return _score_rows(section(run.heldout, "after"))
    return _pair_rows(run.heldout) if run.heldout else _reward_rows(run.rewards or {})


def accuracies_of(run: RunRecord) -> dict[str, Values]:
    """What was measured before and after, where each has an accuracy; else nothing."""
    sides = {name: section(run.heldout, name) for name in columns_of(run) if name != "change"}
    return sides if all(finite(facts.get("accuracy")) is not None for facts in sides.values()) else {}


def _score_rows(after: Values) -> list[Row]:
    """Of a model that scores answers; none if there were no pairs."""
    if not after:
        return []
    share = "share of held-out pairs in which the chosen answer has the higher score"
    gap = "score of the chosen minus the rejected answer"
    intervals = {"after": after.get("accuracy_ci")}
    return [
        Row("Accuracy", share, {"after": after.get("accuracy")}, percent, intervals=intervals),
        Row("Margin", gap, {"after": after.get("margin")}),
    ]


def _pair_rows(heldout: Values) -> list[Row]:
    before, after, difference = (section(heldout, name) for name in ("before", "after", "difference"))
    digits = accuracy_digits(heldout)
    rows = [
        Row(
            "Accuracy",
            "share of held-out pairs in which the chosen answer is the likelier one, per token",
            _columns(before.get("accuracy"), after.get("accuracy"), difference.get("accuracy")),
            partial(percent, digits=digits),
            partial(points, digits=digits),
            _columns(before.get("accuracy_ci"), after.get("accuracy_ci"), difference.get("ci")),
            " points",
        ),
        _row("Margin", "log-prob per token of the chosen minus the rejected answer, in nats", before, after, "margin"),
    ]
    reward = section(heldout, "reward")
    share = "share of pairs whose chosen answer gained more on the base model than the rejected one"
    gap = "implicit reward of the chosen minus the rejected answer, against the base model"
    if "accuracy" in reward:
        rows.append(Row("Reward accuracy", share, _columns(NOT_BEFORE, reward["accuracy"], NOT_BEFORE), percent))
    if "margin" in reward:
        rows.append(Row("Reward margin", gap, _columns(NOT_BEFORE, reward["margin"], NOT_BEFORE)))
    return rows


def _reward_rows(rewards: Values) -> list[Row]:
    """Of a run whose method samples; none if there was no prompt to compare."""
    before, after = section(rewards, "before"), section(rewards, "after")
    if not before or not after:
        return []
    intervals = _columns(before.get("reward_ci"), after.get("reward_ci"), section(rewards, "difference").get("ci"))
    total = _row("Reward", "mean of a sampled completion of each held-out prompt", before, after, "reward")
    single = section(before, "rewards") if len(section(before, "rewards")) > 1 else {}
    finished = _columns(before.get("finished"), after.get("finished"), None)
    return [
        replace(total, intervals=intervals),
        *(_row(name, "this reward alone, unweighted", single, section(after, "rewards"), name) for name in single),
        _row("Length", "tokens of a completion", before, after, "tokens", decimal),
        Row("Finished", "share of completions that ended", finished, percent),
    ]


def _row(name: str, note: str, before: Values, after: Values, key: str, write: Callable[[Any], str] = signed) -> Row:
    first, second = finite(before.get(key)), finite(after.get(key))
    change = None if first is None or second is None else second - first
    return Row(name, note, _columns(before.get(key), after.get(key), change), write)


def _columns(before: Any, after: Any, change: Any) -> dict[str, Any]:
    return {"before": before, "after": after, "change": change}


def accuracy_digits(heldout: Values) -> int:
    """Decimals of a percentage: one where rounding to whole ones would hide the difference or belie the subtraction."""
    before, after = (finite(section(heldout, when).get("accuracy")) or 0.0 for when in ("before", "after"))
    difference = finite(section(heldout, "difference").get("accuracy"))
    difference = after - before if difference is None else difference
    adds_up = round(100 * after) - round(100 * before) == round(100 * difference)
    ends = [end for end in interval(section(heldout, "difference").get("ci")) if end is not None]
    rounds_to_zero = any(end != 0 and round(100 * end) == 0 for end in [*ends, difference])
    return 0 if adds_up and not rounds_to_zero else 1
