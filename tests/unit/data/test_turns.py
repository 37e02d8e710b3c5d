"""Everything that a message carries reaches the template or is named; tool turns; the scored tokens of turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from data_samples import assistant, pair, system, to_record, user
from tiny_tokenizer import CHATML, NO_END, THINKING, make_tokenizer
from transformers import PreTrainedTokenizerFast

from prefold.data import findings
from prefold.data.chat import Tokenized, render, tokenize_all
from prefold.data.examples import Example, Examples
from prefold.data.formats import RawRow
from prefold.data.mixture import Prepared, load_split
from prefold.data.preference import (
    Messages,
    Preference,
    Problem,
    Prompt,
    RowId,
    Unfit,
    Unpaired,
    messages,
    without_nulls,
)
from prefold.data.shapes import find_shape
from prefold.recipe import Data, Source

ORIGIN = RowId("pairs.jsonl", 1)
CALL = {"type": "function", "function": {"name": "get_time", "arguments": {"city": "Rome", "hours": 24}}}
TOOLS = [{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}]

# Thoughts, calls and results as Qwen writes them; the last turn without thoughts has an empty block.
AGENT = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{% if m.reasoning_content or loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{%- for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""
# In the way of Llama 4.
HEADERS = """\
{{ bos_token }}{% if tools %}<|start|>system<|end_header|>

{{ tools | tojson }}<|eot|>{% endif %}
{%- for m in messages %}<|start|>{{ 'ipython' if m.role == 'tool' else m.role }}<|end_header|>

{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}
{%- for call in m.tool_calls %}{"name": "{{ call.function.name }}", "parameters": {{ call.function.arguments|tojson }}}
{%- endfor %}<|eot|>{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant<|end_header|>

{% endif %}"""
# In the way of Mistral: an answer has no header, and its arguments may be text.
INST = """\
{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}[INST] {{ m.content }} [/INST]
{%- elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }} [/TOOL_RESULTS]
{%- elif m.tool_calls %}[TOOL_CALLS]
{%- for call in m.tool_calls %}{{ call.function.name }}[ARGS]{{ call.function.arguments }}{% endfor %}{{ eos_token }}
{%- elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}
{%- endif %}{% endfor %}"""
# The last turn ends with another token than earlier ones, and thoughts are dropped once something follows.
RETURNS = """\
{%- for m in messages %}<|start|>{{ m.role }}<|end_header|>{{ m.thinking if loop.last }}{{ m.content }}
{%- for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}
{{- '<|text_end|>' if loop.last and not add_generation_prompt else '<|eot|>' }}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant<|end_header|>{% endif %}"""


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(template, eos="<|eot|>", bos="<|begin|>")
    marks = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"]
    tokenizer.add_special_tokens({"extra_special_tokens": marks if template is INST else []})
    return tokenizer


def call(name: str = "get_time", **arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments or CALL["function"]["arguments"]}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


QUESTION: Messages = (user("What time is it?"),)
STEPS: Messages = (call(), result("seven"), call("get_zone", city="Rome"), result("CET"), assistant("It is seven."))


def read(record: Any, tokenizer: PreTrainedTokenizerFast, template: Any = "chat") -> Tokenized | Problem:
    [found] = tokenize_all([record], tokenizer, template)
    return found


def answered(
    answer: Messages,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Messages = QUESTION,
    **given: Any,
) -> Tokenized:
    found = read(Unpaired(tuple(prompt), tuple(answer), True, ORIGIN, given), tokenizer)
    assert isinstance(found, Tokenized), found
    return found


def scored(found: Tokenized, tokenizer: PreTrainedTokenizerFast, number: int = 0) -> list[str]:
    """The texts of a completion that are scored."""
    ids = found.tree.completions[number]
    context = found.tree.context[number] if found.tree.context else ()
    starts, stops = [0, *(stop for _, stop in context)], [*(start for start, _ in context), len(ids)]
    return [tokenizer.decode(list(ids[start:stop])) for start, stop in zip(starts, stops, strict=True)]


def as_template(messages: Any, tokenizer: PreTrainedTokenizerFast, **given: Any) -> list[int]:
    return tokenizer.apply_chat_template(list(messages), return_dict=False, **given)


# ---- tool turns and several turns ---------------------------------------------------------------------------------

SCORED = {
    AGENT: [
        '<tool_call>{"name": "get_time", "arguments": {"city": "Rome", "hours": 24}}</tool_call><|im_end|>\n',
        '<tool_call>{"name": "get_zone", "arguments": {"city": "Rome"}}</tool_call><|im_end|>\n',
        "<think></think>It is seven.<|im_end|>\n",
    ],
    HEADERS: [
        '{"name": "get_time", "parameters": {"city": "Rome", "hours": 24}}<|eot|>',
        '{"name": "get_zone", "parameters": {"city": "Rome"}}<|eot|>',
        "It is seven.<|eot|>",
    ],
    INST: [
        '[TOOL_CALLS]get_time[ARGS]{"city": "Rome", "hours": 24}<|eot|>',
        '[TOOL_CALLS]get_zone[ARGS]{"city": "Rome"}<|eot|>',
        " It is seven.<|eot|>",
    ],
    RETURNS: [
        '{"name": "get_time", "arguments": {"city": "Rome", "hours": 24}}<|eot|>',
        '{"name": "get_zone", "arguments": {"city": "Rome"}}<|eot|>',
        "It is seven.<|text_end|>",
    ],
}


@pytest.mark.parametrize("template", SCORED)
def test_the_assistants_turns_are_scored_and_what_tools_return_is_not(template: str) -> None:
    tokenizer = tokenizer_of(template)
    found = answered(STEPS, tokenizer, tools=TOOLS)
    assert scored(found, tokenizer) == SCORED[template]
    [spans] = found.tree.context
    between = [tokenizer.decode(list(found.tree.completions[0][start:stop])) for start, stop in spans]
    assert "seven" in between[0] and "CET" in between[1]


@pytest.mark.parametrize("template", [AGENT, HEADERS])
def test_the_ids_are_the_templates_own(template: str) -> None:
    tokenizer = tokenizer_of(template)
    prompt = (system("Be brief."), user("What time is it?"))
    tree = answered(STEPS, tokenizer, prompt, tools=TOOLS).tree
    assert list(tree.prompt + tree.completions[0]) == as_template([*prompt, *STEPS], tokenizer, tools=TOOLS)


def test_one_turn_has_no_context_and_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, calls = tokenizer_of(CHATML), []
    kept = tokenizer.apply_chat_template

    def counted(*args: Any, **settings: Any) -> Any:
        calls.append(settings["add_generation_prompt"])
        return kept(*args, **settings)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    found = read(pair(), tokenizer)
    assert isinstance(found, Tokenized) and found.tree.context == () and calls == [True, False, False]


def test_each_side_of_a_pair_has_its_own_context() -> None:
    tokenizer = tokenizer_of(AGENT)
    record = Preference((user("What time is it?"),), STEPS, (assistant("No idea."),), ORIGIN)
    found = read(record, tokenizer)
    assert isinstance(found, Tokenized) and len(found.tree.context[0]) == 2 and found.tree.context[1] == ()
    assert scored(found, tokenizer, 1) == ["<think></think>No idea.<|im_end|>\n"]


def test_thoughts_that_a_template_drops_behind_a_call_are_found_and_its_turns_too() -> None:
    tokenizer = tokenizer_of(RETURNS)
    found = answered(({**call(), "thinking": "Let me look."}, *STEPS[1:]), tokenizer)
    assert scored(found, tokenizer) == SCORED[RETURNS]
    assert found.oddities == ("text_dropped",) and "Let me look." in found.details["text_dropped"]


def test_users_within_an_answer_are_context_where_both_sides_have_the_same(chatml: PreTrainedTokenizerFast) -> None:
    def talk(*texts: str) -> list[Any]:
        return [(user, assistant)[number % 2](text) for number, text in enumerate(texts)]

    rows = [
        {"chosen": talk("Why?", "So.", "And?", "Thus."), "rejected": talk("Why?", "No.", "And?", "Never.")},
        {"chosen": talk("Why?", "So.", "And?", "Thus."), "rejected": talk("Why?", "No.", "But?", "Never.")},
    ]
    shape = find_shape([RawRow(ORIGIN, rows[0])], "pairs.jsonl")
    same, other = (to_record(RawRow(ORIGIN, row), shape) for row in rows)
    found = read(same, chatml)
    assert isinstance(found, Tokenized)
    assert [scored(found, chatml, side) for side in (0, 1)] == [
        ["So.<|im_end|>\n", "Thus.<|im_end|>\n"],
        ["No.<|im_end|>\n", "Never.<|im_end|>\n"],
    ]
    assert isinstance(other, Problem) and other.kind == "prompts_differ"


@pytest.mark.parametrize("template", SCORED)
@pytest.mark.parametrize("unweighted", [(0,), (1,), (2,), (0, 2), (0, 1)])
def test_turns_of_weight_0_are_read_and_not_scored(template: str, unweighted: tuple[int, ...]) -> None:
    numbers = [number for number, message in enumerate(STEPS) if message["role"] == "assistant"]
    steps = tuple(
        message | {"weight": 0} if n in [numbers[i] for i in unweighted] else message for n, message in enumerate(STEPS)
    )
    tokenizer = tokenizer_of(template)
    found = answered(steps, tokenizer, tools=TOOLS)
    texts = [text for text in scored(found, tokenizer) if text]
    assert texts == [text for number, text in enumerate(SCORED[template]) if number not in unweighted]
    assert found.tree.completions == answered(STEPS, tokenizer, tools=TOOLS).tree.completions
    assert "weight" not in found.details.get("unread_field", "")


@pytest.mark.parametrize(
    "field, weight, kept",
    [
        ({}, None, {}),
        ({"weight": 1}, None, {}),
        ({"train": True, "loss": None}, None, {}),
        ({"weight": 0}, 0, {"weight": 0}),
        ({"train": False}, 0, {"weight": 0}),
        ({"loss": False}, 0, {"weight": 0}),
        ({"weight": 1.0, "loss": False}, 0, {"weight": 0}),
    ],
)
def test_weights_have_three_names_and_two_values(field: dict[str, Any], weight: Any, kept: dict[str, Any]) -> None:
    assert turn({**assistant("A"), **field}) == assistant("A") | kept


def test_a_weight_on_what_others_say_changes_nothing_or_is_named() -> None:
    assert turn({**user("A"), "weight": 0}) == user("A")
    assert turn({**user("A"), "train": True}) == user("A") | {"train": True}


def test_an_answer_without_a_turn_to_train_on_is_refused() -> None:
    rows = [
        {"messages": [user("Why?"), {**assistant("So."), "weight": 0}], "label": True},
        {"messages": [user("Why?"), {**assistant("So."), "weight": 1}], "label": True},
    ]
    shape = find_shape([RawRow(ORIGIN, rows[0])], "pairs.jsonl")
    refused, read_row = (to_record(RawRow(ORIGIN, row), shape) for row in rows)
    assert isinstance(refused, Problem) and "no turn to train on" in refused.message
    assert isinstance(read_row, Unpaired) and read_row.completion == (assistant("So."),)


def test_turns_whose_tokens_cannot_be_known_are_refused() -> None:
    # Without end tokens, an earlier turn that is written otherwise has no known end.
    template = NO_END.replace(
        "{{ message.content }}", "{{ message.content }}{{ '!' if loop.last and message.role == 'assistant' }}"
    )
    found = read(
        Unpaired((user("A"),), (assistant("B"), user("C"), assistant("D")), True, ORIGIN), tokenizer_of(template)
    )
    assert isinstance(found, Problem) and "cannot be located" in found.message


@pytest.mark.parametrize(
    "template, words",
    [
        (CHATML, 'a tool call whole: "get_time" is not there'),
        (AGENT.replace("{{ call.function | tojson }}", "{{ call.function.name }}"), '"Rome" is not there'),
        (AGENT.replace("{{ m.content }}</tool_response>", "</tool_response>"), "what a tool returned"),
    ],
)
def test_what_a_template_cannot_write_is_refused(template: str, words: str) -> None:
    found = read(Unpaired((user("A"),), STEPS, True, ORIGIN), tokenizer_of(template))
    assert isinstance(found, Problem) and found.kind == "template_refused" and words in found.message


def test_arguments_are_text_where_the_template_wants_that() -> None:
    template = AGENT.replace("{{ call.function | tojson }}", "{{ call.function.name + call.function.arguments }}")
    tokenizer = tokenizer_of(template)
    assert (
        scored(answered(STEPS, tokenizer), tokenizer)[1]
        == '<tool_call>get_zone{"city": "Rome"}</tool_call><|im_end|>\n'
    )


# ---- what a message carries -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("known", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_reach_the_template_under_the_name_that_it_reads(name: str, known: str) -> None:
    tokenizer = tokenizer_of(AGENT.replace("reasoning_content", known))
    found = answered(({**assistant("It is seven."), name: "Look."},), tokenizer)
    assert scored(found, tokenizer) == ["<think>Look.</think>It is seven.<|im_end|>\n"] and found.oddities == ()


def test_pairs_that_differ_in_thoughts_alone_are_pairs() -> None:
    rows = [{**assistant("A."), "reasoning_content": thought} for thought in ("Let me think.", "Hm.")]
    row = RawRow(ORIGIN, {"prompt": "Q?", "chosen": rows[:1], "rejected": rows[1:]})
    record = to_record(row, find_shape([row], "pairs.jsonl"))
    found = read(record, tokenizer_of(AGENT))
    assert isinstance(found, Tokenized) and found.oddities == ()
    assert isinstance(read(record, tokenizer_of(CHATML)), Problem)


def test_fields_and_keywords_that_the_template_does_not_read_are_named(chatml: PreTrainedTokenizerFast) -> None:
    answer = {**assistant("So."), "reasoning": "Hm.", "mood": 1}
    found = answered((answer,), chatml, tools=TOOLS, enable_thinking=False)
    assert found.oddities == ("unread_field",)
    assert found.details["unread_field"] == "`reasoning`, `mood`, `tools`, `enable_thinking`"
    [bare] = tokenize_all([Unpaired((user("A"),), (answer,), True, ORIGIN)], chatml, "none")
    assert isinstance(bare, Tokenized) and bare.details["unread_field"] == "`reasoning`, `mood`"


def test_what_a_row_gives_its_template_is_used_and_makes_another_prompt() -> None:
    tokenizer = tokenizer_of(AGENT)
    with_tools, without = (
        answered((assistant("So."),), tokenizer, tools=TOOLS),
        answered((assistant("So."),), tokenizer),
    )
    assert "get_time" in tokenizer.decode(list(with_tools.tree.prompt)) and "unread_field" not in with_tools.details
    assert "get_time" not in tokenizer.decode(list(without.tree.prompt))
    assert tokenizer.decode(render([user("A")], tokenizer, given={"enable_thinking": False})).endswith(
        "<think></think>"
    )
    trees = [with_tools.tree, without.tree]
    records = [Unpaired((user("A"),), (assistant("B"),), True, ORIGIN, given) for given in ({"tools": TOOLS}, {})]
    examples = Examples.of(Example(record, tree) for record, tree in zip(records, trees, strict=True))
    assert len(set(examples.record_keys)) == 2


def test_answers_that_differ_only_in_what_a_tool_returned_are_the_same() -> None:
    answers = [(call(), {"role": "tool", "content": result}, assistant("So.")) for result in ("12:00", "13:00")]
    problem = read(Preference((user("A"),), answers[0], answers[1], ORIGIN), tokenizer_of(AGENT))
    assert isinstance(problem, Problem) and problem.kind == "identical" and "in between differs" in problem.message


def test_words_that_the_template_drops_are_found() -> None:
    drops = CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
    found = answered((assistant("<think>Hm, let me see.</think>So."),), tokenizer_of(drops))
    assert found.oddities == ("text_dropped",) and "let me see" in found.details["text_dropped"]
    moves = CHATML.replace("{{ message.content }}", "{{ message.content.replace('</think>', '\n</think>\n\n') }}")
    assert answered((assistant("<think>Hm.</think>So."),), tokenizer_of(moves)).oddities == ()
    silent = CHATML.replace(
        "<|im_start|>{{", "{% if message.role == 'system' %}{% continue %}{% endif %}<|im_start|>{{"
    )
    found = answered((assistant("So."),), tokenizer_of(silent), (system("Be brief."), user("A")))
    assert found.details["text_dropped"] == '`content` of the system, such as "Be brief."'


# ---- reading messages -------------------------------------------------------------------------------------------


def turn(item: dict[str, Any], writing: Any = "plain") -> Any:
    try:
        [message] = messages([item], "`prompt`", writing)
    except Unfit as unfit:
        return unfit.kind, unfit.message
    return message


@pytest.mark.parametrize(
    "role, names",
    [
        ("system", ["developer", "System"]),
        ("user", ["human", "Human", "prompter", "USER"]),
        ("assistant", ["gpt", "model", "bot", "chatgpt", "Assistant"]),
        ("tool", ["function", "observation", "ipython", "tool_response", "Tool"]),
    ],
)
def test_roles_have_many_names(role: str, names: list[str]) -> None:
    for name in names:
        assert turn({"role": name, "content": "A"}) == turn({"from": name, "value": "A"}, "ShareGPT")
        assert turn({"role": name, "content": "A"}) == {"role": role, "content": "A"}


WANTED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
BARE = CALL["function"]


@pytest.mark.parametrize(
    "item",
    [
        WANTED,
        {**WANTED, "content": None},
        {"role": "assistant", "tool_calls": [CALL]},
        {**WANTED, "tool_calls": [{"function": BARE}]},
        {**WANTED, "tool_calls": [BARE]},
        {**WANTED, "tool_calls": BARE},
        {**WANTED, "tool_calls": json.dumps([CALL])},
        {**WANTED, "tool_calls": [{**BARE, "arguments": json.dumps(BARE["arguments"])}]},
        {"role": "assistant", "content": None, "function_call": {**BARE, "arguments": json.dumps(BARE["arguments"])}},
        {"role": "function_call", "content": json.dumps(BARE)},
        {"role": "tool_call", "content": json.dumps([BARE])},
        {**WANTED, "name": None, "refusal": None, "reasoning_content": None},
    ],
)
def test_calls_are_written_in_many_ways(item: dict[str, Any]) -> None:
    assert turn(item) == WANTED


def test_a_call_keeps_its_id_and_fields_and_no_calls_are_none() -> None:
    assert turn({**WANTED, "tool_calls": [{"id": "c1", **CALL}]})["tool_calls"][0]["id"] == "c1"
    assert turn({"role": "tool", "content": "7", "tool_call_id": "c1", "name": "f"}) == {
        "role": "tool",
        "content": "7",
        "tool_call_id": "c1",
        "name": "f",
    }
    assert turn({"role": "tool", "content": ""}) == result("")
    assert turn({**assistant("A"), "tool_calls": []}) == turn({**assistant("A"), "tool_calls": None}) == assistant("A")
    assert turn({**WANTED, "tool_calls": [{"name": "f"}]})["tool_calls"][0]["function"]["arguments"] == {}
    nulls = {**BARE, "arguments": {"city": None}}
    assert turn({**WANTED, "tool_calls": [nulls]})["tool_calls"][0]["function"]["arguments"] == {"city": None}


@pytest.mark.parametrize(
    "item, kind, words",
    [
        ({**WANTED, "tool_calls": "call it"}, "bad_message", "calls a tool, but not as {name, arguments}"),
        ({**WANTED, "tool_calls": [{"function": {}}]}, "bad_message", "calls a tool"),
        ({"role": "function_call", "content": "get_time()"}, "bad_message", "calls a tool"),
        ({"role": "assistant", "content": None}, "null_field", "`content` is null"),
        ({"role": "assistant", "reasoning_content": "Hm."}, "bad_message", "has no `content`"),
        ({**assistant("A"), "reasoning": ["Hm."]}, "not_text", "`reasoning` is a list"),
        ({**assistant("A"), "reasoning": "\ud800"}, "not_text", "half a character"),
        ({**user("A"), "images": ["a.png"]}, "media", "has `images`"),
        (user("") | {"content": [{"type": "image_url", "image_url": {}}]}, "media", "`image_url`"),
        (user("") | {"content": [{"type": "input_audio", "input_audio": {}}]}, "media", "`input_audio`"),
        (user("") | {"content": [{"type": "tool_use", "name": "f"}]}, "bad_message", "`tool_use`"),
        (user("") | {"content": [{"type": "text", "text": None}]}, "not_text", "`text` is null"),
        (user("") | {"content": [7]}, "bad_message", "a part that is a number"),
        (user("") | {"content": []}, "empty_text", "is empty"),
        ({**assistant("A"), "weight": 0.5}, "bad_message", "has the `weight` 0.5; a turn is trained on"),
        ({**assistant("A"), "train": "no"}, "bad_message", 'has the `train` "no"'),
    ],
)
def test_what_cannot_be_read_is_named(item: dict[str, Any], kind: str, words: str) -> None:
    found = turn(item)
    assert isinstance(found, tuple) and found[0] == kind and words in found[1], found


def test_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "A", "image": None}, {"type": "output_text", "text": "B"}, {"text": "C"}, "D"]
    assert turn({"role": "user", "content": parts}) == user("ABCD")
    thoughts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "So."}]
    assert turn({"role": "assistant", "content": thoughts}) == {**assistant("So."), "reasoning_content": "Hm."}


def test_nulls_that_arrow_fills_in_are_absent_and_those_of_a_file_are_not() -> None:
    padded = [
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": 1, "content": None}}]}
    ]
    assert without_nulls(padded)[0] == {**padded[0], "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}
    row = {"prompt": "Q?", "chosen": padded, "rejected": [assistant("No.")]}
    shape = find_shape([RawRow(ORIGIN, row)], "pairs")
    for pads, arguments in ((False, {"a": 1, "content": None}), (True, {"a": 1})):
        record = to_record(RawRow(ORIGIN, row, pads_with_nulls=pads), shape)
        assert isinstance(record, Preference), record
        assert record.chosen[0]["tool_calls"][0]["function"]["arguments"] == arguments


# ---- templates that are in the way --------------------------------------------------------------------------------

IGNORES = CHATML[: CHATML.index("{% if add_generation_prompt")]


def test_a_template_that_ignores_the_generation_prompt_trains_the_header() -> None:
    found = answered((assistant("So."),), tokenizer_of(IGNORES))
    assert found.oddities == ("header_trained",) and found.details["header_trained"] == '"<|im_start|>assistant\\n"'
    assert scored(found, tokenizer_of(IGNORES)) == ["<|im_start|>assistant\nSo.<|im_end|>\n"]


def test_an_empty_thought_that_the_template_adds_is_reported() -> None:
    tokenizer = tokenizer_of(AGENT)
    assert answered((assistant("So."),), tokenizer).details == {"empty_thought": '"<think></think>"'}
    for silent in (
        answered((assistant("So."),), tokenizer, enable_thinking=False),
        answered(({**assistant("So."), "reasoning_content": "Hm."},), tokenizer),
        answered((assistant("<think></think>So."),), tokenizer_of(CHATML)),
    ):
        assert silent.oddities == ()


@pytest.mark.parametrize("answer", [assistant("So."), {**assistant("So."), "reasoning_content": "Hm."}, call()])
@pytest.mark.parametrize("template", [CHATML, AGENT, HEADERS, INST])
def test_templates_that_ask_or_need_no_header_are_not_reported(template: str, answer: Any) -> None:
    found = read(Unpaired((user("A"),), (answer,), True, ORIGIN), tokenizer_of(template))
    assert isinstance(found, Problem) or "header_trained" not in found.oddities


@pytest.mark.parametrize(
    "last",
    ["(answer this) {{ message.content }}", "{{ message.content }} /think", "{{ message.content | upper }}"],
)
def test_a_template_that_writes_the_last_question_otherwise_gives_no_pair(last: str) -> None:
    written = "{% if loop.last and message.role == 'user' %}" + last + "{% else %}{{ message.content }}{% endif %}"
    found = read(pair("Why is it so?"), tokenizer_of(CHATML.replace("{{ message.content }}", written)))
    assert isinstance(found, Problem) and found.kind == "template_refused"
    assert "writes the prompt differently once an answer follows" in found.message


def test_a_generation_prompt_that_differs_is_said() -> None:
    found = read(pair(), tokenizer_of(THINKING))
    assert isinstance(found, Tokenized) and found.oddities == ("prompt_not_prefix",)
    said = found.details["prompt_not_prefix"]
    assert said == 'generation reads "<think>\\n" where training writes "" before the answer'


DATED = "{% if not day is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}Today: {{ day }}\n" + CHATML


@pytest.fixture
def load(write: Callable[..., str]) -> Callable[..., Prepared]:
    def load_rows(template: str, rows: list[Any], **settings: Any) -> Prepared:
        data = Data(train=[Source(path=write("rows.jsonl", rows))], **settings)
        return load_split(data, tokenizer_of(template), seed=1)

    return load_rows


def kinds(prepared: Prepared) -> dict[str, findings.Finding]:
    return {finding.kind: finding for finding in prepared.report.findings}


def test_a_date_that_moves_is_a_finding(load: Callable[..., Prepared]) -> None:
    row = {"prompt": "Q?", "chosen": "A.", "rejected": "B."}
    assert "Today: " in kinds(load(DATED, [row]))["date_moves"].message
    assert "date_moves" not in kinds(load(CHATML, [row])) | kinds(load("{{ strftime_now is defined }}" + CHATML, [row]))


def test_findings_show_what_was_seen(load: Callable[..., Prepared]) -> None:
    odd = [{**assistant("So."), "reasoning": "Hm."}]
    rows = [
        {"prompt": "Q?", "chosen": "A.", "rejected": "B."},
        {"prompt": "R?", "chosen": odd, "rejected": [assistant("B")]},
    ]
    found = kinds(load(CHATML, rows[:1] + rows[1:]))["unread_field"]
    assert found.count == 1 and found.message.endswith("does not read; `reasoning`") and found.rows[0].row == 2


def test_prompts_are_written_with_what_they_are_given() -> None:
    tokenizer = tokenizer_of(AGENT)
    record = Prompt((user("A"), call(), result("7")), {}, ORIGIN, {"tools": TOOLS})
    found = read(record, tokenizer)
    assert isinstance(found, Tokenized)
    assert list(found.tree.prompt) == as_template(record.prompt, tokenizer, tools=TOOLS, add_generation_prompt=True)
