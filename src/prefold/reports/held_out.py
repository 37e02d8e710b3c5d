"""Before and after on held-out data: the rows of the table that page, card and terminal show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prefold.reports.numbers import decimal, finite, interval, percent, points, signed, written
from prefold.reports.run_files import RunRecord, Values, section
from prefold.reports.tasks import decimals_of

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
    """The columns that the run has values for."""
    return ("after",) if run.scores else ("before", "after", "change")


def rows_of(run: RunRecord) -> list[Row]:
    comparison = comparison_of(run)
    if run.scores:
        return _score_rows(section(run.heldout, "after"), accuracy_digits(comparison))
    if run.heldout:
        return _pair_rows(run.heldout, accuracy_digits(comparison))
    return _reward_rows(run.rewards or {}, decimals_of(comparison))


def comparison_of(run: RunRecord) -> Values:
    """The held-out comparison, with the facts that every comparison has; empty if there is none. A reward model is
    compared with chance, `even`."""
    if run.heldout is None:
        return _one_comparison(run.rewards or {}, "reward", "prompt")
    chance, after = section(run.heldout, "chance"), section(run.heldout, "after")
    if not chance:
        return _one_comparison(run.heldout, "accuracy", "pair")
    even, ci = chance.get("accuracy"), after.get("accuracy_ci")
    own = {"before": even, "after": after.get("accuracy"), "even": even, "ci": ci}
    facts = {**chance, **own, "n": run.heldout.get("pairs"), "metric": "accuracy", "unit": "pair", "shares": True}
    return _with_verdict(facts, finite(even) or 0.0)


def _one_comparison(facts: Values, metric: str, unit: str) -> Values:
    sides = {when: section(facts, when).get(metric) for when in ("before", "after")}
    difference = section(facts, "difference")
    own = {"difference": difference.get(metric), "metric": metric, "unit": unit, "shares": metric == "accuracy"}
    return _with_verdict({**difference, **sides, **own, "n": facts.get(f"{unit}s")}, 0.0) if facts else {}


def _with_verdict(facts: Values, even: float) -> Values:
    """Add a verdict if there is none. Earlier versions wrote none, and took interval and p-value from two tests: where
    these disagree, the verdict is empty, and the interval is left out."""
    if "verdict" in facts:
        return facts
    (low, high), p_value = interval(facts.get("ci")), finite(facts.get("p_value"))
    side = "" if low is None or high is None or low <= even <= high else "better" if low > even else "worse"
    if bool(side) != (p_value is not None and p_value < 0.05):
        return {**facts, "ci": None, "verdict": ""}
    return {**facts, "verdict": side}


def accuracies_of(run: RunRecord) -> dict[str, Values]:
    """The held-out facts by column, `before` and `after`, if each has an accuracy; else empty."""
    sides = {name: section(run.heldout, name) for name in columns_of(run) if name != "change"}
    return sides if all(finite(facts.get("accuracy")) is not None for facts in sides.values()) else {}


def _score_rows(after: Values, digits: int) -> list[Row]:
    """Rows of a reward model; none if there were no pairs."""
    if not after:
        return []
    share = "share of held-out pairs in which the chosen answer has the higher score"
    gap = "score of the chosen minus the rejected answer"
    intervals = {"after": after.get("accuracy_ci")}
    return [
        Row("Accuracy", share, {"after": after.get("accuracy")}, partial(percent, digits=digits), intervals=intervals),
        Row("Margin", gap, {"after": after.get("margin")}),
    ]


def _pair_rows(heldout: Values, digits: int) -> list[Row]:
    before, after, difference = (section(heldout, name) for name in ("before", "after", "difference"))
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
        Row(
            "Margin",
            "log-prob per token of the chosen minus the rejected answer, in nats",
            _with_change(before, after, "margin"),
        ),
    ]
    reward = section(heldout, "reward")
    share = "share of pairs whose chosen answer gained more on the base model than the rejected one"
    gap = "implicit reward of the chosen minus the rejected answer, against the base model"
    if "accuracy" in reward:
        rows.append(Row("Reward accuracy", share, _columns(NOT_BEFORE, reward["accuracy"], NOT_BEFORE), percent))
    if "margin" in reward:
        rows.append(Row("Reward margin", gap, _columns(NOT_BEFORE, reward["margin"], NOT_BEFORE)))
    return rows


def _reward_rows(rewards: Values, digits: int) -> list[Row]:
    """Rows of a run whose method samples; none if there was no prompt to compare."""
    before, after = section(rewards, "before"), section(rewards, "after")
    if not before or not after:
        return []
    write, total = partial(signed, digits=digits), "mean of a sampled completion of each held-out prompt"
    intervals = _columns(before.get("reward_ci"), after.get("reward_ci"), section(rewards, "difference").get("ci"))
    single = section(before, "rewards") if len(section(before, "rewards")) > 1 else {}
    finished = _columns(before.get("finished"), after.get("finished"), None)
    return [
        Row("Reward", total, _with_change(before, after, "reward"), write, write, intervals),
        *(
            Row(name, "this reward alone, unweighted", _with_change(single, section(after, "rewards"), name))
            for name in single
        ),
        Row("Length", "tokens of a completion", _with_change(before, after, "tokens"), decimal),
        Row("Finished", "share of completions that ended", finished, percent),
    ]


def _with_change(before: Values, after: Values, key: str) -> dict[str, Any]:
    first, second = finite(before.get(key)), finite(after.get(key))
    return _columns(before.get(key), after.get(key), None if first is None or second is None else second - first)


def _columns(before: Any, after: Any, change: Any) -> dict[str, Any]:
    return {"before": before, "after": after, "change": change}


def accuracy_digits(comparison: Values) -> int:
    """Decimals of a held-out accuracy in percent: none; one if whole percentages would not add up; or more, if the
    verdict needs them."""
    before, after = (finite(comparison.get(when)) or 0.0 for when in ("before", "after"))
    difference = finite(comparison.get("difference"))
    difference = after - before if difference is None else difference
    adds_up = round(100 * after) - round(100 * before) == round(100 * difference)
    return decimals_of(comparison, 0 if adds_up else 1, finite(comparison.get("even")) or 0.0)
