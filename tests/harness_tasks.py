"""Small tasks of every kind that the harness knows, as YAML files with questions of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def options() -> list[dict[str, Any]]:
    """Which number comes next; with three or four options, of different lengths."""
    rows = []
    for place in range(8):
        names = [NUMBERS[(place + step) % 10] for step in (1, 4, 6, 8)[: 3 + place % 2]]
        question = f"Which number comes after {NUMBERS[place]}?"
        rows.append({"question": question, "choices": [f"the number {name}" for name in names], "answer": 0})
    return rows


def sums() -> list[dict[str, Any]]:
    return [{"question": f"What is {n} plus {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(2, 9)]


def blanks() -> list[dict[str, Any]]:
    names = [("Ann", "Bo"), ("Cy", "Dee"), ("Eve", "Fay"), ("Gus", "Hal"), ("Ida", "Jo")]
    return [
        {
            "sentence": f"{a} gave {b} a book because _ had read it.",
            "option1": a,
            "option2": b,
            "answer": str(1 + i % 2),
        }
        for i, (a, b) in enumerate(names)
    ]


def facts() -> list[dict[str, Any]]:
    rows = []
    for name, right in (("rain", "wet"), ("snow", "cold"), ("fire", "hot"), ("sand", "dry")):
        choices = [
            f"It is {right}",
            f"{name.title()} is {right}",
            "It is made of cheese",
            "" if rows else "It sings",
        ]  # blank ones exist
        rows.append({"question": f"What is {name} like?", "mc2": {"choices": choices, "labels": [1, 1, 0, 0]}})
    return rows


def passages() -> list[dict[str, Any]]:
    """Two questions about each passage."""
    rows = []
    for town in ("Ahlen", "Brno", "Cork"):
        story = f"The town of {town} has a market. " + "People come by boat and by train, and they bring fruit. " * 4
        rows += [{"story": story, "question": f"{end}?", "label": len(rows) % 2} for end in ("Is it big", "Is it old")]
    return rows


METRICS = {
    name: {"metric": name, "aggregation": "mean", "higher_is_better": True}
    for name in ("acc", "acc_norm", "exact_match")
}
KINDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "tiny_options": (
        options(),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{answer}}",
            "doc_to_choice": "{{choices}}",
            "metric_list": [METRICS["acc"], METRICS["acc_norm"]],
            "num_fewshot": 3,
        },
    ),
    "tiny_letters": (
        options(),
        {
            "output_type": "multiple_choice",
            "description": "Choose the next number, please.\n\n",
            "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nAnswer:",
            "doc_to_target": "{{answer}}",
            "doc_to_choice": ["A", "B", "C"],
            "fewshot_config": {"sampler": "first_n"},
            "metric_list": [METRICS["acc"]],
            "num_fewshot": 2,
        },
    ),
    "tiny_blanks": (
        blanks(),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{ {'1': 0, '2': 1}[answer] }}",
            "doc_to_target": "{{ sentence.split('_')[1].strip() }}",
            "doc_to_choice": "{{ [sentence.split('_')[0] + option1, sentence.split('_')[0] + option2] }}",
            "metric_list": [METRICS["acc"]],
            "num_fewshot": 2,
        },
    ),
    "tiny_facts": (
        facts(),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "Q: What is life?\nA: Life is a long story with many people in it.\n\nQ: {{question}}\nA:",
            "doc_to_target": 0,
            "doc_to_choice": "{{mc2.choices}}",
            "process_results": "FUNCTION helpers.share_of_right_answers",
            "metric_list": [METRICS["acc"]],
            "num_fewshot": 0,
        },
    ),
    "tiny_passages": (
        passages(),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{story}}\nQuestion: {{question}}\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": ["no", "yes"],
            "metric_list": [METRICS["acc"]],
        },
    ),
    "tiny_mutual": (
        options(),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True}],
        },
    ),
    "tiny_sums": (
        sums(),
        {
            "output_type": "generate_until",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{answer.split('#### ')[1]}}",
            "metric_list": [METRICS["exact_match"]],
            "num_fewshot": 2,
            "generation_kwargs": {"until": ["Question:", "\n\n"], "do_sample": False, "max_gen_toks": 24},
            "filter_list": [
                {
                    "name": "strict-match",
                    "filter": [{"function": "regex", "regex_pattern": "#### ([0-9]+)"}, {"function": "take_first"}],
                },
                {
                    "name": "flexible-extract",
                    "filter": [
                        {"function": "regex", "regex_pattern": "([0-9]+)", "group_select": -1},
                        {"function": "take_first"},
                    ],
                },
            ],
        },
    ),
    "tiny_endings": (
        sums(),
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{' ' + answer}}",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
                METRICS["acc"],
            ],
        },
    ),
    "tiny_documents": (
        [{"page": row["story"]} for row in passages()[::2]] + [{"page": "Short."}],
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
        },
    ),
}
HELPERS = """\
import numpy as np


def share_of_right_answers(doc, results):
    probabilities = np.exp([logprob for logprob, _ in results])
    right = np.array(doc["mc2"]["labels"]) == 1
    return {"acc": probabilities[right].sum() / probabilities.sum()}
"""


def write_tasks(folder: Path) -> Path:
    """A folder with a YAML file for each kind, and its questions beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "helpers.py").write_text(HELPERS, encoding="utf-8")
    for name, (rows, settings) in KINDS.items():
        write_task(folder, name, rows, settings)
    return folder


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    whole = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "fewshot_split": "test",
        **settings,
        "metadata": {"version": 1.0},
    }
    text = yaml.safe_dump(whole, sort_keys=False).replace("FUNCTION ", "!function ")
    (folder / f"{name}.yaml").write_text(text.replace("'!function", "!function").replace("answers'", "answers"))
