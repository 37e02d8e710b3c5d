"""From the harness's samples to `TaskScores`: the metric of each question, and what a person wants to read of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Any

import numpy as np

from prefold.errors import UserError
from prefold.evaluation.scores import TaskScores
from prefold.evaluation.suites import PRIMARY, Wanted

SHOWN = 400
"""Characters of a question or answer that are kept for people to read."""
PASSAGE = 200
"""Characters that questions must share at their start, and half of the shorter one, to be about one passage."""


@dataclass(frozen=True)
class OpenTask:
    """A task whose questions are at hand. `name` tells it from the same task asked in another way."""

    name: str
    task: Any
    wanted: Wanted

    @property
    def num_fewshot(self) -> int:
        return int(self.task.config.num_fewshot or 0)


def scores_of(
    one: OpenTask, samples: Sequence[Mapping[str, Any]], trained_on: Collection[str] | None = None
) -> TaskScores:
    """Of one model on a task; `samples` are the harness's, one for each question and filter.

    Args:
        trained_on: questions that stand in the model's training data, as they are asked; None where it is not known.
    """
    metric = primary_metric(one, {name: samples[0][name] for name in samples[0]["metrics"]})
    chosen = one.wanted.filter or next(sample["filter"] for sample in samples if metric in sample)
    asked = [sample for sample in samples if sample["filter"] == chosen and metric in sample]
    questions = _unique([str(sample["doc_hash"])[:16] for sample in asked])
    texts = [question_of(one.task, sample["doc"]) for sample in asked]
    return TaskScores(
        task=one.name,
        metric=metric,
        version=str(one.task.VERSION),
        num_fewshot=one.num_fewshot,
        higher_is_better=bool(one.task.higher_is_better().get(metric, True)),
        questions=tuple(questions),
        clusters=tuple(_clusters(questions, texts)),
        values=tuple(_value(one, metric, sample[metric]) for sample in asked),
        texts=tuple(map(_shortened, texts)),
        answers=tuple(_shortened(_answer(one.task, metric, sample)) for sample in asked),
        targets=tuple(_shortened(_target(one.task, sample)) for sample in asked),
        suite=one.wanted.suite,
        group=one.wanted.group,
        contaminated=None if trained_on is None else tuple(text in trained_on for text in texts),
    )


def primary_metric(one: OpenTask, found: Mapping[str, Any]) -> str:
    """The metric by which a task is judged, by what the harness found for one of its questions.

    Raises:
        UserError: no metric is of a single question.
    """
    if one.wanted.metric is not None:
        return one.wanted.metric
    metrics = [metric for metric, value in found.items() if _is_of_a_question(value, one)]
    if not metrics:
        names = ", ".join(f"`{metric}`" for metric in found)
        what = f"the metrics of the task `{one.name}` ({names}) are of all questions together, not of each"
        raise UserError(what, where="evaluate.tasks", advice="leave it out: models are compared question by question")
    return next((metric for metric in PRIMARY if metric in metrics), metrics[0])


def _is_of_a_question(value: Any, one: OpenTask) -> bool:
    return isinstance(value, int | float | np.number | np.bool_) or one.task.OUTPUT_TYPE == "loglikelihood_rolling"


def _value(one: OpenTask, metric: str, value: Any) -> float:
    """Of a document whose likelihood is asked for, bits (or nats, for a perplexity) by byte or word."""
    if one.task.OUTPUT_TYPE != "loglikelihood_rolling":
        return float(value)
    logprob, weight = value
    unit = log(2) if metric == "bits_per_byte" else 1.0
    return -float(logprob) / float(weight) / unit


def _unique(keys: Sequence[str]) -> list[str]:
    """A document that is asked several times has a key each time."""
    seen: dict[str, int] = {}
    found = []
    for key in keys:
        seen[key] = seen.get(key, 0) + 1
        found.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return found


def _clusters(questions: Sequence[str], texts: Sequence[str]) -> list[str]:
    """One key for the questions of a passage: those that share a long start beyond what all of them share."""
    common = shared_start(min(texts), max(texts)) if len(texts) > 1 else 0
    order = sorted(range(len(texts)), key=lambda place: texts[place])
    found = list(questions)
    for one, other in pairwise(order):
        shorter = min(len(texts[one]), len(texts[other])) - common
        shared = shared_start(texts[one], texts[other]) - common
        if texts[one] == texts[other] or (shared >= PASSAGE and 2 * shared >= shorter):
            found[other] = found[one]
    return found


def shared_start(one: str, other: str) -> int:
    """Characters that two texts have in common at their start."""
    differing = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(one), len(other)))


def question_of(task: Any, doc: Any) -> str:
    """As it is asked, without examples before it."""
    text = task.doc_to_text(doc)
    if isinstance(text, str):
        return text
    # The choices are in the question, as in WinoGrande: they are shown one after the other, then what follows.
    choices = " / ".join(map(str, task.doc_to_choice(doc)))
    return f"{choices} ... {task.doc_to_target(doc)}"


def _answer(task: Any, metric: str, sample: Mapping[str, Any]) -> str:
    if task.OUTPUT_TYPE == "generate_until":
        return str(sample["resps"][0][0])
    if task.OUTPUT_TYPE != "multiple_choice":
        return ""
    choices = [str(choice) for choice in task.doc_to_choice(sample["doc"])]
    scores = np.array([response[0] for response in sample["filtered_resps"][: len(choices)]])
    lengths = np.array([max(len(choice), 1) for choice in choices])
    return choices[int(np.argmax(scores / lengths if metric == "acc_norm" else scores))]


def _target(task: Any, sample: Mapping[str, Any]) -> str:
    """The right answer in words, where the task gives its number."""
    target = sample["target"]
    if task.OUTPUT_TYPE == "multiple_choice":
        right = task.doc_to_text(sample["doc"]) if task.multiple_input else target
        numbers = right if isinstance(right, list) else [right]
        choices = [str(choice) for choice in task.doc_to_choice(sample["doc"])]
        named = [choices[one] if isinstance(one, int) and one < len(choices) else str(one) for one in numbers]
        return " / ".join(named)
    return " / ".join(map(str, target)) if isinstance(target, list) else str(target)


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2].rstrip()} ... {text[-SHOWN // 2 :].lstrip()}"
