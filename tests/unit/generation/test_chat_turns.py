"""The conversation in the terminal: what its commands do, how its lines end, what Ctrl-C stops."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import tiny_llama
from tiny_tokenizer import CHATML, make_tokenizer

from prefold.errors import UserError
from prefold.generation import chat
from prefold.generation.chat import Conversation, Speaker, WrappedStream
from prefold.generation.sampling import Completion
from prefold.recipe import Chat


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=20, force_terminal=True, color_system=None, highlight=False)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the models were asked; they answer with a number that counts up, are stopped
    at `stop` and cut off at `long`."""
    calls: list[dict[str, Any]] = []

    def answer(model: Any, tokenizer: Any, prompts: Any, sampling: Any, streamer: Any) -> list[list[Completion]]:
        calls.append({"model": model, "messages": list(prompts[0]), "sampling": sampling})
        if prompts[0][-1]["content"] == "stop":
            streamer.on_finalized_text("only this ")
            raise KeyboardInterrupt
        return [[Completion((), f"answer {len(calls)}", prompts[0][-1]["content"] != "long")]]

    monkeypatch.setattr(chat, "answer", answer)
    return calls


def conversation(console: Console, *labels: str) -> Conversation:
    tokenizer = make_tokenizer(CHATML)
    return Conversation([Speaker(label, lambda name=label: name, tokenizer) for label in labels], Chat(), console)  # type: ignore[misc]


def contents(call: dict[str, Any]) -> list[str]:
    return [message["content"] for message in call["messages"]]


def test_an_answer_is_remembered_and_drawn_anew(console: Console, asked: list[dict[str, Any]]) -> None:
    talk = conversation(console, "before", "after")
    for line in ("one", "two", "/retry", "/new", "three"):
        talk.take(line)
    assert [call["model"] for call in asked] == ["before", "after"] * 4
    assert [contents(call) for call in asked[1::2]] == [
        ["one"],
        ["one", "answer 2", "two"],
        ["one", "answer 2", "two"],
        ["three"],
    ]
    seeds = [call["sampling"].seed for call in asked]
    assert seeds[::2] == seeds[1::2] and len(set(seeds)) == 4


def test_settings_and_system_message_hold_from_then_on(console: Console, asked: list[dict[str, Any]]) -> None:
    talk = conversation(console, "model")
    for line in (
        "one",
        "/set temperature = 0.5",
        "/set top_k=7",
        "/system Be brief.",
        "two",
        "/system",
        "three",
        "/set",
    ):
        talk.take(line)
    assert [(call["sampling"].temperature, call["sampling"].top_k) for call in asked] == [(0.7, 0), (0.5, 7), (0.5, 7)]
    assert [contents(call)[0] for call in asked] == ["one", "Be brief.", "one"]
    assert "top_k: 7" in printed(console) and "system: none" in printed(console)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hlep", "there is no command `/hlep`\n  to do: did you mean `/help`?"),
        ("/xyz", "`/help` lists the commands"),
        ("/retry", "there is nothing to answer yet"),
        ("/set temperature=-1", "`temperature` is -1"),
        ("/set temperatur=1", "did you mean `temperature`?"),
        ("/set temperature", "`temperature` is"),
        ("/save", "`/save FILE.jsonl`"),
        ("/save talk.txt", "`/save FILE.jsonl`"),
        ("/save talk.jsonl", "there is no answer to save yet"),
    ],
)
def test_what_cannot_be_done(console: Console, asked: list[dict[str, Any]], line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        conversation(console, "model").take(line)
    assert message in str(caught.value) and not asked


def test_help_names_every_command(console: Console) -> None:
    talk = conversation(console, "model")
    talk.take("/help")
    assert all(f"{name} " in printed(console) for name in [*talk.commands, "/exit"])


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(console: Console, asked: list[dict[str, Any]]) -> None:
    talk = conversation(console, "model")
    for line in ("stop", "two"):
        talk.take(line)
    assert contents(asked[1]) == ["stop", "only this", "two"]
    assert "only this\n(stopped)\n" in printed(console)


def test_an_answer_that_the_limit_cut_off_is_marked(console: Console, asked: list[dict[str, Any]]) -> None:
    talk = conversation(console, "model")
    talk.take("short")
    assert "cut off" not in printed(console)
    talk.take("long")
    said = " ".join(printed(console).split())
    assert "(cut off after 256 tokens; `/set max_new_tokens=512` allows more)" in said
    assert [message["content"] for message in talk.speakers[0].messages[-2:]] == ["long", "answer 2"]


def test_a_model_answers_after_it_was_stopped_as_before(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer(CHATML)
    model = tiny_llama(vocab_size=len(tokenizer))
    settings = Chat(max_new_tokens=12, temperature=0.0)
    straight = Conversation([Speaker("model", lambda: model, tokenizer)], settings, console)
    straight.take("Hello")
    stopped = Conversation([Speaker("model", lambda: model, tokenizer)], settings, console)
    put = WrappedStream.put

    def stopping(self: WrappedStream, value: Any) -> None:
        put(self, value)
        if len(self.token_cache) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WrappedStream, "put", stopping)
        stopped.take("Hello")
    assert "(stopped)" in printed(console) and len(stopped.speakers[0].messages[-1]["content"]) > 0
    stopped.take("/retry")
    assert stopped.speakers[0].messages == straight.speakers[0].messages


def test_pairs_are_answers_to_one_prompt(console: Console, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    talk = conversation(console, "before", "after")
    talk.take("one"), talk.take("two")
    with pytest.raises(UserError, match="their answers are not to one prompt"):
        talk.take(f"/save {tmp_path}/pairs.jsonl")
    for speaker in talk.speakers:
        speaker.messages = talk.speakers[0].messages
    with pytest.raises(UserError, match="both models said the same"):
        talk.take(f"/save {tmp_path}/pairs.jsonl")


def test_what_is_saved_is_data(console: Console, asked: list[dict[str, Any]], tmp_path: Path) -> None:
    talk = conversation(console, "before", "after")
    for line in ("/system Be brief.", "one", f"/save {tmp_path}/pairs.jsonl", f"/save {tmp_path}/pairs.jsonl before"):
        talk.take(line)
    first, second = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert [message["content"] for message in first["chosen"]] == ["Be brief.", "one", "answer 2"]
    assert [message["content"] for message in first["rejected"]] == ["Be brief.", "one", "answer 1"]
    assert (second["chosen"], second["rejected"]) == (first["rejected"], first["chosen"])
    alone = conversation(console, "model")
    for line in ("one", f"/save {tmp_path}/talk.jsonl"):
        alone.take(line)
    [row] = map(json.loads, (tmp_path / "talk.jsonl").read_text().splitlines())
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


# ---- lines ------------------------------------------------------------------------------------------------------


def streamed(console: Console, *parts: str, column: int = 0) -> str:
    stream = WrappedStream(make_tokenizer(CHATML), console, column)
    for part in parts:
        stream.on_finalized_text(part)
    stream.end()
    assert stream.text == "".join(parts)
    return printed(console)


def test_lines_end_between_words(console: Console) -> None:
    text = "A line of twenty cells, and then some more words.\n\n    indented\n" + "x" * 45 + " end"
    shown = streamed(console, *(f"{word} " for word in text.split(" ")), column=7)
    assert shown.split("\n") == [
        "A line of",
        "twenty cells, and",
        "then some more",
        "words.",
        "",
        "    indented",
        "x" * 45 + " end",
        "",
    ]


def test_wide_characters_take_two_cells(console: Console) -> None:
    assert streamed(console, *"漢字" * 6).split("\n") == ["漢字" * 5, "漢字", ""]


def test_lines_are_whole_where_there_is_no_terminal() -> None:
    plain = Console(file=io.StringIO(), width=20, force_terminal=False)
    assert streamed(plain, "word " * 20, "end") == "word " * 20 + "end\n"
