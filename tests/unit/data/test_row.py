"""Any row can be looked at: as it is read, as messages, as text and as tokens, or with why it is left out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from data_samples import assistant, text_rows, user
from tokenizers import decoders, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefold.data.mixture import load_split
from prefold.data.preference import Prompt, RowId
from prefold.data.row import SeenRow, see_row, tokens_of
from prefold.errors import UserError
from prefold.recipe import Benchmark, Data, Source
from prefold.reports.row import print_row
from prefold.terminal import as_text
from prefold.trees.packing import TokenTree

Write = Callable[..., str]
ROW = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}


@pytest.fixture
def see(write: Write, chatml: PreTrainedTokenizerFast) -> Callable[..., SeenRow]:
    def see_rows(rows: Any, row: Any = 1, kind: Any = "pairs", source: Any = None, **settings: Any) -> SeenRow:
        data = Data(train=[Source(path=write("pairs.jsonl", rows), **(source or {}))], **settings)
        return see_row(str(row), data, chatml, 1, kind)

    return see_rows


def test_a_row_is_shown_as_it_is_trained(
    see: Callable[..., SeenRow], write: Write, chatml: PreTrainedTokenizerFast
) -> None:
    rows = [*text_rows(3), ROW | {"rating": 7}]
    facts = see(rows, 4).as_json()
    assert facts["row"]["row"] == 4 and facts["split"] == "train" and facts["recognised_as"] == "text"
    assert facts["read"] == rows[3] and facts["left_out"] == []
    assert facts["messages"] == [
        {"prompt": [user("Why?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")]}
    ]
    [rendered], [tokens] = facts["rendered"], facts["tokens"]
    assert rendered["prompt"].endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert rendered["chosen"] == rendered["prompt"] + "So.<|im_end|>\n"
    trained = load_split(Data(train=[Source(path=write("pairs.jsonl", rows))]), chatml, seed=1).train[3].tree
    assert [token["id"] for token in tokens["prompt"]] == list(trained.prompt)
    assert [[token["id"] for token in tokens[side]] for side in ("chosen", "rejected")] == [
        *map(list, trained.completions)
    ]
    assert {token["part"] for token in tokens["prompt"]} == {"prompt"}
    assert {token["part"] for token in tokens["chosen"]} == {"scored"}
    assert "".join(token["text"] for token in tokens["chosen"]) == "So.<|im_end|>\n"


LEFT_OUT: dict[str, tuple[list[Any], dict[str, Any], dict[str, Any], str]] = {
    "filtered": ([ROW | {"score": 1}, ROW | {"score": 5}], {"where": "score > 2"}, {}, "score > 2"),
    "where_failed": ([ROW | {"score": "x"}, ROW | {"score": 5}], {"where": "score > 2"}, {}, "score"),
    "not_drawn": ([ROW, *text_rows(50)], {"count": 2}, {}, "does not draw it"),
    "identical": ([ROW | {"rejected": "So."}, ROW], {}, {}, "are the same"),
    "null_field": ([ROW | {"rejected": None}, ROW], {}, {}, "`rejected` is null"),
    "overlong": ([ROW | {"chosen": "So. " * 100}, ROW], {}, {"max_length": 64}, "more than `max_length` 64"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
@pytest.mark.parametrize("policy", ["drop", "error"])
def test_a_row_that_is_left_out_says_why(see: Callable[..., SeenRow], kind: str, policy: str) -> None:
    rows, source, settings, reason = LEFT_OUT[kind]
    policies = {} if kind in ("filtered", "not_drawn") else {"bad_rows": policy, "overlong": policy}
    facts = see(rows, 1, source=source, **settings, **policies).as_json()
    [problem] = facts["left_out"]
    assert problem["kind"] == kind and reason in problem["message"]
    assert facts["read"] == rows[0]
    if kind in ("filtered", "where_failed", "not_drawn", "overlong"):
        assert facts["tokens"][0]["chosen"], "it is shown as it would be trained"


def test_a_row_that_cannot_be_read(see: Callable[..., SeenRow]) -> None:
    facts = see(f'{{"prompt": \n{json.dumps(ROW)}\n', 1).as_json()
    assert facts["read"] is None and [problem["kind"] for problem in facts["left_out"]] == ["broken_row"]
    assert "broken_row" in as_text(lambda console: print_row(facts, console))


def test_half_a_character_can_be_shown(see: Callable[..., SeenRow]) -> None:
    rows = [ROW, '{"prompt": "Why?", "chosen": "\\ud83d", "rejected": "No.", "\\ud83d": 1}']
    facts = see("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), 2).as_json()
    assert [problem["kind"] for problem in facts["left_out"]] == ["not_text"]
    as_text(lambda console: print_row(facts, console)).encode()
    json.dumps(facts).encode()


def test_a_row_that_repeats_an_earlier_one(see: Callable[..., SeenRow]) -> None:
    rows = [ROW, *text_rows(3), ROW]
    assert see(rows, 1, duplicates="drop_exact").as_json()["left_out"] == []
    [problem] = see(rows, 5, duplicates="drop_exact").as_json()["left_out"]
    assert problem["kind"] == "repeated" and "row 1" in problem["message"]


def test_a_row_with_text_of_a_benchmark(see: Callable[..., SeenRow], write: Write) -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    asked = Benchmark(path=write("asked.jsonl", [{"question": words}]), column="question")
    [problem] = see([ROW | {"prompt": words}], decontaminate=[asked]).as_json()["left_out"]
    assert problem["kind"] == "contaminated"


def test_findings_of_a_row(see: Callable[..., SeenRow]) -> None:
    facts = see([ROW | {"chosen": "So.</s>"}]).as_json()
    assert [finding["kind"] for finding in facts["findings"]] == ["template_residue"]


def test_answers_with_labels_and_prompts(see: Callable[..., SeenRow]) -> None:
    both = see([ROW], kind="unpaired").as_json()
    assert [(entry["label"], entry["completion"]) for entry in both["messages"]] == [
        (True, [assistant("So.")]),
        (False, [assistant("No.")]),
    ]
    assert ["".join(token["text"] for token in entry["completion"]) for entry in both["tokens"]] == [
        "So.<|im_end|>\n",
        "No.<|im_end|>\n",
    ]
    prompt = see([{"prompt": "Why?", "answer": "42"}], kind="prompts").as_json()
    assert list(prompt["tokens"][0]) == ["prompt"] and prompt["messages"] == [{"prompt": [user("Why?")]}]


def test_no_more_is_read_than_up_to_the_row(write: Write, chatml: PreTrainedTokenizerFast, monkeypatch: Any) -> None:
    import prefold.data.formats as formats

    read, parse = [], formats._json_line
    monkeypatch.setattr(formats, "_json_line", lambda line, origin: read.append(origin.row) or parse(line, origin))
    data = Data(train=[Source(path=write("pairs.jsonl", text_rows(5000)))])
    see_row("2000", data, chatml, 1, "pairs")
    assert max(read) == 2000


def test_rows_by_source(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    data = Data(
        train=[Source(path=write("a.jsonl", [ROW])), Source(path=write("b.jsonl", [ROW | {"prompt": "Who?"}]))],
        eval=[Source(path=write("held.jsonl", [ROW | {"prompt": "How?"}]))],
    )

    def prompt(row: str) -> tuple[str, str]:
        facts = see_row(row, data, chatml, 1, "pairs").as_json()
        return facts["split"], facts["read"]["prompt"]

    assert prompt("a.jsonl:1") == ("train", "Why?") and prompt("b.jsonl:1") == ("train", "Who?")
    assert prompt(f"{data.eval[0].path}:1") == ("eval", "How?")
    for row, message in {
        "1": "there are 3 sources with rows",
        "c.jsonl:1": "`c.jsonl` is no source of the recipe",
        "a.jsonl:2": "there is no row 2",
        "x": "`x` is no row",
        "0": "`0` is no row",
        "a.jsonl:": "is no row",
    }.items():
        with pytest.raises(UserError, match=message):
            prompt(row)


def test_a_file_that_is_two_sources(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    path = write("pairs.jsonl", [ROW | {"score": 1}, ROW | {"score": 5}])
    data = Data(train=[Source(path=path, where="score > 3"), Source(path=path, where="score <= 3")])
    assert see_row("1", data, chatml, 1, "pairs").left_out == see_row("2", data, chatml, 1, "pairs").left_out == []


def test_what_a_terminal_shows(see: Callable[..., SeenRow]) -> None:
    facts = see([ROW | {"prompt": "Why\x1b?\nOh " + "very " * 400, "chosen": "So be it."}], max_length=4096).as_json()
    shown = as_text(lambda console: print_row(facts, console))
    assert "\x1b" not in shown and "characters ...]" in shown
    for part in ("As it is read", "As messages", "prompt, user:", "chosen, assistant:", "As text", "As it is trained"):
        assert part in shown
    assert "chosen, 11 tokens (11 scored, 0 context)" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert "+S 50" in shown and "  W 54" in shown, (
        "scored tokens are marked without colour, those of the prompt are not"
    )


def test_what_a_tool_returned_is_context(see: Callable[..., SeenRow]) -> None:
    chosen = [assistant("I look."), {"role": "tool", "content": "It is 4."}, assistant("Four.")]
    row = {"prompt": [user("When?")], "chosen": chosen, "rejected": [assistant("No.")]}
    facts = see([row]).as_json()
    assert facts["messages"][0]["chosen"] == chosen
    tokens = facts["tokens"][0]["chosen"]
    context = "".join(token["text"] for token in tokens if token["part"] == "context")
    scored = "".join(token["text"] for token in tokens if token["part"] == "scored")
    assert "It is 4." in context and "I look." in scored and "Four." in scored and "It is 4." not in scored
    shown = as_text(lambda console: print_row(facts, console))
    assert "~I 40" in shown and "+F 37" in shown


def test_every_pair_of_a_ranking(see: Callable[..., SeenRow]) -> None:
    answers = [{"response": answer, "score": score} for answer, score in (("A.", 1), ("B.", 3), ("C.", 2))]
    facts = see([{"prompt": "Why?", "completions": answers}], source={"pairs_from": "adjacent"}).as_json()
    texts = [(entry["chosen"][0]["content"], entry["rejected"][0]["content"]) for entry in facts["messages"]]
    assert texts == [("B.", "C."), ("C.", "A.")]
    assert len(facts["rendered"]) == len(facts["tokens"]) == 2
    assert "As it is trained, 2 of 2" in as_text(lambda console: print_row(facts, console))


def test_what_a_row_gives_to_the_template_is_shown(see: Callable[..., SeenRow]) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    facts = see([{"prompt": "Why?", "chosen": "So.", "rejected": "No.", "tools": tools}]).as_json()
    assert facts["messages"][0]["tools"] == tools
    assert [finding["kind"] for finding in facts["findings"]] == ["unread_field"]
    assert "tools:" in as_text(lambda console: print_row(facts, console))


@pytest.mark.parametrize("decoder", ["bytes", "metaspace"])
@pytest.mark.parametrize(
    "text", ["A cat.", "日本語 naïve 🦙!", "tabs\tand\nlines  ", "\ufffd", "half 🦙"[:5] + "\ufffd"]
)
def test_the_texts_of_tokens_make_up_the_whole(chatml: PreTrainedTokenizerFast, text: str, decoder: str) -> None:
    tokenizer = copy.deepcopy(chatml)
    if decoder == "metaspace":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])
    ids = tokenizer(text)["input_ids"]
    record = Prompt(({"role": "user", "content": text},), {}, RowId("a", 1))
    tokens = tokens_of(record, TokenTree(tuple(ids), ()), tokenizer)["prompt"]
    assert [token["id"] for token in tokens] == ids
    assert "".join(token["text"] for token in tokens) == tokenizer.decode(ids)


def test_a_row_whose_content_is_known_is_not_looked_for(
    write: Write, chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(train=[Source(path=write("pairs.jsonl", [*text_rows(3), ROW]))])
    looked_for = see_row("4", data, chatml, 1, "pairs").as_json()
    monkeypatch.setattr("prefold.data.row._read", None)
    assert see_row("4", data, chatml, 1, "pairs", ROW).as_json() == looked_for
