"""What a model scored on a task, question by question, and how that is read from the harness's samples: the metric of
each question, and texts for people to read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from os.path import commonprefix
from typing import Any

import numpy as np

from prefold.errors import UserError, unique
from prefold.evaluation.suites import PRIMARY, Wanted

SHOWN = 400
"""Characters of a question or answer that are kept for people to read."""
PASSAGE = 200
"""Characters that questions about one passage share at their start; they must also be half of the shorter question."""


@dataclass(frozen=True)
class TaskScores:
    """What one model scored on one task, question by question. Every tuple has one entry per question."""

    task: str
    metric: str
    """The task's primary metric, e.g. `acc_norm`, `exact_match`."""
    version: str
    num_fewshot: int
    higher_is_better: bool
    questions: tuple[str, ...]
    """Key of the question's document, the same for every model."""
    clusters: tuple[str, ...]
    """Questions that share a passage have the same cluster; else the question's key."""
    values: tuple[float, ...]
    """The metric of each question."""
    texts: tuple[str, ...]
    """The question as a person reads it, shortened."""
    answers: tuple[str, ...]
    """What the model answered or chose."""
    targets: tuple[str, ...]
    """The right answer."""
    suite: str | None = None
    """The suite it was asked for by, e.g. `open_llm_leaderboard`."""
    group: str | None = None
    """E.g. `mmlu` for `mmlu_anatomy`: groups count once in the leaderboard's average."""
    contaminated: tuple[bool, ...] | None = None
    """Whether the question occurs in the data that the model was trained on here; None if that is not known."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TaskScores:
        """From the JSON of its `asdict`."""
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**fields)


@dataclass(frozen=True)
class OpenTask:
    """A task with its questions loaded. `name` tells it from the same task asked in another way."""

    name: str
    task: Any
    wanted: Wanted

    @property
    def num_fewshot(self) -> int:
        return int(self.task.config.num_fewshot or 0)


def scores_of(
    opened: OpenTask, samples: Sequence[Mapping[str, Any]], trained_on: Collection[str] | None = None
) -> TaskScores:
    """The scores of one model on a task. `samples`: the harness's, one for each question and filter; `trained_on`: the
    questions, as they are asked, that occur in the model's training data, None if that is not known."""
    task, wanted = opened.task, opened.wanted
    metric = primary_metric(opened, {name: samples[0][name] for name in samples[0]["metrics"]})
    chosen = wanted.filter or next(sample["filter"] for sample in samples if metric in sample)
    samples = [sample for sample in samples if sample["filter"] == chosen and metric in sample]
    questions = tuple(unique(str(sample["doc_hash"])[:16] for sample in samples))
    texts = [question_of(task, sample["doc"]) for sample in samples]
    return TaskScores(
        task=opened.name,
        metric=metric,
        version=str(task.VERSION),
        num_fewshot=opened.num_fewshot,
        higher_is_better=bool(task.higher_is_better().get(metric, True)),
        questions=questions,
        clusters=tuple(_clusters(questions, texts)),
        values=tuple(_value(task, metric, sample[metric]) for sample in samples),
        texts=tuple(map(_shortened, texts)),
        answers=tuple(_shortened(_answer(task, metric, sample)) for sample in samples),
        targets=tuple(_shortened(_target(task, sample)) for sample in samples),
        suite=wanted.suite,
        group=wanted.group,
        contaminated=None if trained_on is None else tuple(text in trained_on for text in texts),
    )


def primary_metric(opened: OpenTask, results: Mapping[str, Any]) -> str:
    """The metric by which a task is judged, from the harness's results for one of its questions. Raises UserError if no
    metric is defined for a single question."""
    if opened.wanted.metric is not None:
        return opened.wanted.metric
    rolling = opened.task.OUTPUT_TYPE == "loglikelihood_rolling"
    metrics = [
        metric for metric, value in results.items() if rolling or isinstance(value, int | float | np.number | np.bool_)
    ]
    if not metrics:
        names = ", ".join(f"`{metric}`" for metric in results)
        what = f"the metrics of the task `{opened.name}` ({names}) are of all questions together, not of each"
        raise UserError(what, where="evaluate.tasks", advice="leave it out: models are compared question by question")
    return next((metric for metric in PRIMARY if metric in metrics), metrics[0])


def _value(task: Any, metric: str, value: Any) -> float:
    """The metric of a question; for the likelihood of a document, bits (or nats, for a perplexity) per byte or word."""
    if task.OUTPUT_TYPE != "loglikelihood_rolling":
        return float(value)
    logprob, weight = value
    return -float(logprob) / float(weight) / (log(2) if metric == "bits_per_byte" else 1.0)


def _clusters(questions: Sequence[str], texts: Sequence[str]) -> list[str]:
    """One key for all questions about a passage: those that share a long start beyond what all questions share."""
    common = len(shared_start(texts)) if len(texts) > 1 else 0
    clusters = list(questions)
    for first, second in pairwise(sorted(range(len(texts)), key=lambda index: texts[index])):
        shared = len(shared_start([texts[first], texts[second]])) - common
        shorter = min(len(texts[first]), len(texts[second])) - common
        if texts[first] == texts[second] or (shared >= PASSAGE and 2 * shared >= shorter):
            clusters[second] = clusters[first]
    return clusters


def shared_start(texts: Sequence[str]) -> str:
    """The longest common prefix."""
    return commonprefix(list(texts))  # noqa: RUF071


def question_of(task: Any, doc: Any) -> str:
    """A question as it is asked, without few-shot examples."""
    text = task.doc_to_text(doc)
    if isinstance(text, str):
        return text
    # The choices are part of the question, as in WinoGrande: show them all, then what follows.
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
    """The right answer in words, also if the task gives its number."""
    target = sample["target"]
    if task.OUTPUT_TYPE == "multiple_choice":
        right = task.doc_to_text(sample["doc"]) if task.multiple_input else target
        numbers = right if isinstance(right, list) else [right]
        choices = [str(choice) for choice in task.doc_to_choice(sample["doc"])]
        return " / ".join(choices[i] if isinstance(i, int) and i < len(choices) else str(i) for i in numbers)
    return " / ".join(map(str, target)) if isinstance(target, list) else str(target)


def _shortened(text: str) -> str:
    text = text.strip()
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2].rstrip()} ... {text[-SHOWN // 2 :].lstrip()}"
