"""The report page: hostile text stays text, missing and odd files do not break it, and it needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_run import DATA, ENVIRONMENT, HELDOUT, HOSTILE, MERGE, RECIPE, metrics, sample, write_run

from prefold.errors import UserError
from prefold.reports import curves
from prefold.reports import page as html
from prefold.reports.check import print_check
from prefold.reports.data_tables import data_tables, example
from prefold.reports.page import write_check, write_report
from prefold.reports.run_files import readable
from prefold.terminal import as_text

VOID = {"meta", "link", "br", "img", "input", "base"}


class Page(HTMLParser):
    """What a browser would make of a page: its elements with their attributes, and the text outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": [], "title": []}
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in self.raw:
            self.raw[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]][-1] += data
        else:
            self.text += data

    @property
    def skeleton(self) -> list[tuple[str, frozenset[str]]]:
        """Elements by name and names of attributes; `title` attributes come and go with numbers."""
        return [(tag, frozenset(attributes) - {"title"}) for tag, attributes in self.elements]


def report(folder: Path, **changes: Any) -> Page:
    return Page(write_report(write_run(folder, **changes)).read_text(encoding="utf-8"))


def shown_row(text: str) -> dict[str, Any]:
    tokens = {"prompt": [(text, "prompt")], "chosen": [(text, "scored")], "rejected": [(text, "scored")]}
    return row_of(tokens, text)


def row_of(parts: dict[str, list[tuple[str, str]]], source: str = "words") -> dict[str, Any]:
    """A row as `prefold check` shows it, of texts and what each of them is."""
    tokens = {
        name: [{"id": number, "text": text, "part": part} for number, (text, part) in enumerate(of_part)]
        for name, of_part in parts.items()
    }
    counts = {name: len(of_part) for name, of_part in parts.items()}
    return {"row": {"source": source, "row": 1}, "counts": counts, "tokens": tokens}


def run_of_texts(text: str) -> dict[str, Any]:
    """Changes that put one text wherever a run has text."""
    finding = {"kind": text, "severity": "warning", "count": 1, "rows": [{"source": text, "row": 1}]}
    recipe = yaml.safe_load(RECIPE) | {
        "method": text,
        "description": text,
        "model": {"name": text},
        "evaluate": {"prompts": [text]},
    }
    return {
        "recipe": yaml.safe_dump(recipe),
        "environment": ENVIRONMENT | {"device_name": text, "packages": {text: text}},
        "data": DATA
        | {
            "sources": [{"path": text, "shape": text, "rows_in": 1, "rows_used": 1}],
            "findings": [finding | {"message": text, "advice": text}],
            "fingerprint": {"train": text},
            "examples": [shown_row(text)],
        },
        "metrics": [{"step": step, "loss": 0.7, text: 1.0} for step in (1, 2)],
        "samples": [
            {"prompt": [{"role": text, "content": text}], "before": [text, text], "after": [text, text]}
            | {"finish_reasons": {"before": [text, "length"], "after": text}},
            sample(text, text, text),
        ],
        "merge": MERGE | {"dtype": text},
        "guards": {"events": [dict.fromkeys(("guard", "action", "step", "message", "advice", "rows"), text)]},
        "timing": [{"stage": text, "seconds": 1.0, "peak_memory_mb": 10}],
    }


@pytest.fixture(scope="module", autouse=True)
def _without_the_library() -> Iterator[None]:
    """Leave the megabyte of bokeh out of the pages, except where it is the subject."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "library", lambda: "/* bokeh */")
        yield


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(tmp_path_factory.mktemp("harmless"), **run_of_texts("harmless"))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(text: str, harmless: Page, tmp_path: Path) -> None:
    page = report(tmp_path, **run_of_texts(text))
    assert page.skeleton == harmless.skeleton
    assert page.raw["script"][1:] == harmless.raw["script"][1:]
    # Twice in the first exchange's prompt and four times in its answers, then once and twice; more in tables.
    assert page.text.count(readable(text).strip()) >= 12


def checked(text: str) -> dict[str, Any]:
    """What `prefold check --reference` found, of one text wherever there is text."""
    histogram = {"edges": [-1.0, 0.0, 1.0], "counts": [3, 9]}
    separation = {"pairs": 12, "accuracy": 0.75, "quartiles": [0.0, 0.4, 0.6], "histogram": histogram}
    trains = {"method": text, "model": text, "trains": text}
    return {**run_of_texts(text)["data"], **trains, "ok": True, "separation": separation, "plan": planned(text)}


def planned(text: str) -> dict[str, Any]:
    return {
        "optimizer_steps": 40,
        "batch_size": 8,
        "dtype": "float32",
        "device": "cpu",
        "packed": True,
        "fits": False,
        "memory": {"training": {"weights": 5e8, "activations": 1e9}, "merge": {"weights": 5e8}},
        "peaks": {"training": 1.5e9, "merge": 5e8},
        "peak": 1.5e9,
        "at_hand": 1e9,
        "budget": 1024,
        "largest_budget": 512,
        "tokens": 12_000,
        "plain_tokens": 18_000,
        "flops": 1.2e15,
        "seconds": {"training": 200.0},
        "untimed": ["tasks"],
        "disk": {"checkpoints": 1e8, "adapter": 2e7, "merged": 5e8, "needed": 6.2e8, "free": 1e10},
        "change": {"fits": True, "peak": 9e8, "yaml": f"train: {{max_tokens: 512}} # {text}"},
    }


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_on_the_page_of_a_check_is_text(text: str, tmp_path: Path) -> None:
    pages = []
    for place, words in enumerate((text, "harmless")):
        write_check(tmp_path / f"{place}.html", words, checked(words))
        pages.append(Page((tmp_path / f"{place}.html").read_text(encoding="utf-8")))
    assert pages[0].skeleton == pages[1].skeleton
    assert pages[0].raw["script"] == []
    assert pages[0].text.count(readable(text).strip()) >= 8


def test_the_page_of_a_check(tmp_path: Path) -> None:
    write_check(tmp_path / "check.html", "mine.yaml", checked("words"))
    page = Page((tmp_path / "check.html").read_text(encoding="utf-8"))
    assert page.raw["title"] == ["mine.yaml: data"]
    assert "The data can be trained on." in page.text and "1 warning" in page.text
    assert "75\u202f% of 12 pairs" in page.text
    assert "does not fit into 1.0 GB" in page.text and "train: {max_tokens: 512}" in page.text
    bars = [attributes for tag, attributes in page.elements if tag == "i" and "style" in attributes]
    assert [(bar.get("class"), bar["style"]) for bar in bars] == [("against", "width: 33.3%"), (None, "width: 100.0%")]
    trained = [
        attributes["class"] for _, attributes in page.elements if "token" in (attributes.get("class") or "").split()
    ]
    assert trained == ["token differs", "token", "token trained", "token trained"], "the legend, prompt and completions"
    assert not [tag for tag, attributes in page.elements if attributes.get("class") == "context"]


def test_context_within_a_completion_is_not_shown_as_trained(tmp_path: Path) -> None:
    facts = checked("words") | {"sources": [], "tokens": {}}
    texts = [("I look.", "scored"), (" 42", "context"), (" ", "context"), ("So.", "scored")]
    shown = row_of({"prompt": [("Why?", "prompt")], "chosen": texts, "rejected": [("No.", "scored")]})
    write_check(tmp_path / "check.html", "mine.yaml", facts | {"examples": [shown]})
    page = Page((tmp_path / "check.html").read_text(encoding="utf-8"))
    classes = [attributes["class"] for tag, attributes in page.elements if tag == "span" and attributes.get("class")]
    assert classes.count("context") == 1 and classes.count("token context") == 2, "the legend and the tokens"
    assert "what is grey is read only" in page.text and "I look. 42 So." in page.text
    text = as_text(lambda console: print_check({**facts, "examples": [shown]}, console))
    assert "I look.~ 42 ~So." in text and "what is between ~ and ~ is read only" in " ".join(text.split())
    plain = as_text(lambda console: print_check({**facts, "examples": [shown_row("words")]}, console))
    assert "~" not in plain


def test_tokens_that_differ_are_marked_and_lengths_are_drawn(tmp_path: Path) -> None:
    sides = {"chosen": ["A", " cat", " purrs"], "rejected": ["A", " dog", " purrs", "!"]}
    shown = row_of({name: [(text, "scored") for text in texts] for name, texts in sides.items()})
    assert {
        name: [token.text for token in tokens if token.differs] for name, (_, tokens) in example(shown)[1].items()
    } == {
        "chosen": [" cat"],
        "rejected": [" dog", "!"],
    }
    lengths = {
        "prompt": {"median": 4.0, "edges": [4, 5], "counts": [9]},
        "chosen": {"median": 3.0, "edges": [2, 3, 9], "counts": [1, 8]},
        "rejected": {"median": 5.0, "edges": [2, 3, 9], "counts": [0, 9]},
    }
    drawn = data_tables({"lengths": lengths})["lengths"]
    assert drawn == [
        ({"prompt": 4.0}, [("4", [9])]),
        ({"chosen": 3.0, "rejected": 5.0}, [("2", [1, 0]), ("3 to 8", [8, 9])]),
    ]
    write_check(tmp_path / "check.html", "mine.yaml", checked("words") | {"lengths": lengths, "examples": [shown]})
    page = Page((tmp_path / "check.html").read_text(encoding="utf-8"))
    bars = [attributes for tag, attributes in page.elements if tag == "i" and "of-" in (attributes.get("class") or "")]
    assert [bar["style"] for bar in bars] == [f"width: {width}%" for width in (100.0, 11.1, 0.0, 88.9, 100.0)]
    assert "chosen, median 3; rejected, median 5" in page.text


def test_unused_columns_and_examples_of_sources(tmp_path: Path) -> None:
    source = {"path": "a.jsonl", "shape": "text", "rows_in": 9, "rows_used": 8, "rows_filtered": 0, "rows_not_drawn": 0}
    ranked = source | {"path": "b.jsonl", "examples": 20, "unused": ("id", "meta")}
    for sources, counts, named in (
        ([source | {"examples": 8, "unused": []}], False, ""),
        ([ranked], True, "Columns that are not used: id, meta."),
        (
            [ranked, ranked | {"path": "c.jsonl", "unused": ["id", "meta"]}],
            True,
            "Columns that are not used (b.jsonl, c.jsonl): id, meta.",
        ),
    ):
        facts = checked("words") | {"sources": sources, "tokens": {}}
        write_check(tmp_path / "check.html", "mine.yaml", facts)
        page = Page((tmp_path / "check.html").read_text(encoding="utf-8"))
        text = as_text(lambda console, facts=facts: print_check(facts, console))  # type: ignore[misc]
        assert ("Examples" in page.text) == ("examples" in text.splitlines()[0]) == counts
        assert named in page.text and ("not used" in page.text) == ("not used" in text) == bool(named)
        assert named.rstrip(".").lower() in text


def test_a_page_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_check(tmp_path / "taken" / "check.html", "mine.yaml", checked("words"))


ODD_CONTEXT = {"completions": ["ab", "c"], "tokens": [1, 2, 3], "context": [[[0], [0, "x"], 3, [1, 9]], 7]}


@pytest.mark.parametrize(
    "odd", [None, 3, "text", [3], [{}], [{"completions": 3, "tokens": "x", "row": []}], [ODD_CONTEXT]]
)
def test_odd_examples_do_not_break_the_page(odd: Any, tmp_path: Path) -> None:
    assert report(tmp_path, data=DATA | {"examples": odd}).text


def test_hostile_text_in_the_name_of_the_run_is_text(tmp_path: Path) -> None:
    page = report(tmp_path / "<script>alert(1)<:script> & {{7*7}}")
    assert "<script>alert(1)<:script> & {{7*7}}" in page.text
    assert page.raw["title"][0].startswith("<script>alert(1)<:script> & {{7*7}}: ")
    assert len(page.raw["script"]) == 3


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    page = report(tmp_path)
    for tag, attributes in page.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "srcset", "action", "poster"} & set(attributes)
        assert attributes.get("href") in (None, "data:,")
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in page.raw["style"][0] and "@import" not in page.raw["style"][0]


def test_the_policy_allows_the_pages_own_scripts_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "library", curves.library)
    page = report(tmp_path)
    policy = next(
        attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    kinds = [attributes.get("type") for tag, attributes in page.elements if tag == "script"]
    assert kinds == ["application/json", None, None]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.raw["script"][1:]]
    assert "Bokeh" in page.raw["script"][1]
    assert policy is not None and "default-src 'none'" in policy
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes
    assert "unsafe-inline" not in policy.split("script-src")[1]


def test_what_is_embedded_in_a_script_cannot_close_it() -> None:
    assert json.loads(html.script_safe_json({"a": "</script><!-- &"})) == {"a": "</script><!-- &"}
    assert not set("<>&") & set(html.script_safe_json({"a": "</script><!-- &"}))
    assert html.script_safe("'</script>' + '<!--'") == "'<\\/script>' + '<\\!--'"


def test_metrics_that_are_not_finite_leave_a_gap_and_are_counted(tmp_path: Path) -> None:
    rows = metrics(8)
    for place, value in enumerate([math.nan, math.inf, -math.inf, None, "NaN", True]):
        rows[place + 1]["loss"] = value
    page = report(tmp_path, metrics=rows)
    assert "6 steps have no finite value here" in page.text
    plots = json.loads(page.raw["script"][0])
    assert len(plots) == 4
    # Six in the column of the single steps, six in that of the moving mean.
    assert json.dumps(plots[0], allow_nan=False).count('"value": "nan"') == 12


def test_a_metric_without_any_finite_value_has_no_curve(tmp_path: Path) -> None:
    page = report(tmp_path, metrics=[{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.nan}])
    assert page.raw["script"] == []
    assert "Training" in page.text and "loss" in page.text


def test_evaluation_that_is_not_finite_does_not_break_the_page(tmp_path: Path) -> None:
    broken = HELDOUT | {"after": {"accuracy": math.nan, "accuracy_ci": [math.nan, math.inf], "margin": -math.inf}}
    page = report(tmp_path, heldout=broken, merge=MERGE | {"relative_difference": math.nan})
    assert "No verdict" in page.text
    assert "The merged model is not the trained one." in page.text
    assert not re.search(r"\b(nan|inf)\b", page.text, re.IGNORECASE)


def test_the_merge_is_judged_by_the_difference_in_proportion(tmp_path: Path) -> None:
    """One logit among millions may be further off than the share of their size that is allowed."""
    page = report(tmp_path, merge=MERGE)
    assert MERGE["max_logit_difference"] > MERGE["tolerance"] > MERGE["relative_difference"]
    assert "The merged model is the trained one." in page.text and "4.1e\u22124" in page.text
    assert "from the quantised model that was trained" in page.text
    whole = report(tmp_path, merge=MERGE | {"difference_from_quantised": None})
    assert "quantised" not in whole.text


FILES = ("environment", "data", "metrics", "timing", "heldout", "samples", "merge")


def test_a_run_that_has_only_begun_says_what_is_not_done(tmp_path: Path) -> None:
    page = report(tmp_path, **dict.fromkeys(FILES))
    assert "Not evaluated yet" in page.text
    assert page.text.count("Not done yet") == len(FILES)
    assert page.raw["script"] == []


@pytest.mark.parametrize("missing", FILES)
def test_each_file_may_be_missing(missing: str, tmp_path: Path) -> None:
    assert report(tmp_path, **{missing: None}).text.count("Not done yet") == 1


def test_files_with_empty_or_odd_values_do_not_break_the_page(tmp_path: Path) -> None:
    empty = {name: {} for name in ("environment", "data", "heldout", "merge")}
    page = report(tmp_path, recipe="[]\n", metrics=[{}], timing=[{"step": 1}], samples=[{}], **empty)
    assert "Reproduce" in page.text
    odd = {"sources": "x", "findings": [7], "tokens": [], "fingerprint": None}
    assert "Nothing odd was seen" in report(tmp_path, data=odd).text


def test_the_answers_stand_side_by_side_right_after_the_verdict(tmp_path: Path) -> None:
    answers = {"prompt": [{"role": "user", "content": "Q?"}], "before": ["one", "two"], "after": ["uno"]}
    text = report(tmp_path, samples=[answers, sample("R?", "b", "a")]).text
    shown = ("rose from", "Q?", "one", "uno", "two", "no answer", "points, 95", "More answers", "R?", "Held-out pairs")
    places = [text.index(word) for word in shown]
    assert places == sorted(places)


def test_what_is_taught_stands_below_the_verdict(tmp_path: Path) -> None:
    recipe = f"description: >\n  The model learns\n  to use plain words.\n{RECIPE}"
    text = report(tmp_path, recipe=recipe).text
    places = [text.index(words) for words in ("rose from", "The model learns to use plain words.", "compiler")]
    assert places == sorted(places)


def test_an_answer_that_was_cut_off_is_marked(tmp_path: Path) -> None:
    ended = sample("Q?", "whole", "whole") | {"finish_reasons": {"before": ["stop"], "after": ["stop"]}}
    cut = sample("Q?", "a long", "whole") | {"finish_reasons": {"before": ["length"], "after": ["stop"]}}
    assert "Cut off" not in report(tmp_path, samples=[ended, sample("Q?", "of an older run", "a")]).text
    text = report(tmp_path, samples=[cut, ended]).text
    assert text.count("Cut off at the token limit") == 1
    assert text.index("a long") < text.index("Cut off") < text.index("whole")


def test_a_system_message_of_all_prompts_is_shown_once(tmp_path: Path) -> None:
    page = report(tmp_path, samples=[sample(f"prompt {place}", "a", "b") for place in range(3)])
    assert page.text.count("You answer in plain words.") == 1
    assert all(f"prompt {place}" in page.text for place in range(3))


def test_ln_2_is_marked_for_dpo_only(tmp_path: Path) -> None:
    assert "ln 2" in report(tmp_path).text
    other = report(tmp_path, recipe=RECIPE.replace("method: dpo", "method: orpo"))
    assert "ln 2" not in other.text
    assert str(math.log(2)) not in other.raw["script"][0]


def test_a_long_run_is_thinned_not_cut(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 3 * curves.MOST_POINTS + 2)]
    page = report(tmp_path, metrics=rows)
    numbers = re.search(r'"step",\{"type":"ndarray".*?\}|\["step",\[(.*?)\]', page.raw["script"][0].replace(" ", ""))
    assert numbers is not None
    steps = [float(step) for step in numbers[1].split(",")]
    assert len(steps) <= curves.MOST_POINTS and steps[0] == 2.5 and steps[-1] > 3 * curves.MOST_POINTS - 2


def test_findings_are_sorted_by_severity_and_name_their_rows(tmp_path: Path) -> None:
    text = report(tmp_path).text
    assert text.index("chosen and rejected are the same text") < text.index("the chosen answer is the shorter one")
    assert "more_pairs.jsonl, rows 3, 6, 9, 12, 15, 18, 21, 24; and 3 more" in text


def test_what_the_guards_saw(tmp_path: Path) -> None:
    seen = report(tmp_path).text
    for words in (
        "too easy",
        "57",
        "preferred the chosen answer",
        "Rows of the step: more_pairs.jsonl 3, 9",
        "went back to step 50",
    ):
        assert words in seen
    assert "no sign of a run that diverges" in report(tmp_path, guards={"events": []}).text


def test_a_resumed_stage_counts_as_one(tmp_path: Path) -> None:
    timing = [
        {"stage": "train", "seconds": 40.0, "peak_memory_mb": 2000},
        {"stage": "train", "seconds": 20.0, "peak_memory_mb": 3000},
        {"stage": "merge", "seconds": 20.0, "peak_memory_mb": None},
    ]
    assert html.stage_costs(timing) == {"train": (60.0, 3000.0), "merge": (20.0, 0.0)}
    page = report(tmp_path, timing=timing)
    assert "train1\u00a0min00\u00a0s3.0\u00a0GB" in page.text.replace("\n", "").replace(" ", "")
    assert "merge20.0\u00a0s–" in page.text.replace("\n", "").replace(" ", "")
    assert "width: 75.0%" in [attributes.get("style") for _, attributes in page.elements]


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    report(tmp_path, heldout=None)
    report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if "report" in path.name) == ["report.html"]
    assert "rose from" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_page_of_a_reward_model(tmp_path: Path) -> None:
    after = {"accuracy": 0.85, "accuracy_ci": [0.76, 0.91], "margin": 1.5}
    chance = {"accuracy": 0.5, "p_value": 1e-6, "verdict": "better"}
    names = ("loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward")
    page = report(
        tmp_path,
        heldout={"pairs": 84, "after": after, "chance": chance},
        metrics=[{"step": step, **dict.fromkeys(names, 0.5)} for step in (1, 2)],
        samples=[],
    )
    assert "Answers" not in page.text and "Before" not in page.text and "Change" not in page.text
    assert "Their scores differ by" in page.text
    for title in ("Scores", "Margin", "Accuracy", "Loss"):
        assert title in page.text


def test_completions_that_are_yet_to_be_sampled_are_not_counted() -> None:
    counts = {"trees": 9, "prompt": 90, "completions": 0, "plain": 90, "packed": 90, "longest": 12, "shared_share": 0.0}
    shown = list(data_tables({"tokens": {"train": counts, "held_out": counts}})["tokens"].values())
    assert shown == ["rows", "tokens of prompts, each written once", "tokens of the longest conversation"]
    written = data_tables({"tokens": {"train": counts | {"completions": 30}, "held_out": counts}})["tokens"]
    assert len(written) == 7
