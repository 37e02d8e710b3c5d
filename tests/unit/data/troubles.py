"""Kinds of trouble with preference data, one entry each: none is trained on without a finding or a refusal that names
its cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data_samples import assistant, system, user
from tiny_tokenizer import CHATML, DEFAULT_SYSTEM, LLAMA3, NO_END, STRICT, THINKING

from prefold.data.shapes import Kind

REFUSED = "refused: "


@dataclass(frozen=True)
class Trouble:
    """`expected`: the kind of a finding, or `REFUSED` and a part of the message. Rows that are strings are lines of the
    file."""

    name: str
    rows: Sequence[dict[str, Any] | str]
    expected: str
    kind: Kind = "pairs"
    template: str | None = CHATML
    source: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    held_out: Sequence[dict[str, Any]] = ()


def pair(prompt: Any = "Why?", chosen: Any = "So.", rejected: Any = "No.", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def turns(chosen: Any, prompt: Any = None, **more: Any) -> dict[str, Any]:
    """A pair of messages."""
    chosen = chosen if isinstance(chosen, list) else [chosen]
    return pair([user("Why?")] if prompt is None else prompt, chosen, [assistant("No.")], **more)


def voted(*votes: Any, column: str = "preference") -> list[dict[str, Any]]:
    return [
        {"prompt": f"{number}?", "response1": "A.", "response2": "B.", column: vote}
        for number, vote in enumerate(votes)
    ]


def among(*rows: dict[str, Any] | str) -> list[dict[str, Any] | str]:
    """Rows among others of their kind that nothing is wrong with."""
    like = next((row for row in rows if isinstance(row, dict) and isinstance(row.get("chosen"), list)), None)
    good = pair("Who?", "You.", "Me.") if like is None else turns(assistant("You."), [user("Who?")])
    return [good, *rows, {**good, "prompt": "How?" if like is None else [user("How?")]}]


PLAIN = CHATML.replace(
    "{% if loop.first and message.role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}", ""
)
THOUGHTFUL = PLAIN.replace(
    "{{ message.content }}",
    "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}",
)
MUTE = PLAIN.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "")
LAST_TURN_DIFFERS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if loop.last and message.role == 'user' %}Answer this: {% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %B %Y') }}.<|im_end|>\n" + PLAIN
FORGETS_THOUGHTS = PLAIN.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
WITHOUT_TOOLS = PLAIN.replace(
    "{% for message in messages %}", "{% for message in messages if message.role != 'tool' %}"
)
TWO_BOS = "{{ bos_token }}{{ bos_token }}" + LLAMA3.replace("{{ bos_token }}", "")
CALL = {"type": "function", "function": {"name": "get_time", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen"
ALPACA = "### Instruction:\nWhy?\n\n### Response:\n"
TALK = "\n\nHuman: Why?\n\nAssistant:"

DECIDING = [
    Trouble("negative votes in a column that is known", voted(-2, -1, 1, 2, 2, -2), f"{REFUSED}preference"),
    Trouble(
        "negative votes in a column that is named",
        voted(-2, -1, 1, 2, column="strength"),
        f"{REFUSED}strength",
        source={"columns": {"vote": "strength"}},
    ),
    Trouble("votes that count from 0", voted(*[0, 1] * 6), f"{REFUSED}preference"),
    Trouble("a scale of five", voted(1, 2, 3, 4, 5), f"{REFUSED}preference"),
    Trouble("words that name no answer", voted("left", "right", "left", column="winner"), f"{REFUSED}winner"),
    Trouble(
        "a vote that `values` does not name",
        voted("L", "R", "X", column="winner"),
        "bad_label",
        source={"columns": {"vote": "winner"}, "values": {"first": "L", "second": "R"}},
    ),
    Trouble("ties", voted(1, 2, 0, 1), "tie"),
    Trouble("null as a vote", voted(1, 2, None, 1), "null_field"),
    Trouble(
        "annotators of two minds",
        [
            {"prompt": f"{number}?", "output_1": "A.", "output_2": "B.", "annotator1": 1, "annotator2": other}
            for number, other in enumerate((1, 2))
        ],
        "tie",
    ),
    Trouble(
        "labels that are stars",
        [{"prompt": "Why?", "completion": f"{stars}.", "label": stars} for stars in (1, 2, 3, 4, 5)],
        f"{REFUSED}label",
        kind="unpaired",
    ),
    Trouble(
        "a label that is neither",
        [{"prompt": "Why?", "completion": f"{label}.", "label": label} for label in (True, False, "maybe")],
        "bad_label",
        kind="unpaired",
    ),
    Trouble(
        "answers of one label",
        [{"prompt": f"{number}?", "completion": "So.", "label": True} for number in range(3)],
        "one_label",
        kind="unpaired",
    ),
    Trouble("ratings against the label", among(pair(chosen_score=1, rejected_score=7)), "flipped_rating"),
    Trouble("ratings that say nothing", among(pair(chosen_score=5, rejected_score=5)), "tied_rating"),
    Trouble("both ways round", [pair(), pair("Why?", "No.", "So.")], "contradiction"),
]
MESSAGES = [
    Trouble(
        "reasoning that the template does not read",
        [turns(assistant("So.") | {"reasoning_content": "Hm."})],
        "unread_field",
    ),
    Trouble(
        "thinking that the template does not read", [turns(assistant("So.") | {"thinking": "Hm."})], "unread_field"
    ),
    Trouble(
        "a name that the template does not read",
        [turns(assistant("So."), [user("Why?") | {"name": "Ann"}])],
        "unread_field",
    ),
    Trouble("a field of any name", [turns(assistant("So.") | {"mood": "glad"})], "unread_field"),
    Trouble("tools that the template does not read", [turns(assistant("So."), tools=[TOOL])], "unread_field"),
    Trouble(
        "a setting that the template does not read",
        [turns(assistant("So."), chat_template_kwargs={"enable_thinking": False})],
        "unread_field",
    ),
    Trouble(
        "a setting that is not for a row",
        among(turns(assistant("So."), chat_template_kwargs={"add_generation_prompt": True})),
        "bad_message",
    ),
    Trouble(
        "a tool call that the template does not write",
        among(turns([assistant("") | {"tool_calls": [CALL]}, assistant("So.")])),
        "template_refused",
    ),
    Trouble(
        "a tool's words that the template does not write",
        among(
            turns(assistant("So."), [user("Why?"), assistant("Let me look."), {"role": "tool", "content": "It is 4."}])
        ),
        "template_refused",
        template=WITHOUT_TOOLS,
    ),
    Trouble(
        "thoughts that the template forgets",
        [turns(assistant("<think>Hm.</think>So."))],
        "text_dropped",
        template=FORGETS_THOUGHTS,
    ),
    Trouble(
        "an image among the parts of a text",
        among(turns(assistant("So."), [user("Why?") | {"content": [{"type": "image", "url": "a.png"}]}])),
        "media",
    ),
    Trouble("a column of images", among(pair(images=["a.png"])), "media"),
    Trouble(
        "a role that nobody knows",
        among(turns(assistant("So."), [{"role": "narrator", "content": "Why?"}])),
        "bad_message",
    ),
    Trouble("an answer of the user", among(turns([assistant("So."), user("Who?")])), "bad_message"),
    Trouble(
        "a prompt that ends with an answer",
        among(turns(assistant("So."), [user("Why?"), assistant("Hm.")])),
        "bad_message",
    ),
    Trouble(
        "two system texts",
        among(turns(assistant("So."), [system("Be kind."), user("Why?")])),
        "bad_message",
        settings={"system": "Be brief."},
    ),
    Trouble(
        "lists as text, one cut off",
        [
            *[
                pair(
                    chosen='[{"role": "assistant", "content": "So."}]',
                    rejected='[{"role": "assistant", "content": "No."}]',
                )
            ]
            * 2,
            pair("Who?", '[{"role": "assistant", "cont', '[{"role": "assistant", "content": "No."}]'),
        ],
        "refused: text that",
    ),
    Trouble(
        "a prompt that the assistant ends",
        [turns(assistant("So."), [user("Why?"), assistant("Well,")])],
        f"{REFUSED}messages that ends with one of the role `assistant`",
    ),
    Trouble("tools that are names", among(turns(assistant("So."), tools=["get_time"])), "unread_column"),
    Trouble("tools that cannot be read", among(turns(assistant("So."), tools="[{oops")), "unread_column"),
    Trouble("settings that are a word", among(turns(assistant("So."), chat_template_kwargs="off")), "unread_column"),
    Trouble(
        "half a history",
        [
            {"instruction": "And?", "input": "", "chosen": "A.", "rejected": "B.", "history": history}
            for history in ([["Hi.", "Hello."]], [["Hi."]])
        ],
        "bad_message",
    ),
]
TEMPLATES = [
    Trouble("a template that writes an empty thought", among(pair()), "empty_thought", template=THOUGHTFUL),
    Trouble("a template that ignores what it is asked", among(pair()), "header_trained", template=MUTE),
    Trouble(
        "a last turn that is written otherwise", [pair()], f"{REFUSED}template_refused", template=LAST_TURN_DIFFERS
    ),
    Trouble("a date that moves", [pair()], "date_moves", template=DATED),
    Trouble(
        "a template that takes no system text", among(pair(system="Be kind.")), "template_refused", template=STRICT
    ),
    Trouble("a template without an end", [pair()], "no_end_token", template=NO_END),
    Trouble("a template with two beginnings", [pair()], "double_bos", template=TWO_BOS),
    Trouble("a template that opens a thought", [pair()], "prompt_not_prefix", template=THINKING),
    Trouble("no template", [pair()], f"{REFUSED}no chat template", template=None),
    Trouble("bare text beside a template", [pair()], "template_unused", settings={"template": "none"}),
    Trouble("turns as bare text", among(pair(system="Be kind.")), "template_refused", settings={"template": "none"}),
    Trouble("an end token of its own", [pair(chosen="So.<|im_end|>")], "double_end_token"),
]
RESIDUE = [
    Trouble("alpaca's headers", [pair(ALPACA)], "template_residue"),
    Trouble("alpaca's headers in an answer", [pair(chosen=f"So.\n\n{ALPACA}")], "template_residue"),
    Trouble("Llama 2's marks", [pair("[INST] Why? [/INST]")], "template_residue"),
    Trouble("Vicuna's speakers", [pair("USER: Why? ASSISTANT:")], "template_residue"),
    Trouble("a transcript in a text", [pair(f"Go on.{TALK}")], "template_residue"),
    Trouble("an answer that goes on as a transcript", [pair(chosen="So.\n\nHuman: Who?")], "template_residue"),
    Trouble("ChatML in an answer", [pair(chosen="So.<|im_end|>\n<|im_start|>user\nWho?")], "template_residue"),
    Trouble("ChatML in a message", [turns(assistant("So."), [user("<|im_start|>user\nWhy?")])], "template_residue"),
    Trouble("another model's end", [pair(chosen="So.</s>")], "template_residue"),
    Trouble("an image that is not there", [pair("<image>\nWhat is it?")], "media_placeholder"),
    Trouble("HTML's escapes", [pair("Is a &lt; b &amp;&amp; b &lt; c?")], "escaped_text"),
    Trouble("line ends as two characters", [pair(chosen="First.\\nSecond.\\nThird.")], "escaped_text"),
    Trouble("UTF-8 that was read as Latin-1", [pair(chosen="It\u00e2\u20ac\u2122s so.")], "wrong_decoding"),
    Trouble("a character that was lost", [pair(chosen="caf\ufffd")], "control_character"),
    Trouble(
        "a system text, twice",
        [turns(assistant("So."), [system("Be very kind.")] * 2 + [user("Why?")])],
        "system_twice",
    ),
    Trouble("a system text in the question", [pair("Be very kind. Why?", system="Be very kind.")], "system_twice"),
    Trouble("the template's system text in the question", [pair(f"{DEFAULT_SYSTEM}\n\nWhy?")], "system_twice"),
    Trouble(
        "a prompt in its answers",
        [pair("Why is it so at all?", "Why is it so at all? So.", "No."), pair("Who?")],
        "prompt_in_answer",
    ),
]
ROWS = [
    Trouble("a line that is no JSON", among(pair(), '{"prompt": '), "broken_row"),
    Trouble("a line that is no object", among(pair(), "[1]"), "broken_row"),
    Trouble("a field that is missing", among({"prompt": "Why?", "chosen": "So."}), "missing_field"),
    Trouble("a field that is null", among(pair(rejected=None)), "null_field"),
    Trouble("an empty answer", among(pair(rejected=" ")), "empty_text"),
    Trouble("a number as an answer", among(pair(rejected=42)), "not_text"),
    Trouble("half a character", among('{"prompt": "Why?", "chosen": "\\ud83d", "rejected": "No."}'), "not_text"),
    Trouble("the same answers", among(pair(rejected="So.")), "identical"),
    Trouble("the same answers but for white space", among(pair(rejected=" So.\n")), "identical"),
    Trouble(
        "answers to two prompts",
        [
            {"chosen": f"{TALK} A.", "rejected": f"{TALK} B."},
            {"chosen": f"{TALK} A.", "rejected": "\n\nHuman: Who?\n\nAssistant: B."},
        ],
        "prompts_differ",
    ),
    Trouble("the same pair again", among(pair(), pair()), "duplicate"),
    Trouble("too long", among(pair(chosen="So. " * 99)), "overlong", settings={"max_length": 128}),
    Trouble(
        "a prompt that is cut",
        [pair("Why? " * 40)],
        "prompt_truncated",
        settings={"max_length": 128, "overlong": "truncate_prompt"},
    ),
    Trouble(
        "a condition that fails",
        [pair(score="7"), pair("Who?", score=7)],
        "where_failed",
        source={"where": "score > 5"},
    ),
    Trouble("an opening that tells", [pair(f"{n}?", f"Sure! {n}", f"{n} no") for n in range(60)], "telling_opening"),
    Trouble(
        "answers that are longer", [pair(f"{n}?", f"It is {n} and more.", f"{n}.") for n in range(30)], "length_bias"
    ),
    Trouble("a prompt on both sides", [pair()], "prompt_in_both_splits", held_out=[pair(chosen="Yes.")]),
    Trouble("nothing held out", [pair()], "small_held_out"),
    Trouble("repeats", among(pair(), pair()), "repeated", settings={"duplicates": "drop_exact"}),
]
LAYOUTS = [
    Trouble(
        "columns that nobody knows", [{"frage": "Why?", "gut": "So.", "schlecht": "No."}], f"{REFUSED}no known shape"
    ),
    Trouble(
        "columns that can be read in two ways",
        [pair(question="Who?")] * 3,
        f"{REFUSED}more than one way",
    ),
    Trouble("a role that there is not", [pair()], f"{REFUSED}no role", source={"columns": {"prmpt": "prompt"}}),
    Trouble(
        "a column that there is not", [pair()], f"{REFUSED}no such column", source={"columns": {"prompt": "promt"}}
    ),
    Trouble(
        "a path that leads nowhere",
        [pair(input={"text": "Why?"})],
        f"{REFUSED}`input` has no `txt`",
        source={"columns": {"prompt": "input.txt"}},
    ),
    Trouble("pairs for a method of prompts alone", [{"a": 1}], f"{REFUSED}no known shape", kind="prompts"),
    Trouble("prompts for a method of pairs", [{"prompt": "Why?", "answer": "42"}], f"{REFUSED}no known shape"),
    Trouble(
        "answers of which nothing says which is better",
        [{"prompt": "Why?", "completions": [{"response": "A."}, {"response": "B."}]}] * 3,
        f"{REFUSED}completions",
    ),
    Trouble(
        "a ranking of equals",
        [
            {"prompt": "Why?", "completions": [{"response": "A.", "score": 1}, {"response": "B.", "score": score}]}
            for score in (2, 1)
        ],
        "tie",
    ),
    Trouble(
        "a ranking of near equals",
        [
            {"prompt": "Why?", "completions": [{"response": "A.", "score": 1}, {"response": "B.", "score": score}]}
            for score in (5, 2)
        ],
        "small_margin",
        source={"min_margin": 2.0},
    ),
    Trouble("a rule for a ranking where there is none", [pair()], f"{REFUSED}pairs_from", source={"pairs_from": "all"}),
]
TROUBLES = [*DECIDING, *MESSAGES, *TEMPLATES, *RESIDUE, *ROWS, *LAYOUTS]
