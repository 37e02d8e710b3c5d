"""Tasks, other models and win rate on the page and in the terminal; and the page across runs."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from fake_run import HELDOUT, HOSTILE, write_run
from fake_tasks import ASKED, WIN_RATE, measured
from rich.console import Console
from test_report_html import Page, report

from prefold.errors import UserError
from prefold.evaluation.task_comparison import compare_tasks
from prefold.reports import page as html
from prefold.reports.comparison import summary as comparison_summary
from prefold.reports.comparison import write_comparison
from prefold.reports.run_files import read_run, readable
from prefold.reports.run_table import summary
from prefold.reports.tasks import score_table, task_table, whisker
from prefold.reports.verdict import overall
from prefold.runs.comparison import compare


@pytest.fixture(autouse=True)
def _without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "library", lambda: "/* bokeh */")


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    return measured()


def plain(text: str) -> str:
    return " ".join(text.replace("\u202f", " ").replace("\u00a0", " ").replace("\u2212", "-").split())


def squeezed(text: str) -> str:
    """Without spaces, which stand between elements on the screen and not in the text."""
    return plain(text).replace(" ", "")


def printed(shown: Any) -> str:
    file = io.StringIO()
    Console(file=file, width=80, color_system=None, force_terminal=False).print(shown)
    return file.getvalue()


# ---- the verdict ------------------------------------------------------------------------------------------------


def test_the_headline_says_what_got_better_and_what_got_worse(facts: dict[str, Any], tmp_path: Path) -> None:
    found = overall(read_run(write_run(tmp_path, **facts)))
    assert found.outcome == "mixed"
    assert found.headline == "Better on held-out pairs, gsm8k and open prompts; worse on hellaswag"
    texts = [(line.outcome, plain(line.text)) for line in found.lines]
    assert texts[0][1].startswith("Held-out accuracy rose from 31 % to 92 % (+61 points")
    assert [outcome for outcome, _ in texts] == ["better", "worse", "better", "unclear", "unclear", "better"]
    assert texts[3] == ("unclear", "No difference shown on 3 other tasks")
    assert texts[4][1].startswith("Average of the tasks: ")
    assert texts[5][1] == (
        "New answers preferred: 60 % (95 % interval 54 % to 66 %, p = 0.002, 56 % at equal lengths, 194 prompts, "
        "judged by big)"
    )


def task(verdict: str, **changes: Any) -> dict[str, Any]:
    return {"before": 0.5, "after": 0.6, "difference": 0.1, "ci": [0.0, 0.2], "n": 9, "verdict": verdict, **changes}


@pytest.mark.parametrize(
    ("tasks", "headline", "outcome"),
    [
        ({"a": "better"}, "Better on held-out pairs and a", "better"),
        ({"a": "no difference"}, "Better on held-out pairs; no clear difference elsewhere", "better"),
        ({"a": "worse", "b": "worse"}, "Better on held-out pairs; worse on a and b", "mixed"),
        (
            dict.fromkeys("abcdef", "better"),
            "Better on held-out pairs, a, b and 4 more",
            "better",
        ),
    ],
)
def test_headlines(tasks: dict[str, str], headline: str, outcome: str, tmp_path: Path) -> None:
    written = {"tasks": {name: task(verdict) for name, verdict in tasks.items()}}
    found = overall(read_run(write_run(tmp_path, recipe=ASKED, tasks=written)))
    assert (found.headline, found.outcome) == (headline, outcome)


def test_nothing_changed_is_said_as_plainly(tmp_path: Path) -> None:
    unclear = HELDOUT | {"difference": {"accuracy": 0.01, "ci": [-0.1, 0.12], "p_value": 0.9}}
    run = write_run(tmp_path, recipe=ASKED, heldout=unclear, tasks={"tasks": {"a": task("no difference")}})
    assert overall(read_run(run)).headline == "No clear difference in anything that was measured"
    only = write_run(tmp_path / "b", recipe=ASKED, heldout=unclear, tasks={"tasks": {"a": task("worse")}})
    assert overall(read_run(only)).headline == "Worse on a; no clear difference elsewhere"


def test_without_tasks_and_judge_the_verdict_is_that_of_the_held_out_pairs(tmp_path: Path) -> None:
    assert overall(read_run(write_run(tmp_path))).headline.startswith("Held-out accuracy rose")


def test_questions_of_the_training_data_are_told(tmp_path: Path) -> None:
    seen = {"n": 3, "before": 0.0, "after": 1.0, "difference": 1.0, "ci": [0.1, 1.0], "p_value": 0.2}
    clean = {"n": 6, "before": 0.5, "after": 0.4, "difference": -0.1, "ci": [-0.2, 0.1], "p_value": 0.6}
    tasks = {"a": task("better", contaminated=seen, clean=clean), "b": task("better", contaminated={"n": 0})}
    tasks["c"] = task("better", contaminated={"n": 9}, clean={"n": 0})
    run = write_run(tmp_path, recipe=ASKED, tasks={"tasks": tasks})
    said = [plain(line.text) for line in overall(read_run(run)).lines if "training data" in line.text]
    without = "50.0 % to 40.0 % (-10.0 points, 95 % interval -20.0 to +10.0, p = 0.6)"
    assert said == [
        f"a: 3 of 9 questions are in the training data; without: {without}",
        "c: 9 of 9 questions are in the training data",
    ]
    shown = plain(printed(summary(run)))
    assert "3 in the training data" in shown and "-10.0 without" in shown
    text = squeezed(report(tmp_path, recipe=ASKED, tasks={"tasks": tasks}).text)
    assert squeezed("3 in the training data; -10.0 without") in text and squeezed("0 in the training data") not in text
    none = {"tasks": {"b": tasks["b"]}}
    unknown = {"tasks": {"a": task("better", contaminated=None)}}
    said = "None of the questions is in the training data."
    found = [said in report(tmp_path, recipe=ASKED, tasks=one).text for one in ({"tasks": tasks}, none, unknown)]
    assert found == [False, True, False]


def test_what_an_earlier_recipe_asked_for_is_not_shown(facts: dict[str, Any], tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, **{name: value for name, value in facts.items() if name != "recipe"}))
    assert (run.tasks, run.compared, run.win_rate) == (None, None, None)


# ---- the page ---------------------------------------------------------------------------------------------------


def test_the_page_shows_tasks_flips_models_and_win_rate(facts: dict[str, Any], tmp_path: Path) -> None:
    page = report(tmp_path, **facts)
    text = squeezed(page.text)
    for words in (
        "Win rate How often big prefers",
        "New answers preferred 60 % 54 % to 66 %",
        "At equal lengths 56 %",
        "312 → 421",
        "replies that name neither answer 5",
        "Both answers have their merits.",
        "hellaswag acc_norm, 5-shot, 400 questions",
        "+13 / -59 answers",
        "no difference shown",
        "The tasks of mmlu",
        "Average 7 tasks, 2 800 questions",
        "gsm8k: 38 became right, the first 5 shown",
        "Before, wrong to heat the room After, right to cool an engine Right answer to cool an engine",
        "Chat template off, on both sides.",
        "some/other-model",
    ):
        assert squeezed(words) in text, words
    assert page.raw["title"] == [
        f"{tmp_path.name}: Better on held-out pairs, gsm8k and open prompts; worse on hellaswag"
    ]


def test_a_page_without_tasks_and_judge_has_no_such_sections(tmp_path: Path) -> None:
    ids = {attributes.get("id") for _, attributes in report(tmp_path).elements}
    assert not ids & {"tasks", "win-rate", "others"}


def test_whiskers_lie_on_one_scale() -> None:
    """Ends at -5 and +15 points: the scale goes to 20, so that they are at 50 - 50 / 4 and 50 + 50 * 3 / 4 percent."""
    table = task_table({"tasks": {"a": task("better", ci=[-0.05, 0.15], difference=0.05), "b": task("worse", ci=None)}})
    assert table is not None and table.reach == 0.2
    assert whisker(0.05, [-0.05, 0.15], table.reach) == (37.5, 87.5, 62.5)
    assert whisker(0.1, None, table.reach) == (75.0, 75.0, 75.0)  # no interval: the dot alone


def test_scores_that_are_no_shares_have_no_percent_and_no_whisker(tmp_path: Path) -> None:
    perplexity = task("better", before=12.5, after=11.0, difference=-1.5, shares=False)
    page = report(tmp_path, recipe=ASKED, tasks={"tasks": {"a": perplexity}})
    assert squeezed("a 9 questions 12.500 11.000 -1.50") in squeezed(page.text).replace("\n", "")
    assert [attributes for tag, attributes in page.elements if tag == "b" and attributes.get("style")][2:] == []


def test_models_side_by_side_have_a_cell_for_every_task() -> None:
    models = {"x": {"tasks": {"a": task("better"), "b": task("worse")}}, "y": {"tasks": {"b": task("better")}}}
    table = score_table(models)
    assert table["a"][1] is None and [facts["verdict"] for facts in table["b"] if facts] == ["worse", "better"]


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"tasks": 3},
        {"tasks": {"a": 3}},
        {"tasks": {"a": {}}},
        {"tasks": {"a": {"flipped": [1], "ci": "x", "n": "many", "verdict": 4, "group": {}}}},
        {"tasks": {"a": {"before": float("nan"), "after": None, "difference": float("inf"), "ci": [1]}}},
        {
            "tasks": {"a": task("better")},
            "groups": {"g": {"members": 7}},
            "average": [],
            "settings": 4,
            "suites": {"s": 1},
        },
        {"tasks": {"a": task("better", flipped={"fixed": [3, {}], "broken": "x"})}, "left_out": {"b": 3}},
    ],
)
def test_odd_files_do_not_break_the_page(odd: Any, tmp_path: Path) -> None:
    for name in ("tasks", "win_rate"):
        page = report(tmp_path, recipe=ASKED, **{name: odd})
        assert not re.search(r"\b(nan|inf|None)\b", page.text)
    assert report(tmp_path, recipe=ASKED, compared={"models": {"x": odd}}).text
    printed(summary(write_run(tmp_path, recipe=ASKED, tasks=odd, win_rate=odd)))


def test_odd_win_rates_do_not_break_the_page(tmp_path: Path) -> None:
    odd = {"win_rate": 0.5, "ci": [None, 3], "judge": 4, "left_out": [], "characters": {"before": "x"}}
    text = plain(report(tmp_path, recipe=ASKED, win_rate=odd).text)
    assert "How often an unnamed judge prefers" in text
    assert squeezed("New answers preferred 50 % 0 even") in squeezed(text)


def test_people_judge_on_the_page_and_in_the_terminal(tmp_path: Path) -> None:
    agreement = {"compared": 40, "pairs": 40, "share": 0.85, "alpha": 0.614}
    people = {"kind": "people", "name": "2 people", "key": "k"}
    of_people = {"votes": 234, "both_bad": 7, "agreement": agreement, "judge": people}
    judged = {**WIN_RATE, **of_people, "left_out": {"same_answers": 3, "not_voted": 2, "of_other_answers": 1}}
    text = squeezed(report(tmp_path, recipe=ASKED, win_rate=judged).text)
    for words in (
        "How often 2 people prefer the answer",
        "votes 234",
        "of these, both answers bad 7",
        "pairs of votes that agree 85 %",
        "Krippendorff's alpha 0.61",
        "answers alike, not voted on 3",
        "not voted on yet 2",
        "other answers in the file of votes 1",
        "judged by 2 people, who agree in 85 % of the pairs of votes on the same answers",
    ):
        assert squeezed(words) in text, words
    assert "judgedby2people" in squeezed(printed(summary(write_run(tmp_path, recipe=ASKED, win_rate=judged))))
    nobody = {"judge": {**people, "name": "0 people"}, "prompts": 0, "comparisons": 0, "agreement": None, "votes": 0}
    text = plain(report(tmp_path, recipe=ASKED, win_rate=nobody).text)
    assert "Nobody has voted on these answers yet" in text and "New answers preferred" not in text


@pytest.fixture(scope="module")
def hostile_skeleton(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "library", lambda: "/* bokeh */")
        return report(tmp_path_factory.mktemp("harmless") / "run", **hostile("harmless")).skeleton


def hostile(text: str) -> dict[str, Any]:
    flip = {"question": text, "before": text, "after": text, "target": text}
    facts = task("better", metric=text, fixed=1, broken=1, flipped={"fixed": [flip], "broken": [flip]})
    tasks = {
        "tasks": {text: facts, "member": facts},
        "groups": {"g" + text: task("worse", members=["member", text])},
        "left_out": {text: text},
        "settings": {"harness": text, "suites": {text: text}},
    }
    judged = WIN_RATE | {"judge": {"name": text}, "verdict": text, "replies_without_verdict": [text]}
    return {"recipe": ASKED, "tasks": tasks, "compared": {"models": {text: tasks}}, "win_rate": judged}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(text: str, hostile_skeleton: list[Any], tmp_path: Path) -> None:
    page = report(tmp_path / "run", **hostile(text))
    assert page.skeleton == hostile_skeleton
    assert page.text.count(readable(text).strip()) >= 12
    shown = printed(summary(tmp_path / "run"))
    assert not [letter for letter in shown if (ord(letter) < 32 and letter != "\n") or 0x7F <= ord(letter) < 0xA0]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_on_the_page_across_runs_is_text(text: str, tmp_path: Path) -> None:
    pages = []
    for place, words in enumerate((text, "harmless")):
        told = {"method": words, "model": words, "outcome": words, "verdict": words, "evidence": [words]}
        tasks = hostile(words)["tasks"]
        found = {"baseline": words, "models": {words: tasks, "b" + words: tasks}, "runs": {words: told}}
        write_comparison(tmp_path / f"{place}.html", found)
        pages.append(Page((tmp_path / f"{place}.html").read_text(encoding="utf-8")))
    assert [tag for tag, _ in pages[0].elements] == [tag for tag, _ in pages[1].elements]
    assert pages[0].raw["script"] == []
    assert pages[0].text.count(readable(text).strip()) >= 12
    printed(comparison_summary(found))


# ---- the terminal -----------------------------------------------------------------------------------------------


def test_the_terminal_shows_tasks_within_80_columns(facts: dict[str, Any], tmp_path: Path) -> None:
    text = printed(summary(write_run(tmp_path, **facts)))
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert "gsm8k 3.8 % 11.5 % +7.8 better" in plain(text)
    assert "Better on held-out pairs, gsm8k and open prompts; worse on hellaswag" in plain(text)
    assert "mmlu_virology" not in text  # a group is one row


# ---- across runs ------------------------------------------------------------------------------------------------


def runs(tmp_path: Path, facts: dict[str, Any]) -> list[str]:
    """Two run folders with scores of the same tasks."""
    from random import Random

    from fake_tasks import scores

    draw, folders = Random(5), []
    before, *after = (scores(draw, gained, str) for gained in range(3))
    for name, one in zip(("one", "two"), after, strict=True):
        written = {"scores_before": before, "scores_after": one}
        folder = write_run(tmp_path / name, **facts | {"tasks": compare_tasks(before, one)})
        for stem, side in written.items():
            (folder / "evaluation" / f"{stem}.json").write_text(json.dumps([asdict(record) for record in side]))
        folders.append(str(folder))
    return folders


def test_run_folders_are_compared_with_the_first(facts: dict[str, Any], tmp_path: Path) -> None:
    one, two = runs(tmp_path, facts)
    found = compare([one, two])
    assert found["baseline"] == one and list(found["models"]) == [two] and list(found["runs"]) == [one, two]
    tasks = found["models"][two]["tasks"]
    assert tasks["hellaswag"]["verdict"] == "better"
    own = json.loads((Path(one) / "evaluation" / "tasks.json").read_text())["tasks"]["hellaswag"]
    assert tasks["hellaswag"]["before"] == own["after"]
    write_comparison(tmp_path / "page.html", found)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Better on" in page.raw["title"][0]
    assert "What each run measured of itself" in page.text and "Held-out accuracy rose" in page.text
    shown = printed(comparison_summary(found))
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())
    assert squeezed(f"{two} against {one}") in squeezed(shown)


def test_one_run_folder_is_compared_with_itself_before(facts: dict[str, Any], tmp_path: Path) -> None:
    one, _ = runs(tmp_path, facts)
    found = compare([one])
    assert found["baseline"] == f"{one}, before"
    written = json.loads((Path(one) / "evaluation" / "tasks.json").read_text())["tasks"]
    assert found["models"][one]["tasks"] == written


def test_a_page_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_comparison(tmp_path / "taken" / "page.html", {"baseline": "a", "models": {}, "runs": {}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heldout": None}, "this run has not been evaluated yet"),
        ({"heldout": None, "samples": None, "merge": None}, "`prefold run .*two` finishes it"),
        ({"recipe": ASKED}, "nothing can be compared with .*one was asked tasks"),
        ({"recipe": ASKED, "scores_after": "{"}, r"scores_after\.json: cannot be read"),
        ({"recipe": ASKED, "scores_after": "3"}, r"scores_after\.json: cannot be read"),
        ({"recipe": ASKED, "scores_after": '[{"task": "a"}]'}, r"scores_after\.json: cannot be read"),
    ],
)
def test_run_folders_with_stages_missing_are_one_message(
    changes: dict[str, Any], message: str, facts: dict[str, Any], tmp_path: Path
) -> None:
    one, _ = runs(tmp_path / "whole", facts)
    two = write_run(tmp_path / "two", **changes)
    with pytest.raises(UserError, match=message):
        compare([one, str(two)])


def test_what_cannot_be_compared_is_one_message(facts: dict[str, Any], tmp_path: Path) -> None:
    one, two = runs(tmp_path, facts)
    with pytest.raises(UserError, match="there is nothing to compare it with"):
        compare(["some/model"])
    with pytest.raises(UserError, match="is named twice"):
        compare([one, two, one])
    with pytest.raises(UserError, match="nothing says what to ask the models"):
        compare(["some/model", "other/model"])
    with pytest.raises(UserError, match="--limit and --num-fewshot are for --tasks"):
        compare([one, two], limit=3)
    scores = [
        record | {"version": "9"} for record in json.loads((Path(two) / "evaluation/scores_after.json").read_text())
    ]
    (Path(two) / "evaluation" / "scores_after.json").write_text(json.dumps(scores))
    with pytest.raises(UserError, match=r"nothing can be compared with .* the version differs: 1\.0 and 9"):
        compare([one, two])
