"""Layouts of rows that rank several answers: rows as the sets have them, and what comes of them, worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from data_samples import assistant, user

from prefold.data.preference import Message

Pair = tuple[list[Message] | str, list[Message] | str, list[Message] | str, tuple[float, float] | None]
"""Prompt, chosen, rejected (a text stands for a single turn), ratings."""


@dataclass(frozen=True)
class Case:
    """A layout by its name in the table of docs/layouts.md; `pairs` of all rows in order, by the usual rule."""

    name: str
    layout: str
    rows: list[dict[str, Any]]
    pairs: list[Pair]
    columns: dict[str, str] = field(default_factory=dict)


def ultrafeedback(prompt: str, *scores: tuple[str, float]) -> dict[str, Any]:
    completions = [
        {
            "annotations": {"helpfulness": {"Rating": str(round(score)), "Rationale": "Clear."}},
            "custom_system_prompt": "Be helpful.",
            "model": "bard",
            "principle": "helpfulness",
            "response": text,
            "critique": "Good.",
            "overall_score": score,
        }
        for text, score in scores
    ]
    return {"source": "evol_instruct", "instruction": prompt, "models": ["bard"], "completions": completions}


def nectar(prompt: str, *ranks: tuple[str, float]) -> dict[str, Any]:
    answers = [{"answer": text, "model": "gpt-4", "rank": rank} for text, rank in ranks]
    return {"prompt": prompt, "answers": answers, "turns": 1, "num_responses": len(ranks), "source": ["flan"]}


def nemo(context: list[Message], *ranks: tuple[str, int]) -> dict[str, Any]:
    completions = [{"rank": rank, "completion": [assistant(text)]} for text, rank in ranks]
    return {"context": context, "completions": completions, "task_name": "preference"}


def stack_exchange(question: str, *scores: tuple[str, int]) -> dict[str, Any]:
    answers = [
        {"answer_id": number, "author": "ann", "pm_score": score, "selected": number == 0, "text": text}
        for number, (text, score) in enumerate(scores)
    ]
    return {"qid": 7, "question": question, "answers": answers, "date": "2020/01/01", "metadata": ["stackoverflow.com"]}


def summaries(post: str, choice: int, *texts: str) -> dict[str, Any]:
    info = {"id": "t3", "post": post, "title": "Help", "subreddit": "AskReddit", "site": None, "article": None}
    both = [{"text": text, "policy": "sup2", "note": None} for text in texts]
    return {
        "info": info,
        "summaries": both,
        "choice": choice,
        "worker": "w",
        "batch": "b",
        "split": "train",
        "extra": {},
    }


def reply(text: str, role: str, rank: int | None, *replies: dict[str, Any], deleted: bool = False) -> dict[str, Any]:
    return {"text": text, "role": role, "rank": rank, "lang": "en", "deleted": deleted, "replies": list(replies)}


def tree(text: str, *replies: dict[str, Any]) -> dict[str, Any]:
    return {"message_tree_id": "m", "tree_state": "ready", "prompt": reply(text, "prompter", None, *replies)}


def arena(first: list[Message], second: list[Message], winner: str) -> dict[str, Any]:
    models = {"question_id": "q", "model_a": "vicuna", "model_b": "koala", "judge": "arena_user", "language": "English"}
    return {**models, "winner": winner, "conversation_a": first, "conversation_b": second, "turn": len(first) // 2}


def arena_lists(prompt: list[str], first: list[Any], second: list[Any], *winner: int) -> dict[str, Any]:
    flags = dict(zip(("winner_model_a", "winner_model_b", "winner_tie"), winner, strict=True))
    return {
        "id": 3,
        "model_a": "x",
        "model_b": "y",
        "prompt": prompt,
        "response_a": first,
        "response_b": second,
        **flags,
    }


OTHER_TURNS = [user("Hi"), assistant("Hi!"), user("Why?")]
TURNS = [user("Hi"), assistant("Hello"), user("Why?")]
CASES = [
    Case(
        "UltraFeedback",
        "rated answers",
        [
            ultrafeedback("Why?", ("So.", 7.5), ("No.", 2.0), ("Maybe.", 9.0), ("Well.", 7.5)),
            ultrafeedback("How?", ("By car.", 8.0), ("By bus.", 3.0)),
            ultrafeedback("Who?", ("Ann.", 4.0), ("Bob.", 8.5)),
        ],
        [
            ("Why?", "Maybe.", "No.", (9.0, 2.0)),
            ("How?", "By car.", "By bus.", (8.0, 3.0)),
            ("Who?", "Bob.", "Ann.", (8.5, 4.0)),
        ],
    ),
    Case(
        "UltraFeedback",
        "rated answers",
        [ultrafeedback("Why?", ("So.", 2.0), ("No.", 4.0))] * 3,
        [("Why?", "No.", "So.", (4.0, 2.0))] * 3,
        {"rating": "annotations.helpfulness.Rating"},
    ),
    Case(
        "Nectar",
        "rated answers, transcripts",
        [
            nectar("\n\nHuman: Why?\n\nAssistant: ", ("No.", 7.0), ("So.", 1.0), ("Well.", 3.0)),
            nectar("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: ", ("So.", 1.0), ("No.", 2.0)),
            nectar("\n\nHuman: How?\n\nAssistant: ", ("By car.", 2.0), ("By bus.", 1.0)),
        ],
        [
            ("Why?", "So.", "No.", (-1.0, -7.0)),
            (TURNS, "So.", "No.", (-1.0, -2.0)),
            ("How?", "By bus.", "By car.", (-1.0, -2.0)),
        ],
    ),
    Case(
        "objects of any names",
        "rated answers",
        [{"q": "Why?", "options": [{"body": {"md": "So."}, "votes": 3}, {"body": {"md": "No."}, "votes": -1}]}] * 3,
        [("Why?", "So.", "No.", (3.0, -1.0))] * 3,
        {"prompt": "q", "answers": "options", "answer": "body.md", "rating": "votes"},
    ),
    Case(
        "objects of any names",
        "rated answers",
        [{"prompt": "Why?", "answers": [{"text": "So.", "position": 2}, {"text": "No.", "position": 1}]}] * 3,
        [("Why?", "No.", "So.", (-1.0, -2.0))] * 3,
        {"rank": "position"},
    ),
    Case(
        "Stack Exchange preferences",
        "rated answers",
        [
            stack_exchange("Why?", ("So.", 4), ("No.", 1)),
            stack_exchange("How?", ("By car.", 0), ("By bus.", 2), ("By foot.", -1)),
            stack_exchange("Who?", ("Ann.", 2), ("Bob.", 1)),
        ],
        [
            ("Why?", "So.", "No.", (4.0, 1.0)),
            ("How?", "By bus.", "By foot.", (2.0, -1.0)),
            ("Who?", "Ann.", "Bob.", (2.0, 1.0)),
        ],
    ),
    Case(
        "NeMo-RL",
        "rated answers",
        [
            nemo([user("Why?")], ("So.", 0), ("No.", 1)),
            nemo(TURNS, ("No.", 2), ("So.", 0), ("Well.", 1)),
            nemo([user("How?")], ("By bus.", 1), ("By car.", 0)),
        ],
        [
            ("Why?", "So.", "No.", (0.0, -1.0)),
            (TURNS, "So.", "No.", (0.0, -2.0)),
            ("How?", "By car.", "By bus.", (0.0, -1.0)),
        ],
    ),
    Case(
        "answers and ratings",
        "answers and ratings",
        [
            {"prompt": "Why?", "responses": ["No.", "So."], "scores": [0.1, 0.9]},
            {"prompt": "How?", "responses": ["By car.", "By bus.", "By foot."], "scores": [1, 3, 2]},
            {"prompt": "Who?", "responses": ["Ann.", "Bob."], "scores": [-1.5, -2.5]},
        ],
        [
            ("Why?", "So.", "No.", (0.9, 0.1)),
            ("How?", "By bus.", "By car.", (3.0, 1.0)),
            ("Who?", "Ann.", "Bob.", (-1.5, -2.5)),
        ],
    ),
    Case(
        "answers and ratings",
        "answers and ratings",
        [{"prompt": TURNS, "responses": [[assistant("No.")], [assistant("So.")]], "rewards": [0, 1]}] * 3,
        [(TURNS, "So.", "No.", (1.0, 0.0))] * 3,
    ),
    Case(
        "answers and ratings",
        "answers and ratings",
        [{"prompt_id": "p", "prompt": "Why?", "all_generated_responses": ["No.", "So."], "all_rm_scores": [0.1, 0.2]}]
        * 3,
        [("Why?", "So.", "No.", (0.2, 0.1))] * 3,
    ),
    Case(
        "answers and ratings",
        "text",
        [
            {
                "prompt": "Why?",
                "all_generated_responses": ["C", "D"],
                "all_rm_scores": [1, 2],
                "chosen": "A",
                "rejected": "B",
            }
        ]
        * 3,
        [("Why?", "A", "B", None)] * 3,
    ),
    Case(
        "answers and ratings",
        "answers and ratings",
        [
            {
                "prompt": "Why?",
                "all_generated_responses": ["C", "D"],
                "all_rm_scores": [1, 2],
                "chosen": "A",
                "rejected": "B",
            }
        ]
        * 3,
        [("Why?", "D", "C", (2.0, 1.0))] * 3,
        {"answers": "all_generated_responses"},
    ),
    Case(
        "answers and ratings",
        "answers and ratings",
        [{"instruction": "Why?", "generations": ["No.", "So."], "ratings": [2, 5], "rationales": ["a", "b"]}] * 3,
        [("Why?", "So.", "No.", (5.0, 2.0))] * 3,
    ),
    Case(
        "answers and ratings",
        "answers and ratings",
        [{"instruction": "Why?", "generations": ["No.", "So."], "order": ["rejected", "chosen"]}] * 3,
        [("Why?", "So.", "No.", (1.0, 0.0))] * 3,
        {"rating": "order"},
    ),
    Case(
        "answers and ranks",
        "answers and ranks",
        [
            {
                "input": "Hello?",
                "candidates": ["fine", "good", "bad"],
                "ranks": [2, 1, 3],
                "ranked_candidates": ["good", "fine", "bad"],
            }
        ]
        * 3,
        [("Hello?", "good", "bad", (-1.0, -3.0))] * 3,
    ),
    Case(
        "answers and ranks",
        "answers and ranks",
        [{"prompt": "Why?", "candidates_completions": ["So.", "No."], "ranks": [2, 1], "rank_str": "B>A"}] * 3,
        [("Why?", "No.", "So.", (-1.0, -2.0))] * 3,
    ),
    Case(
        "better and worse",
        "better and worse",
        [
            {"instruction": "Explain.", "input": "Why?", "output": ["So.", "No."]},
            {"instruction": "How?", "input": "", "output": ["By car.", "By bus."]},
            {"instruction": "Who?", "input": "", "output": ["Ann.", "Bob."]},
        ],
        [
            ("Explain.\n\nWhy?", "So.", "No.", None),
            ("How?", "By car.", "By bus.", None),
            ("Who?", "Ann.", "Bob.", None),
        ],
    ),
    Case(
        "best first",
        "best first",
        [{"prompt": "Why?", "ranked": ["So.", "Well.", "No."]}] * 3,
        [("Why?", "So.", "No.", None)] * 3,
        {"best_first": "ranked"},
    ),
    Case(
        "several chosen or rejected",
        "lists of chosen and rejected",
        [
            {"prompt": "Why?", "chosen": "So.", "rejected": ["No.", "Never."]},
            {"prompt": "How?", "chosen": ["By car.", "By bus."], "rejected": ["By foot."]},
            {"prompt": "Who?", "chosen": ["Ann."], "rejected": "Bob."},
        ],
        [
            ("Why?", "So.", "No.", None),
            ("Why?", "So.", "Never.", None),
            ("How?", "By car.", "By foot.", None),
            ("How?", "By bus.", "By foot.", None),
            ("Who?", "Ann.", "Bob.", None),
        ],
    ),
    Case(
        "summarize_from_feedback",
        "summaries and choice",
        [
            summaries("I lost my dog.", 1, "A cat.", "A dog."),
            summaries("I moved.", 0, "Moving.", "Staying."),
            {**summaries("", 0, "News.", "Olds."), "info": {"post": None, "article": "It rained."}},
        ],
        [
            ("I lost my dog.", "A dog.", "A cat.", None),
            ("I moved.", "Moving.", "Staying.", None),
            ("It rained.", "News.", "Olds.", None),
        ],
    ),
    Case(
        "answers and choice",
        "answers and choice",
        [
            {"prompt": "Why?", "responses": ["So.", "No."], "choice": 0},
            {"prompt": "How?", "responses": ["By car.", "By bus.", "By foot."], "choice": 2},
            {"prompt": "Who?", "responses": ["Ann.", "Bob."], "choice": 1},
        ],
        [
            ("Why?", "So.", "No.", None),
            ("How?", "By foot.", "By car.", None),
            ("Who?", "Bob.", "Ann.", None),
        ],
    ),
    Case(
        "OpenAssistant trees",
        "tree",
        [
            tree(
                "Why?",
                reply(
                    "So.",
                    "assistant",
                    1,
                    reply("And?", "prompter", 0, reply("X.", "assistant", 0), reply("Y.", "assistant", 1)),
                ),
                reply("No.", "assistant", 2),
                reply("Well.", "assistant", 0, reply("Oh.", "prompter", None, reply("Z.", "assistant", None))),
            ),
            tree(
                "How?", reply("Rude.", "assistant", 0, deleted=True), *[reply(f"{n}.", "assistant", n) for n in (2, 1)]
            ),
            tree("Who?", reply("Ann.", "assistant", 1), reply("Bob.", "assistant", 0), reply("?", "assistant", None)),
        ],
        [
            ("Why?", "Well.", "No.", (0.0, -2.0)),
            ([user("Why?"), assistant("So."), user("And?")], "X.", "Y.", (0.0, -1.0)),
            ("How?", "1.", "2.", (-1.0, -2.0)),
            ("Who?", "Bob.", "Ann.", (0.0, -1.0)),
        ],
    ),
    Case(
        "Chatbot Arena",
        "two conversations",
        [
            arena([user("Why?"), assistant("So.")], [user("Why?"), assistant("No.")], "model_a"),
            arena([user("How?"), assistant("By car.")], [user("How?"), assistant("By bus.")], "model_b"),
            arena([*TURNS, assistant("So.")], [*TURNS, assistant("No.")], "model_b"),
            arena([*TURNS, assistant("So.")], [*OTHER_TURNS, assistant("No.")], "model_a"),
        ],
        [
            ("Why?", "So.", "No.", None),
            ("How?", "By bus.", "By car.", None),
            (TURNS, "No.", "So.", None),
            ("Hi", [*TURNS[1:], assistant("So.")], [*OTHER_TURNS[1:], assistant("No.")], None),
        ],
    ),
    Case(
        "LMSYS arena",
        "parallel lists, scores",
        [
            arena_lists(["Why?"], ["So."], ["No."], 1, 0, 0),
            arena_lists(["Hi", "Why?"], ["Hello", "So."], ["Hello", "No."], 0, 1, 0),
            arena_lists(["How?"], ["By car."], ["By bus."], 0, 1, 0),
            arena_lists(["Hi", "Why?"], ["Hello", "So."], ["Hi!", "No."], 1, 0, 0),
        ],
        [
            ("Why?", "So.", "No.", None),
            (TURNS, "No.", "So.", None),
            ("How?", "By bus.", "By car.", None),
            ("Hi", [*TURNS[1:], assistant("So.")], [*OTHER_TURNS[1:], assistant("No.")], None),
        ],
    ),
]
