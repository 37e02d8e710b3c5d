"""Layouts that preference data come in: for each a way to write a row, and what must be read from it.

A case has the name of its row in the table of docs/layouts.md. Three rows are written of it; `row` gets their number,
0, 1 or 2. Where votes decide, the middle row prefers the second answer, so that a scale read the wrong way round shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from data_samples import assistant, system, user

Row = dict[str, Any]
Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """`prompt` and `answers` are what is expected of a row by its number; `facts` its ratings, label or columns."""

    name: str
    row: Callable[[int], Row]
    prompt: Callable[[int], Turns] = lambda number: [user(question(number))]
    answers: Callable[[int], list[Turns]] = lambda number: [[assistant(good(number))], [assistant(bad(number))]]
    facts: Callable[[int], Any] = lambda number: None
    given: Callable[[int], Row] = lambda number: {}
    kind: str = "pairs"
    source: dict[str, Any] = field(default_factory=dict)
    shape: str | None = None
    unused: tuple[str, ...] = ()


def question(number: int) -> str:
    return f"What is {number}?"


def good(number: int) -> str:
    return f"{number} is a number."


def bad(number: int) -> str:
    return f"No idea, {number}."


def human(text: str) -> Row:
    return {"from": "human", "value": text}


def gpt(text: str) -> Row:
    return {"from": "gpt", "value": text}


def asked(number: int, column: str = "prompt") -> Row:
    return {column: question(number)}


def pair(number: int, chosen: str = "chosen", rejected: str = "rejected") -> Row:
    return {chosen: good(number), rejected: bad(number)}


def two(number: int, first: str, second: str) -> Row:
    """Two answers of which the middle row has the good one second."""
    answers = (good(number), bad(number))
    return dict(zip((first, second), answers if number != 1 else answers[::-1], strict=True))


def either(number: int, first: Any, second: Any) -> Any:
    return second if number == 1 else first


def talk(number: int, answer: str) -> Turns:
    return [user(question(number)), assistant(answer)]


def talks(number: int, written: Callable[[Turns], Any] = list) -> Row:
    return {"chosen": written(talk(number, good(number))), "rejected": written(talk(number, bad(number)))}


def chatml(turns: Turns) -> str:
    return "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)


def transcript(turns: Turns) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)


EARLIER = [["Hello.", "Hi."], ["Well?", "Well."]]
EARLIER_TURNS = [user("Hello."), assistant("Hi."), user("Well?"), assistant("Well.")]
TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
BRIEF = "Be brief."


def with_system(number: int) -> Turns:
    return [system(BRIEF), user(question(number))]


def after_earlier(number: int) -> Turns:
    return [*EARLIER_TURNS, user(question(number))]


def wanted(number: int) -> bool:
    return number != 1


def labelled(number: int) -> list[Turns]:
    return [[assistant(good(number))]]


CASES = [
    # ---- chosen and rejected
    Case("text", lambda n: {**asked(n), **pair(n)}, shape="text"),
    Case("text", lambda n: {**asked(n, "question"), **pair(n)}),
    Case("text", lambda n: {**asked(n), "system": BRIEF, **pair(n)}, with_system),
    Case("text", lambda n: {**asked(n), "system_prompt": BRIEF, **pair(n)}, with_system),
    Case(
        "text",
        lambda n: {**asked(n), **pair(n), "score_chosen": 9, "score_rejected": "4.5", "id": n},
        facts=lambda n: (9.0, 4.5),
        unused=("id",),
    ),
    Case("text", lambda n: {**asked(n), **pair(n), "margin": n / 2 + 1}, facts=lambda n: (n / 2 + 1, 0.0)),
    Case("text", lambda n: {**asked(n, "query"), **pair(n, "y_w", "y_l")}),
    Case("text", lambda n: {**asked(n, "instruction"), **pair(n, "accepted", "rejected")}),
    Case("text", lambda n: {**asked(n), **pair(n, "preferred", "dispreferred")}),
    Case("text", lambda n: {**asked(n), **pair(n, "preferred_response", "non_preferred_response")}),
    Case("text", lambda n: {**asked(n), **pair(n, "positive", "negative")}),
    Case("text", lambda n: {**asked(n), **pair(n, "better_response", "worse_response")}),
    Case("messages", lambda n: {"prompt": [user(question(n))], **pair(n)}, shape="messages"),
    Case(
        "messages",
        lambda n: {
            "prompt": [system(BRIEF), user(question(n))],
            "chosen": [assistant(good(n))],
            "rejected": [assistant(bad(n))],
        },
        with_system,
    ),
    Case("messages", lambda n: {"prompt": [human(question(n))], "chosen": gpt(good(n)), "rejected": gpt(bad(n))}),
    Case(
        "messages", lambda n: {**asked(n), "chosen": gpt(good(n)), "rejected": gpt(bad(n))}, shape="messages, ShareGPT"
    ),
    Case("conversations", lambda n: talks(n), shape="conversations"),
    Case(
        "conversations",
        lambda n: {**asked(n), "messages": talk(n, good(n)), **talks(n), "score_chosen": 8.0, "score_rejected": 7.0},
        facts=lambda n: (8.0, 7.0),
        unused=("messages",),
    ),
    Case(
        "conversations",
        lambda n: {"chosen": [human(question(n)), gpt(good(n))], "rejected": [human(question(n)), gpt(bad(n))]},
    ),
    Case(
        "conversations",
        lambda n: {
            "chosen": [*EARLIER_TURNS, *talk(n, good(n))],
            "rejected": [*EARLIER_TURNS, *talk(n, bad(n))],
            "system": BRIEF,
        },
        lambda n: [system(BRIEF), *after_earlier(n)],
    ),
    Case(
        "turns",
        lambda n: {"messages": [user(question(n))], "chosen": assistant(good(n)), "rejected": assistant(bad(n))},
    ),
    Case("turns", lambda n: {"conversations": [human(question(n))], **pair(n)}, shape="turns, ShareGPT"),
    Case("ChatML", lambda n: talks(n, chatml), shape="conversations, ChatML"),
    Case(
        "ChatML",
        lambda n: {
            "prompt": chatml(with_system(n)) + "<|im_start|>assistant\n",
            "chosen": good(n) + "<|im_end|>\n",
            "rejected": bad(n) + "<|im_end|>\n",
        },
        with_system,
    ),
    Case("transcripts", lambda n: talks(n, transcript), shape="conversations, transcripts"),
    Case(
        "transcripts",
        lambda n: {"prompt": transcript(after_earlier(n)) + "\n\nAssistant:", **pair(n)},
        after_earlier,
        shape="text, transcripts",
    ),
    Case("lists as text", lambda n: talks(n, json.dumps), shape="conversations, written as text"),
    Case("lists as text", lambda n: talks(n, str), shape="conversations, written as text"),
    Case("lists as text", lambda n: {"prompt": json.dumps([user(question(n))]), **pair(n)}),
    Case("lists as text", lambda n: talks(n, lambda turns: json.dumps(json.dumps(turns)))),
    Case(
        "lists as text",
        lambda n: {
            "input": json.dumps({"messages": [user(question(n))], "tools": [TOOL]}),
            "preferred_output": json.dumps([assistant(good(n))]),
            "non_preferred_output": json.dumps([assistant(bad(n))]),
        },
        given=lambda n: {"tools": [TOOL]},
    ),
    Case(
        "columns by name",
        lambda n: {"sample": json.dumps({"ask": question(n), "replies": [good(n), bad(n)]})},
        source={"columns": {"prompt": "sample.ask", "chosen": "sample.replies.0", "rejected": "sample.replies.1"}},
    ),
    Case(
        "lists as text",
        lambda n: {
            "messages": [user(question(n))],
            "chosen": json.dumps(assistant(good(n))),
            "rejected": str(assistant(bad(n))),
        },
    ),
    Case("lists as text", lambda n: {"conversations": json.dumps([human(question(n))]), **pair(n)}),
    Case(
        "prompt in the answers",
        lambda n: {**asked(n), "chosen": question(n) + good(n), "rejected": question(n) + bad(n)},
        shape="text, prompt repeated in the answers",
    ),
    # ---- votes
    Case("votes", lambda n: {**asked(n, "instruction"), **two(n, "output_1", "output_2"), "label": either(n, 1, 2)}),
    Case("votes", lambda n: {**asked(n), **two(n, "response1", "response2"), "preference": either(n, "1", "2")}),
    Case("votes", lambda n: {**asked(n), **two(n, "response_a", "response_b"), "winner": either(n, "A", "B")}),
    Case(
        "votes",
        lambda n: {**asked(n), **two(n, "answer_a", "answer_b"), "preferred": either(n, "answer_a", "answer_b")},
    ),
    Case(
        "votes",
        lambda n: {**asked(n), **two(n, "response_0", "response_1"), "better": either(n, "response_0", "response_1")},
    ),
    Case(
        "votes",
        lambda n: {**asked(n), **two(n, "answer_1", "answer_2"), "judge": either(n, "x", "y")},
        source={"columns": {"vote": "judge"}, "values": {"first": "x", "second": "y"}},
    ),
    Case(
        "votes",
        lambda n: {**asked(n), **two(n, "answer_1", "answer_2"), "scores": {"by": [either(n, 5, 1)]}},
        source={"columns": {"vote": "scores.by.0"}, "values": {"first": ">= 4", "second": "<= 2", "tie": 3}},
    ),
    Case(
        "votes",
        lambda n: {**asked(n), **two(n, "answer_1", "answer_2"), "preference": either(n, -n - 1, 2)},
        facts=lambda n: (float(n + 1), 0.0),
        source={"values": {"first": "< 0", "second": "> 0", "tie": 0}},
    ),
    Case(
        "several annotators",
        lambda n: {
            **asked(n),
            **two(n, "output_1", "output_2"),
            **{f"annotator{who}": either(n, vote, 3 - vote) for who, vote in enumerate((1, 2, 1), start=1)},
        },
    ),
    Case(
        "scores",
        lambda n: {
            **asked(n),
            **two(n, "answer_1", "answer_2"),
            "score_1": either(n, 7, 2),
            "score_2": either(n, 2, 7),
        },
        facts=lambda n: (7.0, 2.0),
        shape="scores",
    ),
    Case(
        "scores",
        lambda n: {
            **asked(n),
            **two(n, "response_a", "response_b"),
            "winner": either(n, "model_a", "model_b"),
            "rating_a": either(n, 5, 4),
            "rating_b": either(n, 4, 5),
        },
        facts=lambda n: (5.0, 4.0),
        shape="votes",
    ),
    Case(
        "HelpSteer3",
        lambda n: {
            "domain": "general",
            "context": [user(question(n))],
            **two(n, "response1", "response2"),
            "overall_preference": either(n, -n - 1, 3),
        },
        facts=lambda n: (float(either(n, n + 1, 3)), 0.0),
        unused=("domain",),
    ),
    Case(
        "HelpSteer2-preference",
        lambda n: {**asked(n), **two(n, "response_1", "response_2"), "preference_strength": either(n, -2, 1)},
        facts=lambda n: (float(either(n, 2, 1)), 0.0),
    ),
    Case(
        "PKU-SafeRLHF",
        lambda n: {
            **asked(n),
            **two(n, "response_0", "response_1"),
            "better_response_id": either(n, 0, 1),
            "safer_response_id": 1,
        },
        source={"columns": {"vote": "better_response_id"}},
        unused=("safer_response_id",),
    ),
    Case(
        "SHP",
        lambda n: {
            "history": question(n),
            **two(n, "human_ref_A", "human_ref_B"),
            "labels": either(n, 1, 0),
            "score_A": either(n, 30, 3),
            "score_B": either(n, 3, 30),
        },
        facts=lambda n: (30.0, 3.0),
    ),
    Case(
        "WebGPT comparisons",
        lambda n: {
            "question": {"full_text": question(n), "id": str(n)},
            **two(n, "answer_0", "answer_1"),
            "score_0": either(n, 0.5, -1.0),
            "score_1": either(n, -0.5, 1.0),
        },
        facts=lambda n: (either(n, 0.5, 1.0), either(n, -0.5, -1.0)),
    ),
    Case(
        "LMSYS arena",
        lambda n: {
            "model_a": "x",
            "prompt": json.dumps([question(n)]),
            **{name: json.dumps([text]) for name, text in two(n, "response_a", "response_b").items()},
            "winner_model_a": either(n, 1, 0),
            "winner_model_b": either(n, 0, 1),
            "winner_tie": 0,
        },
        unused=("model_a",),
        shape="parallel lists, scores, written as text",
    ),
    Case(
        "LMSYS arena",
        lambda n: {
            **asked(n),
            **two(n, "response_a", "response_b"),
            "winner_model_a": n != 1,
            "winner_model_b": n == 1,
            "winner_tie": False,
        },
        shape="scores",
    ),
    Case("Stack Exchange paired", lambda n: {**asked(n, "question"), **pair(n, "response_j", "response_k")}),
    # ---- of other tools
    Case(
        "OpenAI fine-tuning",
        lambda n: {
            "input": {"messages": [user(question(n))], "tools": [TOOL]},
            "preferred_output": [assistant(good(n))],
            "non_preferred_output": [assistant(bad(n))],
        },
        given=lambda n: {"tools": [TOOL]},
    ),
    Case("ms-swift", lambda n: {"messages": talk(n, good(n)), "rejected_response": bad(n)}, shape="answered messages"),
    Case(
        "ms-swift",
        lambda n: {
            "messages": [system(BRIEF), *talk(n, good(n))],
            "rejected_messages": [system(BRIEF), *talk(n, bad(n))],
        },
        with_system,
    ),
    Case("ms-swift", lambda n: {"messages": json.dumps(talk(n, good(n))), "rejected_response": bad(n)}),
    Case(
        "ms-swift, query and response",
        lambda n: {
            "query": question(n),
            "response": good(n),
            "rejected_response": bad(n),
            "history": EARLIER,
            "system": BRIEF,
        },
        lambda n: [system(BRIEF), *after_earlier(n)],
    ),
    Case(
        "ms-swift, query and response",
        lambda n: {"query": question(n), "response": good(n), "rejected_response": bad(n), "history": str(EARLIER)},
        after_earlier,
    ),
    Case(
        "LLaMA-Factory alpaca",
        lambda n: {"instruction": "Say.", "input": question(n), "output": "x", **pair(n), "history": EARLIER},
        lambda n: [*EARLIER_TURNS, user(f"Say.\n\n{question(n)}")],
        unused=("output",),
    ),
    Case(
        "LLaMA-Factory alpaca",
        lambda n: {"instruction": question(n), "input": "", **pair(n), "history": [], "system": BRIEF},
        with_system,
    ),
    Case(
        "LLaMA-Factory alpaca",
        lambda n: {
            "instruction": question(n),
            "input": "",
            "output": good(n),
            "kto_tag": wanted(n),
            "history": EARLIER,
        },
        after_earlier,
        labelled,
        wanted,
        kind="unpaired",
    ),
    Case(
        "LLaMA-Factory sharegpt",
        lambda n: {
            "conversations": [human(question(n))],
            "chosen": gpt(good(n)),
            "rejected": gpt(bad(n)),
            "system": BRIEF,
            "tools": json.dumps([TOOL]),
        },
        with_system,
        given=lambda n: {"tools": [TOOL]},
    ),
    Case("Axolotl", lambda n: {"system": BRIEF, **asked(n, "question"), **pair(n)}, with_system),
    Case("Axolotl", lambda n: {**asked(n, "instruction"), **pair(n, "chosen_response", "rejected_response")}),
    Case("Axolotl", lambda n: {"system": "", **asked(n, "input"), **pair(n)}),
    Case("Axolotl", lambda n: {"system": BRIEF, **asked(n), **talks(n)}, with_system),
    Case(
        "Axolotl",
        lambda n: {"messages": with_system(n), "chosen": assistant(good(n)), "rejected": assistant(bad(n))},
        with_system,
    ),
    Case(
        "OpenRLHF",
        lambda n: {**asked(n, "input"), "output": good(n), "label": wanted(n)},
        answers=labelled,
        facts=wanted,
        kind="unpaired",
    ),
    Case("OpenRLHF", lambda n: {**talks(n), "chosen_score": 2, "rejected_score": 1}, facts=lambda n: (2.0, 1.0)),
    Case(
        "NeMo-Aligner",
        lambda n: {
            **asked(n),
            **pair(n, "chosen_response", "rejected_response"),
            "chosen_reward": 4,
            "rejected_reward": 1,
        },
        facts=lambda n: (4.0, 1.0),
    ),
    Case(
        "UltraInteract",
        lambda n: {"trajectory": [{"from": "user", "value": question(n)}], **pair(n), "parent_ids": [n + 1]},
        unused=("parent_ids",),
    ),
    # ---- what goes to the chat template
    Case(
        "tools and template settings",
        lambda n: {**asked(n), **pair(n), "tools": [json.dumps(TOOL)] if n else TOOL},
        given=lambda n: {"tools": [TOOL]},
    ),
    Case(
        "tools and template settings",
        lambda n: {**asked(n), **pair(n), "tools": [TOOL]},
        given=lambda n: {"tools": [TOOL]},
    ),
    Case(
        "tools and template settings",
        lambda n: {**asked(n), **pair(n), "chat_template_kwargs": {"enable_thinking": n == 1} if n else None},
        given=lambda n: {"enable_thinking": n == 1} if n else {},
    ),
    Case(
        "tools and template settings",
        lambda n: {
            "prompt": [user(question(n))],
            **pair(n),
            "chat_template_kwargs": '{"date": "today"}',
            "tools": "[]",
        },
        given=lambda n: {"date": "today"},
    ),
    Case(
        "columns by name",
        lambda n: {**asked(n, "q"), **pair(n, "good", "bad")},
        source={"columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
    ),
    Case(
        "columns by name",
        lambda n: {"sample": {"ask": [question(n)], "replies": [{"text": good(n)}, {"text": bad(n)}]}},
        source={
            "columns": {
                "prompt": "sample.ask.0",
                "chosen": "sample.replies.0.text",
                "rejected": "sample.replies.1.text",
            }
        },
    ),
    Case(
        "columns by name",
        lambda n: {**asked(n), **pair(n), "rounds": EARLIER, "functions": [TOOL], "settings": {"date": "now"}},
        after_earlier,
        given=lambda n: {"tools": [TOOL], "date": "now"},
        source={"columns": {"history": "rounds", "tools": "functions", "chat_template_kwargs": "settings"}},
    ),
    # ---- unpaired answers
    Case(
        "labelled text",
        lambda n: {**asked(n), "completion": good(n), "label": wanted(n)},
        answers=labelled,
        facts=wanted,
        kind="unpaired",
    ),
    Case(
        "labelled text",
        lambda n: {"prompt": [user(question(n))], "completion": [assistant(good(n))], "label": int(wanted(n))},
        answers=labelled,
        facts=wanted,
        kind="unpaired",
    ),
    Case(
        "labelled text",
        lambda n: {**asked(n), "response": good(n), "label": either(n, "good", "bad")},
        answers=labelled,
        facts=wanted,
        kind="unpaired",
    ),
    Case(
        "labelled text",
        lambda n: {**asked(n), "response": good(n), "stars": either(n, 5, 2)},
        answers=labelled,
        facts=wanted,
        kind="unpaired",
        source={"columns": {"label": "stars"}, "values": {"desirable": ">= 4", "undesirable": "<= 2"}},
    ),
    Case(
        "labelled messages",
        lambda n: {"messages": talk(n, good(n)), "label": wanted(n)},
        answers=labelled,
        facts=wanted,
        kind="unpaired",
        shape="labelled messages",
    ),
    Case(
        "labelled messages",
        lambda n: {"conversations": [human(question(n)), gpt(good(n))], "kto_tag": wanted(n)},
        answers=labelled,
        facts=wanted,
        kind="unpaired",
    ),
    # ---- prompts
    Case(
        "prompts",
        lambda n: {**asked(n), "answer": n},
        answers=lambda n: [],
        facts=lambda n: {"answer": n},
        kind="prompts",
    ),
    Case(
        "prompts",
        lambda n: {"prompt": with_system(n), "data_source": "x"},
        with_system,
        lambda n: [],
        lambda n: {"data_source": "x"},
        kind="prompts",
    ),
    Case(
        "opening messages",
        lambda n: {"messages": with_system(n)},
        with_system,
        lambda n: [],
        lambda n: {},
        kind="prompts",
    ),
    Case(
        "sentences",
        lambda n: {"source": ["Look.", question(n)]},
        lambda n: [user(f"Look. {question(n)}")],
        lambda n: [],
        lambda n: {},
        kind="prompts",
    ),
]
