"""The run folder as the reports see it: its files as plain values, its verdict and its numbers in words.

Everything that comes out of `read_run` is safe to show: text holds no control characters and no broken Unicode, so it
can neither steer a terminal nor fail to encode. Markup is left as it is; escaping it is the work of whoever writes the
page.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from prefold.errors import UserError

Values = dict[str, Any]

NO_VALUE = "–"
MINUS = "\u2212"
NARROW_SPACE = "\u202f"


@dataclass(frozen=True)
class RunRecord:
    """The files of a run folder. None, or an empty list, stands for a file that the run has not written yet. Of its
    rollouts only the first, the middle and the last groups are here."""

    folder: Path
    recipe_text: str
    recipe: Values
    environment: Values | None
    data: Values | None
    metrics: list[Values]
    timing: list[Values]
    heldout: Values | None
    rewards: Values | None
    tasks: Values | None
    compared: Values | None
    win_rate: Values | None
    samples: list[Values]
    merge: Values | None
    guards: Values | None
    rollouts: list[Values]

    @property
    def name(self) -> str:
        return readable(self.folder.resolve().name)

    @property
    def method(self) -> str:
        return str(self.recipe.get("method", ""))

    @property
    def model(self) -> str:
        return str(section(self.recipe, "model").get("name", ""))

    @property
    def scores(self) -> bool:
        """Whether the model scores answers: it gives none itself, and is compared with chance."""
        return "chance" in (self.heldout or {})


# ---- reading ----------------------------------------------------------------------------------------------------


def read_run(folder: Path) -> RunRecord:
    """Read what a run has written so far.

    Raises:
        UserError: `folder` holds no recipe, or one of its files cannot be read.
    """
    recipe_text = _read(folder / "recipe.yaml", readable)
    if recipe_text is None:
        raise UserError(
            "not a run folder: it holds no recipe.yaml",
            where=readable(str(folder)),
            advice="give the `output_dir` of a run",
        )
    recipe = _read(folder / "recipe.yaml", lambda text: cleaned(yaml.safe_load(text)))
    recipe = recipe if isinstance(recipe, dict) else {}
    evaluated, asked = folder / "evaluation", section(recipe, "evaluate")
    return RunRecord(
        folder=folder,
        recipe_text=recipe_text,
        recipe=recipe,
        environment=_read_object(folder / "environment.json"),
        data=_read_object(folder / "data.json"),
        metrics=_read_lines(folder / "metrics.jsonl"),
        timing=_read_lines(folder / "timing.jsonl"),
        heldout=_read_object(evaluated / "heldout.json"),
        rewards=_read_object(evaluated / "rewards.json"),
        # What an earlier recipe asked for may still lie there.
        tasks=_read_object(evaluated / "tasks.json") if asked.get("tasks") else None,
        compared=_read_object(evaluated / "compared.json") if asked.get("compare_with") else None,
        win_rate=_read_object(evaluated / "win_rate.json") if asked.get("win_rate") else None,
        samples=_read_lines(folder / "samples.jsonl"),
        merge=_read_object(folder / "merge.json"),
        guards=_read_object(folder / "guards.json"),
        rollouts=_read(folder / "rollouts.jsonl", lambda text: _parse_lines(_excerpt(text))) or [],
    )


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        message = " ".join(readable(str(error)).split())
        raise UserError(
            f"cannot be read ({message})",
            where=readable(str(path)),
            advice="remove the file and run the recipe again; the stage that writes it is redone",
        ) from None


def _read_object(path: Path) -> Values | None:
    values: Values | None = _read(path, _parse_object)
    return values


def _parse_object(text: str) -> Values:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return {readable(key): cleaned(item) for key, item in value.items()}


def _read_lines(path: Path) -> list[Values]:
    return _read(path, _parse_lines) or []


def _parse_lines(text: str) -> list[Values]:
    rows: list[Values] = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            # A run that is still going, or was killed, may have half a line at the end.
            if number == len(lines):
                break
            raise ValueError(f"line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number}: not an object")
        rows.append(cleaned(row))
    return rows


GROUPS_READ = 8


def _excerpt(text: str) -> str:
    """The first, the middle and the last lines of a long file."""
    lines = text.split("\n")
    starts = (0, (len(lines) - GROUPS_READ) // 2, len(lines) - GROUPS_READ - 1)
    chosen = sorted({place for start in starts for place in range(max(start, 0), start + GROUPS_READ + 1)})
    return "\n".join(lines[place] for place in chosen if place < len(lines))


def cleaned(value: Any) -> Any:
    """A copy of plain values in which every text, keys included, is `readable`."""
    if isinstance(value, dict):
        return {readable(str(key)): cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [cleaned(item) for item in value]
    return readable(value) if isinstance(value, str) else value


_CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421}
# C1 controls steer terminals as ESC does; direction overrides turn the text that follows around. They have no pictures.
_UNSHOWABLE = [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_READABLE = _CONTROL_PICTURES | dict.fromkeys(_UNSHOWABLE, 0xFFFD)
for _kept in "\t\n":
    del _READABLE[ord(_kept)]


def readable(text: str) -> str:
    """`text` with control characters, direction overrides and lone surrogates made visible; tabs and newlines stay."""
    return text.replace("\r\n", "\n").translate(_READABLE)


def section(values: Values | None, name: str) -> Values:
    """A mapping inside a mapping; empty where it is missing or something else."""
    inner = (values or {}).get(name)
    return inner if isinstance(inner, dict) else {}


def as_list(value: Any) -> list[Any]:
    """A list; empty where it is missing or something else."""
    return value if isinstance(value, list) else []


def objects(value: Any) -> list[Values]:
    """The mappings in a list."""
    return [item for item in as_list(value) if isinstance(item, dict)]


def turns(conversation: Any) -> list[tuple[str, str]]:
    """Role and text of each message."""
    return [(str(one.get("role", "")), str(one.get("content", ""))) for one in objects(conversation)]


# ---- numbers for people -----------------------------------------------------------------------------------------


class Number(NamedTuple):
    """A number as it is shown, and in full."""

    text: str
    exact: str


def finite(value: Any) -> float | None:
    """`value` as a float; None for what is no number, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _number(value: Any, write: Callable[[float], str]) -> Number:
    number = finite(value)
    if number is None:
        return Number(NO_VALUE, "no finite value" if isinstance(value, float) else "")
    return Number(write(number).replace("-", MINUS), repr(value))


def percent(share: Any, digits: int = 0) -> Number:
    return _number(share, lambda value: f"{100 * value:.{digits}f}{NARROW_SPACE}%")


def points(share: Any, digits: int = 0) -> Number:
    """A difference of two shares, in percentage points, with its sign."""
    return _number(share, lambda value: f"{_round(100 * value, digits):+.{digits}f}")


def signed(value: Any) -> Number:
    return _number(value, lambda number: f"{_round(number, 2):+.2f}")


def decimal(value: Any) -> Number:
    """Three decimals where they say something, else three significant digits."""
    return _number(value, lambda number: f"{number:.3f}" if 1e-3 <= abs(number) < 100 else f"{number:.3g}")


def scientific(value: Any) -> Number:
    return _number(value, lambda number: f"{number:.1e}".replace("e-0", "e-").replace("e+0", "e+"))


def count(value: Any) -> Number:
    return _number(value, lambda number: f"{number:,.0f}".replace(",", NARROW_SPACE))


def duration(seconds: Any) -> Number:
    return _number(seconds, _duration)


def memory(megabytes: Any) -> Number:
    return _number(megabytes, lambda number: _with_unit(number, [(1e3, "GB")], "MB", ".0f"))


def p_value(value: Any) -> Number:
    return _number(value, lambda number: "p\u00a0<\u00a00.001" if number < 0.001 else f"p\u00a0=\u00a0{number:.2g}")


def _round(value: float, digits: int) -> float:
    # Adding 0.0 turns -0.0, which would be shown as "-0", into 0.0.
    return round(value, digits) + 0.0


def _with_unit(number: float, units: list[tuple[float, str]], smallest: str, smallest_format: str) -> str:
    for size, unit in units:
        if abs(number) >= size:
            return f"{number / size:.1f}\u00a0{unit}"
    text = format(number, smallest_format).replace(",", NARROW_SPACE)
    return f"{text}\u00a0{smallest}" if smallest else text


def _duration(seconds: float) -> str:
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h {minutes:02d}\u00a0min" if hours else f"{minutes}\u00a0min {rest:02d}\u00a0s"


# ---- the verdict ------------------------------------------------------------------------------------------------

Outcome = Literal["better", "worse", "mixed", "unclear", "missing"]


class Line(NamedTuple):
    """One of the things that were measured, in words and numbers."""

    outcome: Outcome
    text: str


@dataclass(frozen=True)
class Verdict:
    """What was measured says about the run: `headline` in words, `evidence` in numbers; or, where that is several
    things, in `lines`."""

    outcome: Outcome
    headline: str
    evidence: str = ""
    lines: tuple[Line, ...] = ()

    @property
    def sentence(self) -> str:
        return f"{self.headline} ({self.evidence})" if self.evidence else self.headline


def verdict(heldout: Values | None) -> Verdict:
    """Judge by the paired interval of the accuracy difference: an interval that holds 0 is no difference."""
    if heldout is None:
        return Verdict("missing", "Not evaluated yet")
    if "chance" in heldout:
        return chance_verdict(heldout)
    before = finite(section(heldout, "before").get("accuracy"))
    after = finite(section(heldout, "after").get("accuracy"))
    if before is None or after is None:
        return Verdict("missing", "No verdict: the evaluation gave no finite accuracy")
    difference = section(heldout, "difference")
    low, high = interval(difference.get("ci"))
    digits = accuracy_digits(heldout)
    was, became = percent(before, digits).text, percent(after, digits).text
    evidence = _evidence(difference, heldout.get("pairs"), digits)
    if low is not None and low > 0:
        return Verdict("better", f"Held-out accuracy rose from {was} to {became}", evidence)
    if high is not None and high < 0:
        return Verdict("worse", f"The model got worse: held-out accuracy fell from {was} to {became}", evidence)
    return Verdict("unclear", f"No clear difference: held-out accuracy was {was} before and {became} after", evidence)


def chance_verdict(heldout: Values) -> Verdict:
    """The same of a model that scores answers, by the interval of its accuracy: one that holds chance is no skill."""
    after, chance = section(heldout, "after"), section(heldout, "chance")
    accuracy, guessed = finite(after.get("accuracy")), finite(chance.get("accuracy"))
    if accuracy is None or guessed is None:
        return Verdict("missing", "No verdict: the evaluation gave no finite accuracy")
    low, high = interval(after.get("accuracy_ci"))
    parts = ["no interval"]
    if low is not None and high is not None:
        parts = [f"95{NARROW_SPACE}% interval {percent(low).text} to {percent(high).text}"]
    if finite(chance.get("p_value")) is not None:
        parts.append(p_value(chance["p_value"]).text)
    if finite(heldout.get("pairs")) is not None:
        parts.append(_pairs(heldout["pairs"]))
    evidence, became, by_chance = ", ".join(parts), percent(accuracy).text, percent(guessed).text
    if low is not None and low > guessed:
        return Verdict("better", f"Held-out accuracy is {became}, and {by_chance} by chance", evidence)
    if high is not None and high < guessed:
        return Verdict("worse", f"Worse than chance: held-out accuracy is {became}, not {by_chance}", evidence)
    return Verdict("unclear", f"Held-out accuracy is {became}, which is not clearly more than chance", evidence)


def reward_verdict(rewards: Values) -> Verdict:
    """The same of the mean reward of completions of held-out prompts."""
    before, after = (finite(section(rewards, when).get("reward")) for when in ("before", "after"))
    if before is None or after is None:
        return Verdict("missing", "No verdict: the evaluation gave no finite reward")
    difference = section(rewards, "difference")
    low, high = interval(difference.get("ci"))
    was, became = signed(before).text, signed(after).text
    parts = [signed(difference.get("reward")).text]
    if low is not None and high is not None:
        parts.append(f"95{NARROW_SPACE}% interval {signed(low).text} to {signed(high).text}")
    if finite(difference.get("p_value")) is not None:
        parts.append(p_value(difference["p_value"]).text)
    number = rewards.get("prompts")
    parts.append(f"{count(number).text} {'prompt' if number == 1 else 'prompts'}")
    evidence = ", ".join(parts)
    if low is not None and low > 0:
        return Verdict("better", f"The held-out reward rose from {was} to {became}", evidence)
    if high is not None and high < 0:
        return Verdict("worse", f"The model got worse: the held-out reward fell from {was} to {became}", evidence)
    return Verdict("unclear", f"No clear difference: the held-out reward was {was} before and {became} after", evidence)


def verdict_of(run: RunRecord) -> Verdict:
    return reward_verdict(run.rewards) if run.rewards and run.heldout is None else verdict(run.heldout)


def _evidence(difference: Values, pairs: Any, digits: int) -> str:
    low, high = interval(difference.get("ci"))
    unit = "point" if points(difference.get("accuracy"), digits).text in ("+1", f"{MINUS}1") else "points"
    parts = [f"{points(difference.get('accuracy'), digits).text} {unit}"]
    if low is None or high is None:
        parts.append("no interval")
    else:
        parts.append(f"95{NARROW_SPACE}% interval {points(low, digits).text} to {points(high, digits).text}")
    if finite(difference.get("p_value")) is not None:
        parts.append(p_value(difference["p_value"]).text)
    if finite(pairs) is not None:
        parts.append(_pairs(pairs))
    return ", ".join(parts)


def _pairs(number: Any) -> str:
    return f"{count(number).text} {'pair' if number == 1 else 'pairs'}"


def accuracy_digits(heldout: Values) -> int:
    """Decimals of a percentage: one where rounding to whole ones would hide the difference or belie the subtraction."""
    before, after = (finite(section(heldout, when).get("accuracy")) or 0.0 for when in ("before", "after"))
    difference = finite(section(heldout, "difference").get("accuracy"))
    difference = after - before if difference is None else difference
    adds_up = round(100 * after) - round(100 * before) == round(100 * difference)
    ends = [end for end in interval(section(heldout, "difference").get("ci")) if end is not None]
    rounds_to_zero = any(end != 0 and round(100 * end) == 0 for end in [*ends, difference])
    return 0 if adds_up and not rounds_to_zero else 1


def interval(value: Any) -> tuple[float, float] | tuple[None, None]:
    """Both ends of `[low, high]`, or neither."""
    if isinstance(value, list) and len(value) == 2:
        low, high = finite(value[0]), finite(value[1])
        if low is not None and high is not None:
            return low, high
    return None, None


# ---- before and after -------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A row of the before/after table. `note` says what it measures; the intervals are empty where there is none."""

    name: str
    note: str
    before: Number
    before_interval: str
    after: Number
    after_interval: str
    change: Number
    change_interval: str


def comparisons(heldout: Values) -> list[Comparison]:
    before, after, difference = (section(heldout, name) for name in ("before", "after", "difference"))
    digits = accuracy_digits(heldout)
    change = points(difference.get("accuracy"), digits)
    rows = [
        Comparison(
            name="Accuracy",
            note="share of held-out pairs in which the chosen answer is the likelier one, per token",
            before=percent(before.get("accuracy"), digits),
            before_interval=_range(before.get("accuracy_ci"), lambda end: percent(end, digits).text),
            after=percent(after.get("accuracy"), digits),
            after_interval=_range(after.get("accuracy_ci"), lambda end: percent(end, digits).text),
            change=change._replace(text=f"{change.text} points") if change.text != NO_VALUE else change,
            change_interval=_range(difference.get("ci"), lambda end: points(end, digits).text),
        ),
        Comparison(
            name="Margin",
            note="log-prob per token of the chosen minus the rejected answer, in nats",
            before=signed(before.get("margin")),
            before_interval="",
            after=signed(after.get("margin")),
            after_interval="",
            change=_difference(before.get("margin"), after.get("margin")),
            change_interval="",
        ),
    ]
    return rows + _reward_rows(section(heldout, "reward"))


def comparisons_of(run: RunRecord) -> list[Comparison]:
    if run.scores:
        return score_rows(section(run.heldout, "after"))
    if run.heldout:
        return comparisons(run.heldout)
    return reward_comparisons(run.rewards) if run.rewards else []


def columns_of(run: RunRecord) -> tuple[str, ...]:
    """The fields of a `Comparison` that the run has values for."""
    return ("after",) if run.scores else ("before", "after", "change")


def score_rows(after: Values) -> list[Comparison]:
    """The table of a model that scores answers; empty if there were no pairs."""
    if not after:
        return []
    nothing = Number(NO_VALUE, "there was no head to score with")

    def row(name: str, note: str, value: Number, ends: str = "") -> Comparison:
        return Comparison(name, note, nothing, "", value, ends, nothing, "")

    ends = _range(after.get("accuracy_ci"), lambda end: percent(end).text)
    share = "share of held-out pairs in which the chosen answer has the higher score"
    gap = "score of the chosen minus the rejected answer"
    return [
        row("Accuracy", share, percent(after.get("accuracy")), ends),
        row("Margin", gap, signed(after.get("margin"))),
    ]


def reward_comparisons(rewards: Values) -> list[Comparison]:
    """The table of a run whose method samples; empty if there was no prompt to compare."""
    before, after, difference = (section(rewards, name) for name in ("before", "after", "difference"))
    if not before or not after:
        return []

    def ends(value: Any) -> str:
        return _range(value, lambda end: signed(end).text)

    def row(name: str, note: str, was: Any, became: Any, write: Callable[[Any], Number] = signed) -> Comparison:
        return Comparison(name, note, write(was), "", write(became), "", _difference(was, became), "")

    total = row("Reward", "mean of a sampled completion of each held-out prompt", before["reward"], after["reward"])
    total = total._replace(
        before_interval=ends(before.get("reward_ci")),
        after_interval=ends(after.get("reward_ci")),
        change_interval=ends(difference.get("ci")),
    )
    alone_before, alone_after = (section(side, "rewards") for side in (before, after))
    single = [
        row(name, "this reward alone, unweighted", alone_before[name], alone_after.get(name))
        for name in alone_before
        if len(alone_before) > 1
    ]
    length = row("Length", "tokens of a completion", before.get("tokens"), after.get("tokens"), decimal)
    finished = row(
        "Finished", "share of completions that ended", before.get("finished"), after.get("finished"), percent
    )
    return [total, *single, length, finished._replace(change=Number(NO_VALUE, ""))]


def _reward_rows(reward: Values) -> list[Comparison]:
    nothing = Number(NO_VALUE, "measured against the model before training")
    share = "share of pairs whose chosen answer gained more on the base model than the rejected one"
    gap = "implicit reward of the chosen minus the rejected answer, against the base model"
    rows = []
    if "accuracy" in reward:
        rows.append(Comparison("Reward accuracy", share, nothing, "", percent(reward["accuracy"]), "", nothing, ""))
    if "margin" in reward:
        rows.append(Comparison("Reward margin", gap, nothing, "", signed(reward["margin"]), "", nothing, ""))
    return rows


def _range(ends: Any, write: Callable[[float], str]) -> str:
    low, high = interval(ends)
    return "" if low is None or high is None else f"{write(low)} to {write(high)}"


def _difference(before: Any, after: Any) -> Number:
    first, second = finite(before), finite(after)
    return signed(None if first is None or second is None else second - first)
