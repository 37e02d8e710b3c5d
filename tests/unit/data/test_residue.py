"""What other formats leave in texts is seen and named; ordinary text that looks like it is not."""

from __future__ import annotations

import pytest
from data_samples import assistant, pair, system, user
from tiny_tokenizer import CHATML, DEFAULT_SYSTEM, LLAMA3, STRICT, make_tokenizer

from prefold.data import findings
from prefold.data.preference import Preference, RowId
from prefold.data.residue import residue_of
from prefold.recipe import Data, Source

ALPACA = "Below is an instruction that describes a task. Do it.\n\n### Instruction:\nWhy?\n\n### Response:\n"
VICUNA = "A chat between a curious user and an assistant. USER: Why? ASSISTANT:"
# name -> prompt, answer, the kind of finding and the markers
SEEN = {
    "ChatML": ("<|im_start|>user\nWhy?<|im_end|>", "So.", "template_residue", ["<|im_start|>", "<|im_end|>"]),
    "Llama 2": ("<<SYS>>Help.<</SYS>> [INST] Why? [/INST]", "So.", "template_residue", 4),
    "Llama 3": ("Why?", "So.<|eot_id|>", "template_residue", ["<|eot_id|>"]),
    "Llama 3 header": ("<|start_header_id|>user<|end_header_id|>\n\nWhy?", "So.", "template_residue", 2),
    "Llama 4": ("<|header_start|>user<|header_end|>\n\nWhy?<|eot|>", "So.", "template_residue", 3),
    "Gemma": ("<start_of_turn>user\nWhy?<end_of_turn>", "So.", "template_residue", 2),
    "Phi and Zephyr": ("<|user|>\nWhy?\n<|assistant|>\n", "So.", "template_residue", ["<|user|>", "<|assistant|>"]),
    "DeepSeek": ("<\uff5cUser\uff5c>Why?<\uff5cAssistant\uff5c>", "So.", "template_residue", 2),
    "DeepSeek's end": ("Why?", "So.<\uff5cend\u2581of\u2581sentence\uff5c>", "template_residue", 1),
    "gpt-oss": ("Why?", "<|channel|>analysis<|message|>So.", "template_residue", ["<|channel|>", "<|message|>"]),
    "Cohere": ("<|START_OF_TURN_TOKEN|>Why?", "So.", "template_residue", 1),
    "GLM": ("[gMASK]Why?", "So.", "template_residue", ["[gMASK]"]),
    "Mistral's tools": ("[AVAILABLE_TOOLS] [] [/AVAILABLE_TOOLS]Why?", "So.", "template_residue", 2),
    "end of text": ("Why?", "So.<|endoftext|>", "template_residue", ["<|endoftext|>"]),
    "</s>": ("Why?", "So.</s>", "template_residue", ["</s>"]),
    "alpaca": (ALPACA, "So.", "template_residue", 3),
    "alpaca without its first line": ("### Instruction:\nWhy?\n\n### Response:\n", "So.", "template_residue", 2),
    "alpaca's last line": ("Why?\n\n### Response:", "So.", "template_residue", ["### Response:"]),
    "alpaca in an answer": ("Why?", "So.\n\n### Instruction:\nWho?\n\n### Response:\nYou.", "template_residue", 2),
    "guanaco": ("### Human: Why?\n### Assistant:", "So.", "template_residue", ["### Human:", "### Assistant:"]),
    "guanaco over two texts": ("### Human: Why?", "### Assistant: So.", "template_residue", 2),
    "vicuna": (VICUNA, "So.", "template_residue", ["A chat between a curious user", "USER:", "ASSISTANT:"]),
    "vicuna alone": ("USER: Why? ASSISTANT:", "So.", "template_residue", ["USER:", "ASSISTANT:"]),
    "transcript": ("Help me.\n\nHuman: Why?\n\nAssistant:", "So.", "template_residue", ["Human:", "Assistant:"]),
    "an answer that goes on": ("Why?", "So.\n\nHuman: Who?", "template_residue", ["Human:"]),
    "image": ("<image>\nWhat is this?", "A cat.", "media_placeholder", ["<image>"]),
    "image at the end": ("What is this? <image>", "A cat.", "media_placeholder", ["<image>"]),
    "video": ("<video>What is this?", "A cat.", "media_placeholder", ["<video>"]),
    "HTML": ("Is 1 &lt; 2 &amp;&amp; 2 &gt; 1?", "Yes.", "escaped_text", ["&lt;", "&amp;", "&gt;"]),
    "HTML in a word": ("Why?", "I don&#39;t know.", "escaped_text", ["&#39;"]),
    "HTML quotes": ("Who said &quot;so&quot;?", "He.", "escaped_text", ["&quot;"]),
    "line ends": ("Why?", "First.\\nSecond.\\n\\n- Third.", "escaped_text", ["\\n"]),
    "Latin-1": ("Why?", "It\u00e2\u20ac\u2122s so.", "wrong_decoding", ["\u00e2\u20ac\u2122"]),
    "Latin-1 letters": ("Caf\u00c3\u00a9?", "So.", "wrong_decoding", ["\u00c3\u00a9"]),
    "thoughts": ("Why?", "So.<|return|>", "template_residue", ["<|return|>"]),
}
CODE = "def f(text):\n    print(f\"{text}\\n\")\n    return a < b and c > d, x[0], '</div>'\n"
ORDINARY = {
    "a heading": ("Why?", "### Response time\n\nIt is short.\n\n### Response: what to do\n\nNothing."),
    "a heading with a colon": ("Why?", "# Ticket\n\n### Response:\n\nWe are sorry."),
    "headings": ("Why?", "### Input:\n\n1 2\n\n### Output:\n\n3"),
    "code": ("What does it print?", CODE),
    "one line of code": ('What is print("Hello\\nWorld\\n")?', "Two lines: `Hello\\nWorld\\n`."),
    "a path": ("Why?", "Look at C:\\new\\notes and C:\\Users\\nora."),
    "LaTeX": ("Why?", "Since $\\nabla f \\neq 0$, the $\\nu$ and \\nRightarrow b."),
    "HTML that is spoken of": ("How do I write < in HTML?", "Write &lt; for it, and &amp; for &."),
    "HTML once": ("How is it written?", "As &lt; in HTML."),
    "HTML in code": ("How is it written?", "As `&lt;` and `&gt;`."),
    "HTML that is code": ("Why?", "<p>Tom &amp; Jerry &copy; &lt;</p>"),
    "an element": ("Why?", "<video>\n<source src='a.mp4'>\n</video>"),
    "an element in the prompt": ("What is wrong with\n<video>\n</video>", "Nothing."),
    "an element that is named": ("What does <image> do in SVG?", "It shows a picture."),
    "lists": ("Why?", "[1] So. [INFO] x [/b]"),
    "struck out": ("Why?", "<s>No.</s> So."),
    "speakers": ("Why?", "USER: root\nHOST: here"),
    "a cast": ("Who plays?", "Cast\n\nAssistant: Mr Smith"),
    "operators": ("Why?", "x |> f <| y; a || b; <|> is choice"),
    "languages": ("Why?", "\u00c2ge, \u00c3o, \u00e2me, na\u00efve, \u00d1"),
    "a tag": ("Why?", "<think>So.</think> <b>x</b>"),
}


@pytest.mark.parametrize("name", SEEN)
def test_residue_is_seen_and_named(name: str) -> None:
    prompt, answer, kind, markers = SEEN[name]
    seen = residue_of([prompt], [answer])
    assert list(seen) == [kind]
    assert len(seen[kind]) == markers if isinstance(markers, int) else seen[kind] == markers


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_text_is_no_residue(name: str) -> None:
    prompt, answer = ORDINARY[name]
    assert residue_of([prompt], [answer]) == {}


def kinds(record: Preference, template: str = "chat", by_template: tuple[str, str] = ("", "")) -> list[str]:
    return [problem.kind for problem in findings.oddities_of(record, template, by_template)]


def test_a_format_that_bare_text_is_written_in_is_none_of_another() -> None:
    assert kinds(pair(ALPACA)) == ["template_residue"]
    assert kinds(pair(ALPACA), "none") == []
    assert kinds(pair(ALPACA, chosen="So.\n\n### Instruction:\nX\n\n### Response:\nY"), "none") == ["template_residue"]


def test_fields_beside_the_content_are_looked_at() -> None:
    thinking = assistant("So.") | {"reasoning_content": "Hm.<|im_end|>"}
    record = Preference((user("Why?"),), (thinking,), (assistant("No."),), RowId("pairs.jsonl", 1))
    assert kinds(record) == ["template_residue"]


def test_the_message_names_the_marker_that_most_rows_have() -> None:
    rows = [pair("[INST] Why? [/INST]", row=1), pair("[INST] Who?", row=2), pair("Why?", "So.</s>", row=3)]
    problems = [problem for record in rows for problem in findings.oddities_of(record)]
    [finding] = findings.about_problems(problems, Data(train=[Source(path="pairs.jsonl")]))
    assert finding.message == "3 rows with template markers in the text: `[INST]` in 2"
    assert finding.count == 3


SYSTEM = "Answer briefly."


@pytest.mark.parametrize(
    ("prompt", "twice"),
    [
        ([system(SYSTEM), user("Why?")], False),
        ([system(SYSTEM), system(SYSTEM), user("Why?")], True),
        ([system(SYSTEM), user(f"{SYSTEM}\n\nWhy?")], True),
        ([system("Hi"), user("Hi there")], False),
        ([user(f"{DEFAULT_SYSTEM} Why?")], True),
        ([system(DEFAULT_SYSTEM), user("Why?")], False),
        ([user("Why?")], False),
    ],
)
def test_a_system_text_that_is_there_twice(prompt: list[dict[str, str]], twice: bool) -> None:
    record = Preference(tuple(prompt), (assistant("So."),), (assistant("No."),), RowId("pairs.jsonl", 1))
    by_template = findings.system_texts_of(make_tokenizer(CHATML, bos="<|im_start|>"))
    assert kinds(record, by_template=by_template) == ["system_twice"] * twice


ALWAYS = (
    "<|im_start|>system\nThe date is unknown.\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|im_end|>\n"
    "{% for message in messages if message.role != 'system' %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
)


def test_what_a_template_writes_by_itself() -> None:
    assert findings.system_texts_of(make_tokenizer(CHATML, bos="<|im_start|>"))[1] == DEFAULT_SYSTEM
    assert findings.system_texts_of(make_tokenizer(LLAMA3, bos="<|begin|>"))[1] == ""
    assert findings.system_texts_of(make_tokenizer(STRICT, bos="<|begin|>")) == ("", "")
    by_template = findings.system_texts_of(make_tokenizer(ALWAYS, bos="<|im_start|>"))
    assert by_template == ("<|im_start|>system\nThe date is unknown.\n\n", "")
    dated = Preference(
        (system("The date is unknown."), user("Why?")), (assistant("A"),), (assistant("B"),), RowId("pairs.jsonl", 1)
    )
    assert kinds(dated, by_template=by_template) == ["system_twice"]
