"""The result of rounds, as a page and for a terminal of 80 columns: each model against the one before and the base."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding

from prefold.files import read_json, without_home, write_text
from prefold.reports.numbers import counted, finite, interval, score
from prefold.reports.run_files import Values, cleaned, objects, section
from prefold.reports.tasks import are_shares, decimals_of, outcome_of, task_table
from prefold.reports.templates import page_template
from prefold.reports.terminal_tables import STYLES, coloured, indented, plain, tasks_table
from prefold.reports.verdict import Line, Verdict, change_evidence, change_sentence

FACTS, PAGE = "rounds.json", "rounds.html"
RULE = (
    "A round is followed by another only if its model is shown to be better than the one before it: on the held-out "
    "prompts, by the paired comparison, p below 0.05."
)


def write_rounds(folder: Path) -> None:
    """Write the page of a folder of rounds, from its `rounds.json`."""
    facts = cleaned(read_json(folder / FACTS))
    rounds, recipe = objects(facts["rounds"]), section(facts, "recipe")
    tables = {"The round before": _by_round(facts, "against_before")}
    if len(rounds) > 1:  # before the first round there is only the base
        tables["The base"] = _by_round(facts, "against_base")
    text = page_template("rounds.html.j2")(
        name=cleaned(folder.resolve().name),
        method=recipe.get("method", ""),
        model=section(recipe, "model").get("name", ""),
        verdict=verdict(facts),
        rule=RULE,
        tables=tables,
        reaches={baseline: _reach(rows) for baseline, rows in tables.items()},
        models={_model(0): section(facts, "base")}
        | {_model(entry["round"]): section(entry, "model") for entry in rounds},
        by_rewards=finite(section(facts, "base").get("reward")) is not None,
        pairs={f"Round {entry['round']}": section(entry, "pairs") for entry in rounds},
        reports={_model(entry["round"]): f"rounds/{entry['round']}/report.html" for entry in rounds},
        costs=_costs(facts),
    )
    write_text(folder / PAGE, text)


def summary(folder: Path) -> RenderableType:
    """The result for rich to print, in which every text is plain text."""
    facts = cleaned(read_json(folder / FACTS))
    result = verdict(facts)
    lines: list[RenderableType] = [plain(result.headline, STYLES[result.outcome])]
    lines += [indented(coloured(line.text, line.outcome)) for line in result.lines]
    if table := task_table({"tasks": _by_round(facts, "against_before")}):
        lines.append(Padding(tasks_table(table, heading="against the round before"), (1, 0, 1, 0)))
    shown = cleaned(without_home(str(folder)))
    lines.append(plain(f"page         {shown}/{PAGE}", "dim"))
    if facts["best"]:
        lines.append(plain(f"best model   {shown}/rounds/{facts['best']}", "dim"))
    return Group(*lines)


def verdict(facts: Values) -> Verdict:
    """Up to which round the model got better, what each round did, and why there is no further one."""
    rounds, best = objects(facts.get("rounds")), int(facts.get("best") or 0)
    if not rounds:
        return Verdict("missing", "No round is done yet")
    total = section(rounds[max(best, 1) - 1], "against_base")
    outcome = outcome_of(total)
    if best:
        headline = f"{'One round' if best == 1 else f'{best} rounds'} made the model better"
        if outcome != "better":
            headline = f"Each of {best} rounds improved on the one before, but the last is not clearly above the base"
    else:
        headline = "The first round " + {"worse": "made the model worse"}.get(outcome, "did not clearly help")
    lines = [
        Line(outcome_of(entry["against_before"]), f"{name}: {_sentence(entry['against_before'])}")
        for entry in rounds
        for name in [f"Round {entry['round']} against {_before(entry['round'])}"]
    ]
    if best > 1:
        lines.append(Line(outcome, f"Round {best} against the base: {_sentence(total)}"))
    return Verdict(outcome, headline, "", (*lines, Line("unclear", _end(facts, rounds, best))))


def _end(facts: Values, rounds: list[Values], best: int) -> str:
    number, last = facts["number"], len(rounds)
    if without := finite(facts.get("without_pairs")):
        return f"Round {without:.0f} was not begun: no pair could be made of the answers"
    if best < last:
        is_worse = outcome_of(section(rounds[-1], "against_before")) == "worse"
        how = "worse than" if is_worse else "not shown to be better than"
        which = f"the model of round {best} is the one to take" if best else "the base is the one to keep"
        return f"Round {last} is the last: it is {how} {_before(last)}, so {which}"
    if not facts.get("is_over"):
        return f"Not over yet: {counted(last, 'round')} of {number} done"
    return f"Round {last} still helped, and no more were asked for"


def _before(number: int) -> str:
    return f"round {number - 1}" if number > 1 else "the base"


def _model(number: int) -> str:
    return f"After round {number}" if number else "The base"


def _sentence(facts: Values) -> str:
    if facts.get("metric") == "reward":
        return f"held-out reward {change_sentence(facts)}"
    preferred = score(facts.get("after"), are_shares(facts), decimals_of(facts))
    return f"its answers are preferred in {preferred} of the cases, {change_evidence(facts)}"


def _by_round(facts: Values, against: str) -> dict[str, Values]:
    return {f"Round {entry['round']}": section(entry, against) for entry in objects(facts.get("rounds"))}


def _reach(rows: dict[str, Values]) -> float:
    """Half the scale on which all differences with their intervals are drawn."""
    ends = [end for row in rows.values() for end in (*interval(row.get("ci")), finite(row.get("difference")))]
    return max((abs(end) for end in ends if end), default=0.0)


def _costs(facts: Values) -> dict[str, Counter[str]]:
    """The total cost of rewards that call an endpoint, by their names."""
    total: dict[str, Counter[str]] = {}
    of_rounds = [section(entry, part) for entry in objects(facts.get("rounds")) for part in ("pairs", "model")]
    for part in (section(facts, "base"), *of_rounds):
        for name, numbers in section(part, "cost").items():
            total.setdefault(name, Counter()).update(numbers)
    return total
