"""Simulated models on simulated tasks, whose true difference is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from prefold.evaluation.scores import TaskScores

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """A task of `n` questions, `passage` of which share a passage on average; `accuracy` of the first model, and by how
    much the second is better. `alike`: how far the questions about a passage go together."""

    n: int
    accuracy: float
    difference: float
    passage: int = 1
    alike: float = 0.5

    def draw(self, generator: np.random.Generator) -> tuple[Floats, Floats, list[str]]:
        """Right or wrong, of both models, and the passages. Hard questions are hard for both."""
        passages = np.arange(self.n)
        if self.passage > 1:
            sizes = generator.integers(1, 2 * self.passage, size=self.n)
            passages = np.repeat(np.arange(self.n), sizes)[: self.n]
        spread = self.alike if self.passage > 1 else 0.0
        shared, *own = generator.normal(size=(3, self.n)) * spread
        hard = generator.normal(size=self.n)
        scale = np.sqrt(2 + 2 * spread**2)
        sides = []
        for accuracy, passage in zip((self.accuracy, self.accuracy + self.difference), own, strict=True):
            difficulty = (shared + passage)[passages] + hard + generator.normal(size=self.n)
            sides.append((difficulty < norm.ppf(accuracy) * scale).astype(float))
        return sides[0], sides[1], [str(one) for one in passages]


def scores(values: Any, clusters: Any = None, task: str = "task", **changes: Any) -> TaskScores:
    """A record of a task whose questions are `q0`, `q1`, ..."""
    questions = tuple(f"q{place}" for place in range(len(values)))
    answers = tuple(f"{task} says {value}" for value in values)
    facts: dict[str, Any] = {
        "task": task,
        "metric": "acc",
        "version": "1.0",
        "num_fewshot": 0,
        "higher_is_better": True,
        "questions": questions,
        "clusters": tuple(clusters or questions),
        "values": tuple(float(value) for value in values),
        "texts": tuple(f"What is {question}?" for question in questions),
        "answers": answers,
        "targets": tuple(f"{question} is this" for question in questions),
    }
    return TaskScores(**facts | changes)
