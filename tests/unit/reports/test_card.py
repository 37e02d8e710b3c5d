"""The model card: what it says, and that no text of a run can do anything in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_run import DATA, ENVIRONMENT, HELDOUT, HOSTILE, MERGE, RECIPE, write_run
from fake_tasks import WIN_RATE
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token

from prefold.errors import UserError
from prefold.reports.card import CARD, _settings, fenced, last_part, literal, render_card, write_card

BASE = {"hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": None, "license": "apache-2.0"}
PROVENANCE = {"base": BASE, "data_sets": ["org/pairs"]}
PROVEN = {**MERGE, "relative_difference": 2.1e-7, "tolerance": 1e-4, "provenance": PROVENANCE}
TASKS = {
    "tasks": {
        "arc_challenge": {
            "metric": "acc_norm",
            "before": 0.41,
            "after": 0.4312,
            "difference": 0.0212,
            "ci": [0.004, 0.039],
            "p_value": 0.02,
            "n": 1172,
            "verdict": "better",
            "contaminated": {"n": 0},
        }
    },
    "average": {"tasks": 2, "before": 0.41, "after": 0.4312, "difference": 0.0212, "ci": [0.004, 0.039]},
}
ASKING = RECIPE.replace("evaluate:\n", "evaluate:\n  tasks: [arc_challenge]\n")
JUDGED = RECIPE.replace("evaluate:\n", "evaluate:\n  win_rate: {judge: {name: length}}\n")
ABSENT: dict[str, Any] = {
    "environment": None,
    "data": None,
    "metrics": None,
    "timing": None,
    "heldout": None,
    "samples": None,
    "merge": None,
}


def card(folder: Path, tasks: Any = None, **changes: Any) -> str:
    write_run(folder, **{"merge": PROVEN, "recipe": ASKING if tasks else RECIPE, "tasks": tasks, **changes})
    return render_card(folder)


def with_publish(**section: Any) -> str:
    return yaml.safe_dump(yaml.safe_load(ASKING) | {"publish": section})


def head(text: str) -> dict[str, Any]:
    """The head as the Hub's own client reads it."""
    return dict(ModelCard(text, ignore_metadata_errors=False).data.to_dict())


# ---- what it says -----------------------------------------------------------------------------------------------


def test_the_head(tmp_path: Path) -> None:
    found = head(card(tmp_path, TASKS, recipe=with_publish(hub_model_id="me/plain", tags=["plain words"])))
    results = found.pop("model-index")
    assert found == {
        "base_model": BASE["hub_id"],
        "datasets": ["org/pairs"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["prefold", "preference-optimization", "dpo", "plain words"],
        "license": "apache-2.0",
    }
    assert results[0]["name"] == "plain"
    [result] = results[0]["results"]
    assert result["metrics"][0]["value"] == 0.4312 and result["metrics"][0]["type"] == "acc_norm"
    assert result["dataset"]["name"] == "arc_challenge"


def test_the_body(tmp_path: Path) -> None:
    text = card(tmp_path, TASKS)
    for said in (
        "Held-out accuracy rose from 31 % to 92 %",
        "84 pairs",
        "| arc_challenge | acc_norm | 41.0 % | 43.1 % | +2.1 (+0.4 to +3.9) | p = 0.02 | 1 172 |",
        "| Average | | 41.0 % | 43.1 % | +2.1",
        "[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)",
        "under the base's licence: apache-2.0",
        "| dpo.beta | 0.1 |",
        "| lora.r | 16 |",
        "| builtin:plain_words | prompt, chosen, rejected | 850 | 843 |",
        "trained on: 1 951 examples",
        "- chosen and rejected are the same text",
        "prefold run recipe.yaml",
        "learning_rate: 5.0e-05",
        "| transformers | 5.23.0 |",
        "no knowledge",
    ):
        assert said in text, said


def test_what_is_taught_stands_at_the_top(tmp_path: Path) -> None:
    text = card(tmp_path, recipe=f"description: It learns to use <b>plain</b> words.\n{RECIPE}")
    assert text.index("It learns to use &#60;b&#62;plain&#60;/b&#62; words.") < text.index("## What was measured")


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    text = card(tmp_path, **ABSENT)
    assert "license" not in head(text) and "base_model" not in head(text) and "model-index" not in head(text)
    assert "licence is not known" in text and "not taken from the Hub" in text
    assert "No benchmark was run." in text and "No comparison on held-out data was made." in text
    assert "does not show that this model is better" in text


def test_a_model_that_got_worse_says_so(tmp_path: Path) -> None:
    worse = {**HELDOUT, "before": HELDOUT["after"], "after": HELDOUT["before"]}
    worse["difference"] = {"accuracy": -0.6, "ci": [-0.7, -0.5], "p_value": 1e-9, "verdict": "worse"}
    assert "this model is worse than its base" in card(tmp_path, heldout=worse)


def test_rewards_and_win_rate(tmp_path: Path) -> None:
    side = {"reward": 1.0, "reward_ci": [0.5, 1.5], "rewards": {}, "tokens": 40.0, "finished": 1.0}
    rewards = {"prompts": 9, "before": side, "after": {**side, "reward": 2.0}}
    rewards["difference"] = {"reward": 1.0, "ci": [0.2, 1.8], "p_value": 0.01, "verdict": "better"}
    write_run(tmp_path, recipe=JUDGED, heldout=None, merge=PROVEN, win_rate=WIN_RATE)
    (tmp_path / "evaluation" / "rewards.json").write_text(json.dumps(rewards))
    text = render_card(tmp_path)
    assert "Held-out prompts" in text and "| Reward:" in text
    assert (
        "- New answers preferred: 60 % (95 % interval 54 % to 66 %, p = 0.002, 56 % at equal lengths, 194 prompts"
        in text
    )
    assert "judged by big)" in text


def test_a_reward_model(tmp_path: Path) -> None:
    side = {"accuracy": 0.9, "accuracy_ci": [0.8, 0.95], "margin": 1.5}
    found = {"pairs": 84, "after": side, "chance": {"accuracy": 0.5, "p_value": 1e-9, "verdict": "better"}}
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "chat_template.jinja").write_text("x")
    write_run(tmp_path, recipe=RECIPE.replace("dpo", "reward"), heldout=found, merge=PROVEN)
    text = render_card(tmp_path, ("merged", "adapter"))
    assert head(text)["pipeline_tag"] == "text-classification"
    assert "a reward model" in text and "AutoModelForCausalLM" not in text and "generate" not in text
    assert "AutoModelForSequenceClassification" in text and "AutoPeftModelForSequenceClassification" in text
    assert "|  | after |" in text and "| before |" not in text and "No benchmark" not in text
    for block in code_blocks(text, "python"):
        compile(block, "card", "exec")


def test_questions_of_the_training_data(tmp_path: Path) -> None:
    assert "None of these questions was found in the training data" in card(tmp_path / "none", TASKS)
    seen = {"n": 12, "before": 0.5, "after": 1.0, "difference": 0.5, "ci": [0.2, 0.8], "p_value": 0.01}
    clean = {"n": 1160, "before": 0.41, "after": 0.42, "difference": 0.01, "ci": [-0.01, 0.03], "p_value": 0.4}
    facts = TASKS["tasks"]["arc_challenge"] | {"contaminated": seen, "clean": clean}  # type: ignore[index]
    text = card(tmp_path / "some", {"tasks": {"arc_challenge": facts}})
    assert "None of these questions" not in text
    said = "arc_challenge: 12 of 1 172 questions are in the training data; without: 41.0 % to 42.0 % (+1.0 points"
    assert said in text
    unknown = TASKS["tasks"]["arc_challenge"] | {"contaminated": None, "clean": None}  # type: ignore[index]
    assert (
        "training data" not in card(tmp_path / "unknown", {"tasks": {"arc_challenge": unknown}}).split("## How to")[0]
    )


def test_what_an_earlier_recipe_asked_for_is_not_in_it(tmp_path: Path) -> None:
    assert "arc_challenge" not in card(tmp_path, TASKS, recipe=RECIPE)


def test_how_to_use_it_follows_the_template(tmp_path: Path) -> None:
    assert "apply_chat_template" not in card(tmp_path)
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "chat_template.jinja").write_text("x")
    text = render_card(tmp_path)
    assert "apply_chat_template" in text and "pipeline(" in text
    for block in code_blocks(text, "python"):
        compile(block, "card", "exec")


@pytest.mark.parametrize("parts", [("merged",), ("adapter",), ("gguf",), ("merged", "adapter", "gguf")])
def test_parts(tmp_path: Path, parts: Any) -> None:
    write_run(tmp_path, merge=PROVEN)
    (tmp_path / "gguf").mkdir()
    checks = [{"file": "m-F16.gguf", "kind": "F16", "bytes": 1, "relative_difference": 5.5e-4}]
    (tmp_path / "gguf" / "checks.json").write_text(json.dumps(checks))
    text = render_card(tmp_path, parts)
    assert ("AutoModelForCausalLM" in text) == ("merged" in parts)
    assert ("AutoPeftModel" in text) == ("adapter" in parts)
    assert ('subfolder="adapter"' in text) == (len(parts) > 1)
    assert ("| m-F16.gguf | 5.5e\u22124 |" in text) == ("gguf" in parts)
    assert head(text)["library_name"] == {"merged": "transformers", "adapter": "peft", "gguf": "gguf"}[parts[0]]
    for block in code_blocks(text, "python"):
        compile(block, "card", "exec")


def test_it_lies_beside_the_model(tmp_path: Path) -> None:
    write_run(tmp_path, merge=PROVEN)
    assert write_card(tmp_path) == tmp_path / "merged" / CARD
    assert (tmp_path / "merged" / "README.md").read_text(encoding="utf-8") == render_card(tmp_path)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        render_card(tmp_path)


def test_paths_of_this_machine_are_cut(tmp_path: Path) -> None:
    recipe = yaml.safe_load(RECIPE)
    recipe["model"]["name"] = "/data/models/my-base"
    recipe["data"]["train"] = [{"path": "~/private/pairs.jsonl"}, {"path": "../up/more.jsonl"}]
    recipe["output_dir"] = "/srv/runs/x/"
    sources = [{**DATA["sources"][0], "path": "/home/somebody/pairs.jsonl (train)"}]  # type: ignore[index]
    text = card(tmp_path, recipe=yaml.safe_dump(recipe), data={**DATA, "sources": sources}, merge=MERGE)
    for path in ("/data", "~/", "/srv", "/home", "..", "private", str(tmp_path)):
        assert path not in text, path
    for kept in ("name: my-base", "path: pairs.jsonl", "path: more.jsonl", "output_dir: x", "The base is my-base"):
        assert kept in text, kept


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("/a/b.c", "b.c"),
        ("~/b", "b"),
        ("~me/b", "b"),
        ("./b", "b"),
        ("../b/", "b"),
        ("/", "folder"),
        ("org/b", "org/b"),
    ],
)
def test_last_parts(path: str, wanted: str) -> None:
    assert last_part(path) == wanted


# ---- hostile text -----------------------------------------------------------------------------------------------

MARKDOWN = [
    "**bold** _em_ `code` ~~gone~~",
    "[click](https://example.invalid)",
    "![image](https://example.invalid/x.png)",
    "<https://example.invalid> https://example.invalid www.example.invalid me@example.invalid",
    "# heading",
    "| a | b |\n| --- | --- |",
    "\\| \\\\| `|`",
    "---\ntitle: owned\n---",
    "```\nfence\n```",
    "~~~~\nfence\n~~~~",
    "``````````\nlonger\n``````````",
    "- item\n1. item\n> quote",
    "1. item",
    "1234.\nitem",
    "12) item",
    "+ item",
    "- - -",
    "===",
    "[ref]: https://example.invalid",
    "text\n===\n",
    "a  \nb\\\nc",
    "<!-- comment -->",
    "&lt;b&gt; &amp;#42; &#42;",
    "$$x$$ \\(y\\) $z$",
    ":smile: @somebody #1 org/name#2",
    "{{ 7*7 }} {% raw %}",
    "__init__ snake_case _x_",
    "key: value\n- list\n'quote' \"double\"",
    "\ud800 lone\x00nul\u2028line",
]


def inlines(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from token.children or ()


def skeleton(text: str) -> list[tuple[str, str]]:
    """What a Markdown page is made of, without its words: kinds of tokens and where links go."""
    body = text.split("---\n", 2)[2]
    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    kinds = [(token.type, str(token.attrGet("href") or "")) for token in inlines(parser.parse(body))]
    return [kind for kind in kinds if kind[0] not in ("text", "text_special")]


def code_blocks(text: str, language: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse(text.split("---\n", 2)[2])
    return [token.content for token in tokens if token.type == "fence" and token.info.strip() == language]


def spoilt(word: str) -> dict[str, Any]:
    """A run in which every text that reaches the card is `word`."""
    recipe = yaml.safe_load(ASKING)
    recipe["model"]["name"] = word
    recipe["data"]["train"] = [{"path": word, "where": word}]
    recipe["dpo"]["beta"] = word
    recipe["evaluate"]["system"] = word
    recipe["publish"] = {"hub_model_id": None, "tags": [word]}
    finding = {"kind": word, "severity": "warning", "count": 1, "rows": [], "message": word, "advice": word}
    return {
        "recipe": yaml.safe_dump(recipe),
        "data": {
            **DATA,
            "sources": [{"path": word, "shape": word, "rows_in": 1, "rows_used": 1}],
            "findings": [finding],
        },
        "environment": {**ENVIRONMENT, "device_name": word, "packages": {"torch": word}},
        "merge": {**PROVEN, "dtype": word, "provenance": {"base": {"license": word, "license_name": word}}},
    }


def spoilt_tasks(word: str) -> dict[str, Any]:
    return {"tasks": {word: {**TASKS["tasks"]["arc_challenge"], "metric": word}}, "average": TASKS["average"]}  # type: ignore[index]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    return skeleton(card(tmp_path_factory.mktemp("plain"), spoilt_tasks("word"), **spoilt("word")))


@pytest.mark.parametrize("word", [*HOSTILE, *MARKDOWN], ids=range(len(HOSTILE) + len(MARKDOWN)))
def test_hostile_text_stays_text(tmp_path: Path, word: str, plain: list[tuple[str, str]]) -> None:
    text = card(tmp_path, spoilt_tasks(word), **spoilt(word))
    assert skeleton(text) == plain
    found = yaml.safe_load(text.split("---\n", 2)[1])
    assert set(found) == {"library_name", "pipeline_tag", "tags", "license", "license_name", "model-index"}
    assert len(found["tags"]) == 4 and "owned" not in found


@pytest.mark.parametrize("text", ["builtin:plain_words", "at 12:30, {a: 1}!", "R&D & co", "ratio 1:2", "C: it is"])
def test_text_that_does_nothing_is_left_as_it_is(text: str) -> None:
    assert literal(text) == text


@pytest.mark.parametrize(
    ("text", "active"),
    [
        ("see https://example.invalid", "://"),
        ("mailto:me", "mailto:"),
        ("xmpp:me", "xmpp:"),
        (":smile: :+1:", ":smile:"),
        (":a:b:", ":a:"),
        ("&lt; &#60; &#x3c;", "&lt"),
        ("www.example.invalid", "www."),
        ("me@example.invalid", "@"),
    ],
)
def test_text_that_a_page_would_make_something_of(text: str, active: str) -> None:
    escaped = literal(text)
    assert active not in escaped
    [inline] = [token for token in MarkdownIt("commonmark").parse(escaped) if token.type == "inline"]
    assert "".join(child.content for child in inline.children or ()) == text


def test_literal_text_reads_as_it_was() -> None:
    text = "a_b *c* <d> [e](f) `g` www.h.example & _i_ | \\j"
    [inline] = [token for token in MarkdownIt("commonmark").parse(literal(text)) if token.type == "inline"]
    assert "".join(child.content for child in inline.children or ()) == text


def test_fences_cannot_be_closed() -> None:
    text = "a\n```\nb\n`````\nc"
    [token] = MarkdownIt("commonmark").parse(fenced(text))
    assert token.content == text + "\n"


def test_numbers_of_the_settings_are_rounded() -> None:
    shown = _settings({"method": "dpo", "train": {"learning_rate": 2.341334720767918e-06, "max_steps": 12345}})
    assert shown == {"train.learning_rate": "2.341e-06", "train.max_steps": "12345"}
