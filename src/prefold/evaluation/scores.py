"""What a model scored on a task: the record between whoever measures and whoever compares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


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
    """Whether the question stands in what the model was trained on here; None where that data is not known."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TaskScores:
        """From what `as_json` gave, written and read again."""
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**fields)
