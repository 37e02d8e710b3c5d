"""Sets of tasks by name, as leaderboards define them, and the metric by which each task is judged.

Tasks are those of lm-evaluation-harness as it is today; where a suite's own numbers came from other definitions,
`differs` says how.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PRIMARY = ("acc_norm", "exact_match", "acc", "bits_per_byte")
"""A task's primary metric, unless one is stated: the first of these that it has, else its first one."""


@dataclass(frozen=True)
class Wanted:
    """A task or group of the harness as it was asked for.

    `metric`, `filter` (what extracts an answer from a completion) and `num_fewshot` are the task's own where None.
    """

    task: str
    metric: str | None = None
    num_fewshot: int | None = None
    filter: str | None = None
    suite: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class Suite:
    tasks: tuple[Wanted, ...]
    differs: str


_BIGBENCH = (
    *("causal_judgment", "date_understanding", "disambiguation_qa", "geometric_shapes", "logical_deduction"),
    *("movie_recommendation", "navigate", "reasoning_about_colored_objects", "ruin_names"),
    *("salient_translation_error_detection", "snarks", "sports_understanding", "temporal_sequences"),
    "tracking_shuffled_objects",
)
_GPT4ALL = {
    "arc_challenge": "acc_norm",
    "arc_easy": "acc_norm",
    "boolq": "acc",
    "hellaswag": "acc_norm",
    "openbookqa": "acc_norm",
    "piqa": "acc_norm",
    "winogrande": "acc",
}

SUITES = {
    "open_llm_leaderboard": Suite(
        (
            Wanted("arc_challenge", "acc_norm", 25),
            Wanted("hellaswag", "acc_norm", 10),
            Wanted("mmlu", "acc", 5, group="mmlu"),
            Wanted("truthfulqa_mc2", "acc", 0),
            Wanted("winogrande", "acc", 5),
            Wanted("gsm8k", "exact_match", 5, "strict-match"),
        ),
        "The tasks, shots and metrics of the first Open LLM Leaderboard, which is retired. It ran a harness of 2023: "
        "the examples before MMLU's questions are the same, those before ARC, HellaSwag, WinoGrande and GSM8K are "
        "drawn by other random numbers, so scores are near the leaderboard's and not the same. Of GSM8K the number "
        "behind `####` counts (`strict-match`); completions stop at `Question:`, where harnesses of 2023 stopped at "
        "any colon.",
    ),
    "nous": Suite(
        (
            Wanted("agieval_nous", "acc_norm", 0, group="agieval"),
            *(Wanted(task, metric, 0, group="gpt4all") for task, metric in _GPT4ALL.items()),
            Wanted("truthfulqa_mc2", "acc", 0, group="truthfulqa"),
            *(Wanted(f"bigbench_{task}_multiple_choice", "acc", 0, group="bigbench") for task in _BIGBENCH),
        ),
        "The four sets of the Nous benchmark suite: AGIEval, GPT4All's, TruthfulQA (mc2) and BIG-bench, each counting "
        "once. The suite's eighteen BIG-bench tasks are not in today's harness: these are its own tasks for the same "
        "fourteen subjects, with prompts from another copy of the data; logical deduction and shuffled objects are one "
        "task each for all numbers of objects, where there were three. Do not compare this set with published numbers.",
    ),
}
"""Sets that `evaluate.tasks` accepts by name, besides single tasks and the harness's groups."""


def wanted_by(name: str) -> list[Wanted]:
    """What a name in a recipe stands for: a suite's tasks, or the task or group itself."""
    return [replace(wanted, suite=name) for wanted in SUITES[name].tasks] if name in SUITES else [Wanted(name)]
