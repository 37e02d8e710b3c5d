"""Each layout of the table in docs/layouts.md, from a file to token ids; and what is refused instead of guessed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import assistant, to_record, user
from layouts import CASES, Case, bad, chatml, good, question, talk
from ranking_layouts import CASES as RANKINGS
from tiny_tokenizer import DEFAULT_SYSTEM
from transformers import PreTrainedTokenizerFast

from prefold.data.formats import RawRow
from prefold.data.mixture import Prepared, load_split
from prefold.data.preference import Preference, Problem, Prompt, RowId, Unpaired
from prefold.data.shapes import find_shape
from prefold.errors import UserError
from prefold.recipe import Data, Source, Values, make_section

DOCS = Path(__file__).parents[3] / "docs" / "layouts.md"
Write = Callable[..., str]
Row = dict[str, Any]


def loaded(case: Case, write: Write, tokenizer: PreTrainedTokenizerFast) -> Prepared:
    path = write("rows.jsonl", [case.row(number) for number in range(3)])
    data = Data(train=[make_section(Source, {"path": path, **case.source})], max_length=4096)
    return load_split(data, tokenizer, seed=1, kind=case.kind)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.name}-{at}" for at, case in enumerate(CASES)])
def test_layout(case: Case, write: Write, chatml_tokens: PreTrainedTokenizerFast) -> None:
    prepared = loaded(case, write, chatml_tokens)
    [source] = prepared.report.sources
    assert (source.rows_in, len(prepared.train)) == (3, 3)
    assert case.shape in (None, source.shape)
    assert source.unused == case.unused
    for number, example in enumerate(prepared.train):
        record, tree = example.record, example.tree
        prompt, answers = case.prompt(number), case.answers(number)
        assert list(record.prompt) == prompt
        assert [list(answer) for answer in record.answers] == answers
        assert record.template_kwargs == case.given(number)
        assert facts_of(record) == case.facts(number)
        opened = prompt if prompt[0]["role"] == "system" else [{"role": "system", "content": DEFAULT_SYSTEM}, *prompt]
        assert chatml_tokens.decode(tree.prompt) == chatml(opened) + "<|im_start|>assistant\n"
        texts = ["".join(f"{turn['content']}<|im_end|>\n" for turn in answer) for answer in answers]
        assert [chatml_tokens.decode(completion) for completion in tree.completions] == texts


def facts_of(record: Preference | Unpaired | Prompt) -> Any:
    facts = {Preference: "ratings", Unpaired: "label", Prompt: "columns"}
    return getattr(record, facts[type(record)])


@pytest.fixture(scope="session")
def chatml_tokens(chatml: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return chatml


def test_the_table_of_layouts_in_the_docs_is_the_one_that_is_tested() -> None:
    table = DOCS.read_text(encoding="utf-8").split("| layout |")[1].split("\n\n")[0]
    named = re.findall(r"^\| ([^|]+?) \|", table, re.MULTILINE)
    assert len(named) == len(set(named))
    assert set(named) == {case.name for case in (*CASES, *RANKINGS)}
    assert len(CASES) >= 60


# ---- what is refused --------------------------------------------------------------------------------------------


CALL = [
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    },
    {"role": "tool", "content": "12:00"},
]


def shape_of(rows: list[Row], columns: dict[str, str] | None = None, **settings: Any) -> Any:
    raw = [RawRow(RowId("rows.jsonl", number), row) for number, row in enumerate(rows, start=1)]
    return find_shape(raw, "rows.jsonl", columns, settings.get("kinds", ("pairs",)), settings.get("values"))


def voted(votes: list[Any], vote: str = "preference", names: tuple[str, str] = ("answer_1", "answer_2")) -> list[Row]:
    return [
        {"prompt": question(number), names[0]: good(number), names[1]: bad(number), vote: value}
        for number, value in enumerate(votes)
    ]


def marked(labels: list[Any]) -> list[Row]:
    return [
        {"prompt": question(number), "completion": good(number), "label": value} for number, value in enumerate(labels)
    ]


SIGNED = 'values: {first: "< 0", second: "> 0"'
REFUSED: list[tuple[list[Row], list[str]]] = [
    (voted([-2, -1, -2, 1, -2]), ["`preference` holds -2 (3 rows), -1 (1), 1 (1)", SIGNED]),
    (voted([-2, 1, 0]), [SIGNED + ", tie: 0}"]),
    (voted([-1, -1]), ["`preference` holds -1 (2 rows)"]),
    (voted([1, 2] * 400 + [-1]), ["1 (400 rows), 2 (400), -1 (1)"]),
    (voted([0, 1, 1]), ["1 (2 rows), 0 (1)", "values: {first: 0, second: 1}"]),
    (voted([0, 0]), ["0 (2 rows)"]),
    (voted([1, 2, 3]), ['values: {first: ">= 3", second: "<= 1"}']),
    (voted(["1", "2", "3"]), ["1 (1 row), 2 (1), 3 (1)"]),
    (voted([True, False]), ["True (1 row), False (1)", "values: {first: false, second: true}"]),
    (voted(["left", "right"]), ["left (1 row), right (1)", 'values: {first: "left", second: "right"}']),
    (voted(["A", "B", "C"]), ["A (1 row), B (1), C (1)"]),
    (voted(["gpt-4", "claude"]), ["which of `answer_1`, `answer_2` is better"]),
    (voted([1, 2], names=("response_0", "response_1")), ["1 (1 row), 2 (1)"]),
    (voted(["response_1"], names=("answer_0", "answer_1")), ["response_1 (1 row)"]),
    (voted([1, 1], names=("response_0", "response_1")), ["1 (2 rows)"]),
    (voted(["model_a", 1]), ["model_a (1 row), 1 (1)"]),
    (voted([0, 1, 2], "winner"), ["0 (1 row), 1 (1), 2 (1)"]),
    (voted([1, 2, 1.5], "winner"), []),
    (voted([1, 2, "A"]), []),
    (voted(["A", "B", 1]), ["A (1 row), B (1), 1 (1)"]),
    (voted([0, 1, 2]), []),
    (voted([1, 2, float("nan"), None], "winner"), []),
    (voted([1, 2], "overall_preference"), ["1 (1 row), 2 (1)"]),
    (voted([1, 2], "better_response_id"), ["1 (1 row), 2 (1)"]),
    ([row | {"context": "c"} for row in voted(["x"], "overall_preference", ("response1", "response2"))], ["x (1 row)"]),
]


@pytest.mark.parametrize("rows, expected", REFUSED, ids=range(len(REFUSED)))
def test_votes_of_an_unknown_scale(rows: list[Row], expected: list[str]) -> None:
    if not expected:
        assert shape_of(rows).name == "votes"
        return
    with pytest.raises(UserError) as refused:
        shape_of(rows)
    message = str(refused.value)
    assert all(text in message for text in (*expected, "which does not say for sure")), message
    assert max(map(len, message.splitlines())) <= 90, message


@pytest.mark.parametrize(
    "labels", [[1, 2], [1, 3, 5], [-1, 1], ["A", "B"], [0, 0.5, 1], ["good", "no idea"], [True, 2]]
)
def test_labels_of_an_unknown_scale(labels: list[Any]) -> None:
    with pytest.raises(UserError, match=r"does not say for sure which answers are wanted(.|\n)*values: \{desirable: "):
        shape_of(marked(labels), kinds=("unpaired",))


def test_answers_that_are_named_the_other_way_round() -> None:
    """What words and well-known sets mean is known for the order of their columns alone."""
    swapped = {"output_1": "response_b", "output_2": "response_a"}
    rows = voted(["model_a", "model_b"], names=("response_a", "response_b"))
    assert shape_of(rows).values.meaning_of("model_a") == "first"
    with pytest.raises(UserError, match="which of `response_b`, `response_a` is better"):
        shape_of(rows, swapped)
    by_name = shape_of(voted(["response_a"], names=("response_a", "response_b")), swapped)
    assert by_name.values.meaning_of("response_a") == "second"
    helpsteer = [row | {"context": "c"} for row in voted([-1, 1], "overall_preference", ("response1", "response2"))]
    with pytest.raises(UserError, match="holds -1"):
        shape_of(helpsteer, {"output_1": "response2", "output_2": "response1"})


def test_values_decide() -> None:
    rows = voted([-1, 0, 3, "x", None])
    values = Values(first="< 0", second="> 0", tie=0)
    shape = shape_of(rows, values=values)
    records = [to_record(RawRow(RowId("r", 1), row), shape) for row in rows]
    assert [getattr(record, "kind", getattr(record, "ratings", None)) for record in records] == [
        (1.0, 0.0),
        "tie",
        (3.0, 0.0),
        "bad_label",
        "null_field",
    ]
    assert records[0].chosen == (assistant(good(0)),) and records[2].chosen == (assistant(bad(2)),)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="`values` names none of them"):
        shape_of(voted([7, 8]), values=Values(first="A", second="B"))
    with pytest.raises(UserError, match=r"no known shape(.|\n)*votes"):
        shape_of([{"prompt": "Why?", "chosen": "So.", "rejected": "No."}], values=values)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"first": "< 1", "second": "> 0"}, "would be both `first` and `second`"),
        ({"first": [1, 2], "second": ["x", 2.0]}, "`2.0` would be both `first` and `second`"),
        ({"first": "A", "second": "a "}, "`A` would be both"),
        ({"first": "> 0", "second": "< 0", "tie": "<= 0"}, "would be both `second` and `tie`"),
        ({"first": 1}, "give `first` and `second`"),
        ({"first": 1, "second": 2, "desirable": 3}, "give `first` and `second`"),
        ({"tie": 0}, "give `first` and `second`"),
        ({"first": "< none", "second": 1}, "`< none` is no condition"),
        ({"frist": 1, "second": 2}, "did you mean `first`"),
    ],
)
def test_values_that_cannot_be_meant(values: Row, expected: str) -> None:
    with pytest.raises(UserError) as refused:
        make_section(Source, {"path": "a.jsonl", "values": values}, "recipe.yaml")
    assert expected in str(refused.value)


@pytest.mark.parametrize(
    "values, signed",
    [
        ({"first": "< 0", "second": "> 0", "tie": 0}, True),
        ({"first": [3, 1], "second": [-1, -3]}, True),
        ({"first": "<= -1", "second": ">= 2", "tie": [0, 1]}, True),
        ({"first": "< 4", "second": "> 4", "tie": 4}, False),
        ({"first": 0, "second": 1}, False),
        ({"first": "A", "second": "B"}, False),
    ],
)
def test_a_scale_around_0_says_by_how_much(values: Row, signed: bool) -> None:
    assert Values(**values).signed == signed


def test_one_of_two_votes_must_be_named() -> None:
    row = {**voted([0], "better_response_id", ("response_0", "response_1"))[0], "safer_response_id": 1}
    with pytest.raises(UserError, match=r"more than one way(.|\n)*such as \{vote: better_response_id\}"):
        shape_of([row])


TEXT = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
LISTS = {"chosen": str(talk(1, "So.")), "rejected": str(talk(1, "No."))}


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([LISTS, LISTS, TEXT], "`chosen` holds lists of messages as text in 2 rows, and other text in 1"),
        ([LISTS, LISTS | {"chosen": LISTS["chosen"][:-4]}], "`chosen` holds text that begins as a list of messages"),
        ([{**TEXT, **LISTS}, {**TEXT, "chosen": "[{'role': 'user'"}], "cannot be read as one: 1 row"),
        (
            [{**TEXT, "prompt": "[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]"}],
            "`prompt` holds",
        ),
        (
            [{**TEXT, "chosen": '{"role": "user", "content": "a"}\n{"role": "user", "content": "b"}'}],
            "`chosen` holds text",
        ),
        ([{"messages": '[{"from": "human", "val', **TEXT}], None),
        ([{**TEXT, "chosen": '{"value": 3, "from'}], None),
    ],
)
def test_lists_as_text_in_some_rows_alone(rows: list[Row], expected: str | None) -> None:
    if expected is None:
        assert shape_of(rows).name == "text"
        return
    with pytest.raises(UserError) as refused:
        shape_of(rows)
    assert expected in str(refused.value), refused.value


def test_a_later_row_whose_text_is_no_list() -> None:
    shape = shape_of([{"prompt": "Why?", **LISTS}])
    for text, kind in (("So.", "bad_message"), ("[{'role'", "bad_message"), ("", "null_field"), ("[1]", "bad_message")):
        problem = to_record(RawRow(RowId("r", 1), {**LISTS, "chosen": text}), shape)
        assert isinstance(problem, Problem) and problem.kind == kind, problem


@pytest.mark.parametrize(
    "answer", ['{"a": 1}', '["a", "b"]', "[1, 2]", '[{"from": "me", "to": "you"}]', "{'role': 'king'}"]
)
def test_answers_in_json_stay_text(answer: str) -> None:
    row = {**TEXT, "chosen": answer}
    shape = shape_of([row, row])
    record = to_record(RawRow(RowId("r", 1), row), shape)
    assert shape.name == "text" and isinstance(record, Preference) and record.chosen == (assistant(answer),)


@pytest.mark.parametrize(
    "columns, expected",
    [
        (
            {"prompt": "sample.asks"},
            "`sample` has no `asks`\n  expected: `ask`, `replies`\n  to do: did you mean `ask`?",
        ),
        ({"prompt": "sample.replies.7"}, "`sample.replies` has no `7`\n  expected: `0`"),
        ({"prompt": "sample.replies.0.txt"}, "`sample.replies.0` has no `txt`\n  expected: `text`"),
        ({"prompt": "sample.ask.more"}, "`sample.ask` has no `more`"),
        ({"prompt": "smple.ask"}, "there is no such column\n  expected: `sample`\n  to do: did you mean `sample`?"),
    ],
)
def test_a_path_that_is_not_there(columns: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError) as refused:
        shape_of([{"sample": {"ask": "Why?", "replies": [{"text": "So."}]}}], columns)
    assert expected in str(refused.value), refused.value


def test_an_object_as_an_answer_is_refused_with_its_keys() -> None:
    row = {"prompt": "Why?", "chosen": {"text": "So.", "by": "x"}, "rejected": {"text": "No.", "by": "y"}}
    with pytest.raises(UserError, match="`chosen` is an object with `text`, `by`:\n    reach into it by a path"):
        shape_of([row])


def test_an_exact_column_goes_before_a_path() -> None:
    row = {"a.b": "Why?", "a": {"b": "How?"}, "chosen": "So.", "rejected": "No."}
    record = to_record(RawRow(RowId("r", 1), row), shape_of([row], {"prompt": "a.b"}))
    assert isinstance(record, Preference) and record.prompt == (user("Why?"),)


@pytest.mark.parametrize(
    "cell, kind",
    [
        ({"images": ["a.png"]}, "media"),
        ({"image": "a.png"}, "media"),
        ({"audios": [{"path": "a.wav"}]}, "media"),
        ({"images": [], "videos": None}, None),
        ({"tools": [{"name": "f"}, 3]}, "bad_message"),
        ({"tools": "[{"}, "bad_message"),
        ({"tools": [], "chat_template_kwargs": {}}, None),
        ({"chat_template_kwargs": [1]}, "bad_message"),
        ({"chat_template_kwargs": {"tokenize": True}}, "bad_message"),
        ({"chat_template_kwargs": {"tools": []}}, "bad_message"),
        ({"history": ["Hello."]}, "bad_message"),
        ({"history": [["Hello.", ""]]}, "empty_text"),
        ({"history": [["Hello.", "Hi.", "More."]]}, "bad_message"),
    ],
)
def test_what_stands_beside_a_pair(cell: Row, kind: str | None) -> None:
    like = {**TEXT, "images": None, "image": None, "videos": None, "audios": None}
    like |= {"tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}, "history": [["a", "b"]]}
    shape = shape_of([like])
    result = to_record(RawRow(RowId("r", 1), {**TEXT, **cell}), shape)
    assert getattr(result, "kind", None) == kind, result


def test_columns_of_the_same_name_that_mean_something_else_are_not_used() -> None:
    row = {**TEXT, "tools": "hammer", "history": "old", "chat_template_kwargs": 3, "empty": None}
    shape = shape_of([row])
    assert shape.unused == ("tools", "history", "chat_template_kwargs")
    assert not {"tools", "history", "chat_template_kwargs"} & dict(shape.columns).keys()
    assert to_record(RawRow(RowId("r", 1), row), shape).prompt == (user("Why?"),)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "prompts, sure",
    [(["Tell me a story."] * 2, True), (["Hi"], False), (["Tell me a story.", "Tell me another."], False)],
)
def test_a_prompt_is_cut_from_answers_that_all_begin_with_it(prompts: list[str], sure: bool) -> None:
    rows = [{"prompt": prompt, "chosen": f"{prompts[0]} So.", "rejected": f"{prompts[0]} No."} for prompt in prompts]
    assert shape_of(rows).repeats_prompt == sure


def test_a_later_row_whose_answers_do_not_begin_with_the_prompt() -> None:
    row = {"prompt": "Tell me a story.", "chosen": "Tell me a story. So.", "rejected": "Tell me a story. No."}
    shape = shape_of([row])
    problem = to_record(RawRow(RowId("r", 1), {**row, "chosen": "So."}), shape)
    assert isinstance(problem, Problem) and problem.kind == "prompts_differ"
    nothing = to_record(RawRow(RowId("r", 1), {**row, "chosen": row["prompt"]}), shape)
    assert isinstance(nothing, Problem) and nothing.kind == "empty_text"


@pytest.mark.parametrize("rejected, turns", [("No.", 1), ([assistant("No.")], 1), ([*CALL, assistant("No.")], 3)])
def test_what_an_answer_beside_a_dialogue_stands_for(rejected: Any, turns: int) -> None:
    """A lone answer for the last one, one that calls tools for all that follows the question."""
    dialogue = [user("What time is it?"), *CALL, assistant("Noon.")]
    row = {"messages": dialogue, "rejected_response": rejected}
    record = to_record(RawRow(RowId("r", 1), row), shape_of([row]))
    assert isinstance(record, Preference), record
    assert (len(record.prompt), len(record.chosen), len(record.rejected)) == (4 - turns, turns, turns)


def test_a_labelled_dialogue_with_tools_is_an_answer_from_its_question_on() -> None:
    row = {"messages": [user("What time is it?"), *CALL, assistant("Noon.")], "label": True}
    record = to_record(RawRow(RowId("r", 1), row), shape_of([row], kinds=("unpaired",)))
    assert isinstance(record, Unpaired) and (len(record.prompt), len(record.completion)) == (1, 3)


def test_rows_of_an_arena_with_several_rounds() -> None:
    row = {
        "prompt": ["Hi?", "Why?"],
        "response_a": ["Hi.", "So."],
        "response_b": ["Ho.", "No."],
        "winner_model_a": 1,
        "winner_model_b": 0,
    }
    pair = to_record(RawRow(RowId("r", 1), row), shape_of([row]))
    assert isinstance(pair, Preference) and pair.prompt == (user("Hi?"),)
    assert pair.chosen == (assistant("Hi."), user("Why?"), assistant("So."))
    short = to_record(RawRow(RowId("r", 1), {**row, "response_b": ["Ho."]}), shape_of([row]))
    assert isinstance(short, Problem) and short.kind == "bad_message"


def test_steps_of_an_answer_are_not_taken_for_all_of_it() -> None:
    row = {**TEXT, "initial_reason_steps": "First,", "full_chosen": "First, so.", "full_rejected": "First, no."}
    with pytest.raises(UserError, match="more than one way"):
        shape_of([row])


def test_what_a_report_says_of_media_and_of_answers_that_repeat_their_prompt(
    write: Write, chatml_tokens: PreTrainedTokenizerFast
) -> None:
    rows: list[Row] = [
        {"prompt": f"Tell me story {number}.", "chosen": "So.", "rejected": "No."} for number in range(4)
    ]
    rows[1]["images"], rows[2]["chosen"], rows[3]["note"] = ["a.png"], "Tell me story 2. So.", "x"
    path = write("rows.jsonl", rows)
    report = load_split(Data(train=[Source(path=path)]), chatml_tokens, seed=1).report
    found = {finding.kind: [row.row for row in finding.rows] for finding in report.findings}
    assert (found["media"], found["prompt_in_answer"]) == ([2], [3])
    assert report.sources[0].unused == ("note",)


def test_triples_of_a_search_engine_are_no_pairs() -> None:
    with pytest.raises(UserError, match="no known shape"):
        shape_of([{"query": "Why?", "positive": "So.", "negative": "No."}])
