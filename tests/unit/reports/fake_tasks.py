"""What a run leaves of its tasks and its win rate, made up: right and wrong drawn, everything else computed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from fake_run import RECIPE, SAMPLES

from prefold.evaluation.scores import TaskScores
from prefold.evaluation.task_comparison import compare_tasks

EVALUATE = "evaluate:\n  tasks: [open_llm_leaderboard]\n  compare_with: [some/other-model]\n"
ASKED = RECIPE.replace(
    "evaluate:\n", EVALUATE + "  win_rate: {judge: {endpoint: http://judge.example/v1, model: big}}\n"
)
QUESTIONS = 400
# Accuracy before, and how much is gained after training and by the other model.
TASKS = {
    "arc_challenge": (0.44, -0.01, 0.03),
    "hellaswag": (0.62, -0.09, 0.02),
    "mmlu_anatomy": (0.41, 0.02, 0.1),
    "mmlu_astronomy": (0.47, 0.0, 0.12),
    "mmlu_virology": (0.38, 0.03, 0.06),
    "winogrande": (0.58, 0.0, 0.0),
    "gsm8k": (0.12, 0.1, 0.2),
}
SETTINGS = {
    "harness": "lm_eval 0.4.13",
    "apply_chat_template": False,
    "limit": 400,
    "num_fewshot": None,
    "suites": {"open_llm_leaderboard": "The tasks, shots and metrics of the first Open LLM Leaderboard."},
}
WIN_RATE = {
    "judge": {
        "kind": "endpoint",
        "name": "big",
        "cost": {"calls": 388, "prompt_tokens": 81234, "completion_tokens": 776},
    },
    "prompts": 194,
    "comparisons": 194,
    "left_out": {"no_verdict": 5, "refused": 1, "no_score": 0},
    "replies_without_verdict": ["Both answers have their merits."],
    "wins": 101,
    "ties": 32,
    "losses": 61,
    "win_rate": 0.603,
    "ci": [0.539, 0.665],
    "p_value": 0.002,
    "verdict": "better",
    "length_controlled": {"win_rate": 0.557, "ci": [0.479, 0.632]},
    "characters": {"before": 312.4, "after": 420.9},
    "outcomes": [[None]] * len(SAMPLES),
}


def scores(draw: random.Random, gained: int, text: Callable[[str], str]) -> list[TaskScores]:
    """Of the model before training (`gained` 0), after it (1), or of the other one (2)."""
    found = []
    for task, (accuracy, *gains) in TASKS.items():
        # The same questions are hard for all: what is drawn first is theirs.
        hard = random.Random(task)
        chance = accuracy + (gains[gained - 1] if gained else 0.0)
        values = [float(0.7 * hard.random() + 0.3 * draw.random() < chance) for _ in range(QUESTIONS)]
        questions = tuple(f"{task}-{place}" for place in range(QUESTIONS))
        found.append(
            TaskScores(
                task=task,
                metric="exact_match" if task == "gsm8k" else "acc_norm",
                version="1.0",
                num_fewshot=25 if task == "arc_challenge" else 5,
                higher_is_better=True,
                questions=questions,
                clusters=questions,
                values=tuple(values),
                texts=tuple(
                    text(f"Question {place}: which of these is a common use of {task}?") for place in range(QUESTIONS)
                ),
                answers=tuple(text("to cool an engine" if value else "to heat the room") for value in values),
                targets=(text("to cool an engine"),) * QUESTIONS,
                suite="open_llm_leaderboard",
                group="mmlu" if task.startswith("mmlu") else None,
            )
        )
    return found


def measured(text: Callable[[str], str] = str) -> dict[str, Any]:
    """Files of a run that was asked tasks, compared with another model and judged: changes for `write_run`."""
    draw = random.Random(5)
    before, after, other = (scores(draw, gained, text) for gained in range(3))
    return {
        "recipe": ASKED,
        "tasks": {**compare_tasks(before, after), "settings": SETTINGS},
        "compared": {"models": {text("some/other-model"): compare_tasks(before, other)}},
        "win_rate": WIN_RATE,
    }
