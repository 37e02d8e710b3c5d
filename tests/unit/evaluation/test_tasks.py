"""Tasks by name, what is recorded of their questions, and what is said where they cannot be asked."""

from __future__ import annotations

import json
import logging
import os
import random
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from harness_tasks import KINDS, write_task
from tiny import tiny_llama
from tiny_tokenizer import CHATML, make_tokenizer

from prefold.errors import UserError
from prefold.evaluation import task_names
from prefold.evaluation.scores import TaskScores, _clusters
from prefold.evaluation.suites import SUITES, wanted_by
from prefold.evaluation.tasks import measure, open_tasks, recorded_settings
from prefold.recipe import Evaluate, builtin_recipes, load_recipe

pytestmark = pytest.mark.usefixtures("own_caches")


def settings(folder: Path, *names: str, **others: Any) -> Evaluate:
    return Evaluate(tasks=list(names), include_path=str(folder), **others)


def scores(chosen: Evaluate) -> list[TaskScores]:
    tokenizer = make_tokenizer(CHATML)
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id)
    return measure(model, tokenizer, open_tasks(chosen, tokenizer), chosen)


# ---- what is recorded ----


def test_scores_of_every_kind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    from lm_eval import evaluator

    evaluate = evaluator.evaluate

    def kept(**arguments: Any) -> Any:
        results = evaluate(**arguments)
        seen.update(results["results"])
        return results

    monkeypatch.setattr(evaluator, "evaluate", kept)
    found = {one.task: one for one in scores(settings(folder, *KINDS))}
    assert {name: one.metric for name, one in found.items()} == {
        "tiny_options": "acc_norm",
        "tiny_letters": "acc",
        "tiny_blanks": "acc",
        "tiny_facts": "acc",
        "tiny_passages": "acc",
        "tiny_mutual": "acc_mutual_info",
        "tiny_sums": "exact_match",
        "tiny_endings": "acc",
        "tiny_documents": "bits_per_byte",
    }
    for name, one in found.items():
        rows = KINDS[name][0]
        lengths = {
            len(getattr(one, field)) for field in ("questions", "clusters", "values", "texts", "answers", "targets")
        }
        assert lengths == {len(rows)} and len(set(one.questions)) == len(rows)
        assert one.version == "1.0" and one.higher_is_better == (name != "tiny_documents")
        if name != "tiny_documents":  # the harness weighs documents by their length
            chosen = "strict-match" if name == "tiny_sums" else "none"
            assert fmean(one.values) == pytest.approx(seen[name][f"{one.metric},{chosen}"])
    assert found["tiny_options"].num_fewshot == 3 and found["tiny_passages"].num_fewshot == 0
    assert found["tiny_options"].texts[0] == "Question: Which number comes after one?\nAnswer:"
    assert set(found["tiny_options"].answers) <= {
        choice for row in KINDS["tiny_options"][0] for choice in row["choices"]
    }
    assert found["tiny_options"].targets[0] == "the number two"
    assert found["tiny_blanks"].targets[:2] == ("Ann gave Bo a book because Ann", "Cy gave Dee a book because Dee")
    assert found["tiny_blanks"].texts[0].endswith("... had read it.")
    assert found["tiny_sums"].targets[0] == "4"
    assert len(set(found["tiny_passages"].clusters)) == 3
    assert found["tiny_options"].clusters == found["tiny_options"].questions


def test_the_answer_is_the_one_that_the_metric_counts(folder: Path) -> None:
    [one] = scores(settings(folder, "tiny_options"))
    assert [float(answer == target) for answer, target in zip(one.answers, one.targets, strict=True)] == list(
        one.values
    )


def test_scores_are_written_and_read_again(folder: Path) -> None:
    [one] = scores(settings(folder, "tiny_sums", limit=2))
    assert TaskScores.from_json(json.loads(json.dumps(asdict(one)))) == one
    assert len(one.values) == 2


def test_a_document_that_is_asked_twice(tmp_path: Path) -> None:
    rows, task = KINDS["tiny_passages"]
    write_task(tmp_path, "twice", [rows[0], rows[2], rows[0]], task)
    [one] = scores(settings(tmp_path, "twice"))
    assert one.questions[2] == f"{one.questions[0]}-2"
    assert one.clusters == (one.questions[0], one.questions[1], one.questions[0])


def test_questions_of_a_passage_are_one_cluster() -> None:
    instruction = (
        "Read what follows and say which of the answers is right, however short or long the story may be. " * 3
    )
    first, second = "A tale of the sea and of those who sail it. " * 8, "A tale of the hills and of nothing else. " * 8
    texts = [
        instruction + first + "Who?",
        instruction + second + "Who?",
        instruction + first + "Why?",
        instruction + "So?",
    ]
    assert _clusters(list("abcd"), texts) == ["a", "b", "a", "d"] or _clusters(list("abcd"), texts) == [
        "c",
        "b",
        "c",
        "d",
    ]
    # A long preamble is no passage where most of the question is another.
    same = [f"{'The same long preamble. ' * 12}{letter * 900}" for letter in "xy"]
    assert _clusters(list("abc"), [*same, "another"]) == ["a", "b", "c"]


# ---- suites and groups ----


def test_a_group_of_ones_own(folder: Path) -> None:
    (folder / "group.yaml").write_text(yaml.safe_dump({"group": "tiny_all", "task": ["tiny_letters", "tiny_blanks"]}))
    found = scores(settings(folder, "tiny_all", "tiny_options"))
    assert [(one.task, one.group) for one in found] == [
        ("tiny_letters", "tiny_all"),
        ("tiny_blanks", "tiny_all"),
        ("tiny_options", None),
    ]


def test_suites_name_tasks_that_the_harness_has() -> None:
    for name, suite in SUITES.items():
        wanted = wanted_by(name)
        assert {one.suite for one in wanted} == {name} and suite.differs
        manager = task_names.manager_of([one.task for one in wanted], None)
        for one in wanted:
            entry = manager.task_index[one.task]
            members = entry.cfg["task"] if isinstance(entry.cfg.get("task"), list) else [one.task]
            leaf = manager.task_index[members[0]]
            while isinstance(leaf.cfg.get("task"), list) if leaf.cfg else leaf.tags:
                below = leaf.cfg["task"][0] if leaf.cfg else sorted(leaf.tags)[0]
                leaf = manager.task_index[below]
            metrics = [metric["metric"] for metric in leaf.cfg["metric_list"]]
            assert one.metric in metrics, f"{one.task} has {metrics}"
            filters = [each["name"] for each in leaf.cfg.get("filter_list") or []]
            assert one.filter is None or one.filter in filters


def test_shots_of_a_suite_and_of_the_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefold.evaluation.suites import Suite, Wanted

    suite = Suite((Wanted("tiny_options", "acc", 1), Wanted("tiny_facts", "acc", 0)), "")
    monkeypatch.setitem(SUITES, "small", suite)
    found = scores(settings(folder, "small", "tiny_options", "tiny_facts", num_fewshot=2, limit=2))
    assert [(one.task, one.num_fewshot, one.metric, one.suite) for one in found] == [
        ("tiny_options", 1, "acc", "small"),
        ("tiny_facts", 0, "acc", "small"),
        ("tiny_options_2shot", 2, "acc_norm", None),
        ("tiny_facts", 0, "acc", None),  # no examples is what the task is
    ]


def test_what_the_questions_were_recorded_settings(folder: Path) -> None:
    said = recorded_settings(settings(folder, "nous", limit=3))
    assert said["limit"] == 3 and said["apply_chat_template"] is False
    assert said["harness"].startswith("lm_eval 0.") and "BIG-bench" in said["suites"]["nous"]


# ---- the built-in task ----


def test_questions_of_the_built_in_task() -> None:
    rows = list(task_names.everyday_facts()["test"])
    assert len(rows) == 100 and len({row["question"] for row in rows}) == 100
    for row in rows:
        assert row.keys() == {"question", "choices", "answer"} and row["question"].endswith("?")
        assert len(row["choices"]) == len(set(row["choices"])) == 4 and all(row["choices"])
    assert Counter(row["answer"] for row in rows) == dict.fromkeys(range(4), 25)


def test_the_built_in_task_is_asked_from_anywhere(
    folder: Path, tmp_path: Path, no_connections: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    [alone] = scores(Evaluate(tasks=["everyday_facts"], limit=4))
    beside = scores(settings(folder, "everyday_facts", "tiny_options", limit=4))
    assert no_connections == [] and beside[0] == alone and len(alone.values) == 4
    assert (alone.metric, alone.num_fewshot, alone.version) == ("acc_norm", 0, "1.0")
    first = task_names.everyday_facts()["test"][0]
    assert alone.texts[0] == f"Question: {first['question']}\nAnswer:"
    assert alone.targets[0] == first["choices"][first["answer"]]


def test_ones_own_task_of_the_same_name_comes_first(tmp_path: Path) -> None:
    rows, task = KINDS["tiny_letters"]
    write_task(tmp_path, "everyday_facts", rows, task)
    [one] = open_tasks(settings(tmp_path, "everyday_facts"))
    assert one.num_fewshot == 2


def test_built_in_recipes_name_tasks_that_exist() -> None:
    named = {name: load_recipe(name).evaluate.tasks for name in builtin_recipes()}
    small = ("demo", "smollm2-dpo-4bit", "smollm2-orpo-4bit", "smollm2-length")
    assert all(named[name] == ["everyday_facts"] for name in small)
    everything = {name for names in named.values() for name in names}
    task_names.manager_of([one.task for name in sorted(everything) for one in wanted_by(name)], None)


# ---- mistakes, before anything is trained ----


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny_optoins", "there is no task `tiny_optoins`\n  to do: did you mean `tiny_options`"),
        ("everyday_fact", "did you mean `everyday_facts`"),
        ("arc_chalenge", "did you mean `arc_challenge`"),
        ("open_llm_leaderbord", "did you mean `open_llm_leaderboard`"),
        ("humaneval", "the task `humaneval` cannot be opened"),
        (
            "arc_challenge",
            r"the task `arc_challenge` cannot be opened (.*`allenai/ai2_arc` on the Hub: run `prefold check`",
        ),
    ],
)
def test_tasks_that_cannot_be_had(folder: Path, name: str, message: str, no_connections: list[Any]) -> None:
    with pytest.raises(UserError) as caught:
        open_tasks(settings(folder, "tiny_options", name))
    pattern = re.escape(message).replace(re.escape("(.*"), r"\(.*").replace(r"\.\*", ".*")
    assert re.search(pattern, str(caught.value), re.DOTALL), str(caught.value)
    assert "evaluate.tasks" in str(caught.value)


def test_a_task_whose_file_is_gone(folder: Path) -> None:
    (folder / "tiny_sums.jsonl").unlink()
    with pytest.raises(UserError, match=r"`tiny_sums` cannot be opened .*\n  to do: see that its files are there"):
        open_tasks(settings(folder, "tiny_sums"))


def test_more_examples_than_there_are(folder: Path) -> None:
    with pytest.raises(UserError, match="`tiny_options` cannot build and judge its first question"):
        open_tasks(settings(folder, "tiny_options", num_fewshot=50))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit(0)", r"`ends` cannot be opened \(SystemExit: 0\)"),
        (
            "def judge(doc, results): raise SystemExit",
            r"`ends` cannot build and judge its first question \(SystemExit\)",
        ),
        ("import os\ndef judge(doc, results): os._exit(0)", r"first question \(SystemExit: os\._exit\(0\)\)"),
        (
            "import sys\ndef judge(doc, results): return {'acc': 1.0} if results == [''] else sys.exit(0)",
            r"the code of the task `ends` ends the process \(SystemExit: 0\)",
        ),
    ],
)
def test_a_task_whose_code_ends_the_process(folder: Path, code: str, message: str) -> None:
    rows, task = KINDS["tiny_sums"]
    (folder / "ending.py").write_text(code)
    write_task(folder, "ends", rows, {**task, "process_results": "FUNCTION ending.judge"})
    with pytest.raises(UserError, match=message):
        scores(settings(folder, "ends"))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.include_path: .*there is no such folder"):
        open_tasks(settings(tmp_path / "nowhere", "tiny_options"))


def test_code_and_pictures_are_refused(folder: Path) -> None:
    rows, task = KINDS["tiny_sums"]
    write_task(folder, "runs_code", rows, {**task, "unsafe_code": True})
    with pytest.raises(UserError, match="`runs_code` runs code that the model writes"):
        open_tasks(settings(folder, "runs_code"))


def test_a_metric_of_all_questions_together(folder: Path) -> None:
    rows, task = KINDS["tiny_passages"]
    f1 = {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}
    write_task(folder, "together", rows, {**task, "metric_list": [f1]})
    with pytest.raises(UserError, match=r"the metrics of the task `together` \(`mcc`\) are of all questions together"):
        open_tasks(settings(folder, "together"))


def test_a_model_without_a_chat_template(folder: Path) -> None:
    with pytest.raises(UserError, match=r"evaluate\.apply_chat_template: the tokenizer has no chat template"):
        open_tasks(settings(folder, "tiny_options", apply_chat_template=True), make_tokenizer(None))


# ---- surroundings ----


def test_no_connection_is_attempted(
    folder: Path, no_connections: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    found = scores(settings(folder, "tiny_options", "tiny_sums", "tiny_documents"))
    assert len(found) == 3 and no_connections == []
    assert capsys.readouterr().out == ""


def test_nothing_is_left_behind(folder: Path) -> None:
    logger = logging.getLogger("lm_eval")

    import lm_eval.api.task  # its first import prepares downloads by an environment variable

    def state() -> list[Any]:
        numpy = np.random.get_state()
        return [
            random.getstate(),
            [numpy[0], numpy[1].tolist(), numpy[2:]],  # type: ignore[union-attr]
            torch.get_rng_state().tolist(),
            logger.level,
            logger.handlers,
            dict(os.environ),
            lm_eval.api.task.tqdm,
            torch.is_grad_enabled(),
        ]

    before = state()
    scores(settings(folder, "tiny_options", "tiny_sums"))
    assert state() == before
