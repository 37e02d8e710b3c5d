"""Talking: what the page offers, how answers come, and how models are let go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from prefold.ui import ahead, speakers, talk
from prefold.ui.ahead import work_in
from prefold.ui.speakers import ENDED, speaker_of
from prefold.ui.vote import comparisons_of

Client = Callable[..., TestClient]
ASKED = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def fake_models(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(speakers, "COMMAND", (sys.executable, str(Path(__file__).with_name("fake_speaker.py"))))
    monkeypatch.setattr(speakers, "_SPEAKERS", {})
    monkeypatch.setattr(ahead, "_WORK", {})
    yield
    for speaker in speakers._SPEAKERS.values():
        speaker.end()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "one"
    for inner in ("merged", "checkpoints/checkpoint-4", "checkpoints/checkpoint-10", "checkpoints/broken-checkpoint-2"):
        (folder / inner).mkdir(parents=True)
    (folder / "recipe.yaml").write_text("method: dpo\n")
    (folder / "run.log").write_text("")
    return folder


def post(client: TestClient, action: str, **fields: Any) -> Any:
    sent = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    return client.post(f"/talk/{action}", data=sent, headers={"origin": "http://127.0.0.1:8000"})


def events(response: Any) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n") if event]


def begins(given: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """With the whole answer waited for."""
    every = [*given]
    return every[0]


def said(given: Iterator[dict[str, Any]]) -> dict[str, Any]:
    return [*given][-1]


def test_a_run_has_models_before_between_and_after(ui_client: Client, run: Path) -> None:
    assert list(talk.models_of(run)) == ["before", "checkpoint-4", "checkpoint-10", "after"]
    page = ui_client(run.parent).get("/talk").text
    assert page.count(f'<option value="{run}" selected>one</option>') == 2
    assert page.count('<option value="before" selected>before training</option>') == 1
    assert page.count('<option value="after" selected>after training</option>') == 1
    (run / "merged").rmdir()
    assert '<option value="checkpoint-10" selected>' in ui_client(run.parent).get("/talk").text


def test_an_answer_comes_word_by_word(ui_client: Client, run: Path) -> None:
    client = ui_client(run.parent)
    found = events(post(client, "answer", run=str(run), which="after", messages=ASKED, temperature="0.5", attempt="2"))
    assert found[0] == {"loading": True}
    assert [event["text"] for event in found[1:-1]] == ["after ", "2: ", "hello "]
    assert found[-1] == {"answer": "after 2: hello", "shown": "after 2: hello", "finished": True, "stopped": False}
    # It is there now.
    assert "loading" not in events(post(client, "answer", run=str(run), which="after", messages=ASKED))[0]


def test_what_steers_a_terminal_or_turns_text_round_is_shown_as_such(ui_client: Client, run: Path) -> None:
    asked = [{"role": "user", "content": "\x1b[31m\u202e<script>"}]
    last = events(post(ui_client(run.parent), "answer", run=str(run), which="after", messages=asked))[-1]
    assert last["answer"] == "after 0: \x1b[31m\u202e<script>" and last["shown"] == "after 0: ␛[31m\ufffd<script>"


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"which": "checkpoint-5"}, 404, "no such model"),
        ({"which": "../one"}, 404, "no such model"),
        ({"run": "/etc"}, 403, "in none of the folders"),
        ({"messages": "[{"}, 400, "cannot be read"),
        ({"messages": []}, 400, "has no messages"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "not text"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "Hi."}]}, 400, "the last message"),
        ({"temperature": "hot"}, 400, "`temperature` is"),
        ({"temperature": "-1"}, 400, "`temperature` is"),
        ({"attempt": "x"}, 400, "An attempt"),
    ],
)
def test_what_cannot_be_asked_is_said_before_a_model_is_loaded(
    ui_client: Client, run: Path, fields: dict[str, Any], status: int, text: str
) -> None:
    answer = post(ui_client(run.parent), "answer", **{"run": str(run), "which": "after", "messages": ASKED, **fields})
    assert answer.status_code == status and text in answer.text
    assert not any(speaker.is_loaded for speaker in speakers._SPEAKERS.values())


def test_a_model_that_cannot_be_had_says_why_each_time(run: Path) -> None:
    (run / "cannot").touch()
    speaker = speaker_of(run, "before")
    for _ in range(2):
        assert said(speaker.ask(ASKED, {})) == {"error": "out of memory: the model does not fit"}
    assert not speaker.is_loaded


def test_a_model_that_dies_is_loaded_anew(run: Path) -> None:
    speaker = speaker_of(run, "after")
    assert said(speaker.ask([{"role": "user", "content": "die"}], {})) == {"error": ENDED}
    assert said(speaker.ask(ASKED, {}))["answer"] == "after 0: hello"
    assert said(speaker.ask([{"role": "user", "content": "fail"}], {})) == {"error": "the prompt is too long"}
    assert said(speaker.ask(ASKED, {}))["answer"] == "after 0: hello"


def test_a_model_that_was_trained_anew_is_loaded_anew(run: Path) -> None:
    speaker = speaker_of(run, "after")
    assert begins(speaker.ask(ASKED, {})) == {"loading": True}
    (run / "merge.json").write_text("{}")
    assert begins(speaker.ask(ASKED, {})) == {"loading": True}
    assert "loading" not in begins(speaker.ask(ASKED, {}))
    (run / "merge.json").write_text("{} ")
    os.utime(run / "merge.json", (1, 1))
    assert begins(speaker.ask(ASKED, {})) == {"loading": True}


def test_an_answer_is_stopped_and_what_was_said_is_kept(run: Path) -> None:
    speaker = speaker_of(run, "after")
    coming = speaker.ask([{"role": "user", "content": "go on"}], {})
    assert [next(coming) for _ in range(3)][1:] == [{"text": "word "}] * 2
    speaker.stop()
    last = said(coming)
    assert last["stopped"] and last["answer"].startswith("word word")
    assert said(speaker.ask(ASKED, {}))["answer"] == "after 0: hello"


def test_an_answer_that_nobody_waits_for_is_stopped(run: Path) -> None:
    """Nor does anything of it get into the next one."""
    speaker = speaker_of(run, "after")
    coming = speaker.ask([{"role": "user", "content": "go on"}], {})
    assert [next(coming) for _ in range(3)]
    coming.close()
    assert not speaker.asking.locked()
    assert [event.get("text") for event in speaker.ask(ASKED, {})] == ["after ", "0: ", "hello ", None]


def test_the_server_holds_no_library_of_models() -> None:
    code = "import sys, prefold.ui.server; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_models_are_let_go_when_nobody_talks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speakers, "IDLE", 0.4)
    speaker = speaker_of(run, "after")
    said(speaker.ask(ASKED, {}))
    process, until = speaker.process, time.monotonic() + 20
    assert process is not None
    while speaker.is_loaded and time.monotonic() < until:
        time.sleep(0.05)
    assert not speaker.is_loaded and process.poll() is not None


def test_a_third_model_takes_the_room_of_the_one_asked_longest_ago(run: Path) -> None:
    names = ["before", "checkpoint-4", "after"]
    every = []
    for name in names:
        every.append(speaker_of(run, name))
        said(every[-1].ask(ASKED, {}))
    assert [speaker.is_loaded for speaker in every] == [False, True, True]


def test_models_that_do_not_fit_together_take_turns(run: Path) -> None:
    """Both are asked at once, as the page does, three times; the answer that is being given is not cut off."""
    (run / "small").touch()
    both = [speaker_of(run, name) for name in ("before", "after")]
    for attempt in range(3):
        with ThreadPoolExecutor() as pool:
            ends = pool.map(said, [speaker.ask(ASKED, {}, attempt) for speaker in both])
        assert [end.get("answer") for end in ends] == [f"before {attempt}: hello", f"after {attempt}: hello"]
        assert [speaker.is_loaded for speaker in both].count(True) == 1
    assert said(speaker_of(run, "checkpoint-4").ask(ASKED, {}))["answer"] == "checkpoint-4 0: hello"


BOTH = {"which_a": "before", "which_b": "after"}


def test_two_answers_are_put_to_the_vote(ui_client: Client, run: Path) -> None:
    client, both = ui_client(run.parent), {"run_a": str(run), "run_b": str(run), **BOTH}
    given = {**both, "messages": ASKED, "answers": ["Hi.", "Hello."]}
    assert post(client, "compare", **given).json() == {"deck": str(run.parent)}
    [compared] = comparisons_of(run.parent).values()
    assert (compared.prompt, compared.answers) == (ASKED, ("Hi.", "Hello."))
    assert compared.models == ("one, before training", "one, after training")
    assert "hello" in client.get("/vote", params={"deck": str(run.parent), "voter": "Ann"}).text
    assert "what was talked about" in client.get("/vote").text
    for wrong in ({"answers": ["Hi.", "Hi."]}, {"answers": ["Hi."]}, {"answers": "x"}, {"which_a": "checkpoint-5"}):
        assert post(client, "compare", **{**given, **wrong}).status_code in (400, 404)


# ---- many prompts -----------------------------------------------------------------------------------------------


def until_over(client: TestClient, folder: Path) -> str:
    until = time.monotonic() + 30
    while not (work := work_in(folder)) or not work.is_over:
        assert time.monotonic() < until
        time.sleep(0.02)
    return client.get("/talk/ahead").text


def held_out(run: Path, *texts: str) -> None:
    (run / "evaluation").mkdir(exist_ok=True)
    lines = [{"prompt": [{"role": "user", "content": text}], "chosen": []} for text in texts]
    (run / "evaluation" / "heldout.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_both_answer_what_was_held_out(ui_client: Client, run: Path) -> None:
    """Each different prompt once, as many as are wanted."""
    client = ui_client(run.parent)
    held_out(run, "one", "two", "one", "three", "four")
    given = {"run_a": str(run), "run_b": str(run), **BOTH, "prompts": "held-out", "count": "3"}
    assert post(client, "ahead", **given).status_code == 200
    state = until_over(client, run.parent)
    assert "3 of 3 prompts answered by" in state and ", 3 by" in state and "data-goes-on" not in state
    found = [*comparisons_of(run.parent).values()]
    assert [each.prompt[0]["content"] for each in found] == ["one", "two", "three"]
    assert found[0].answers == ("before 0: one", "after 0: one")
    assert found[0].models == ("one, before training", "one, after training")


def test_both_answer_the_prompts_of_a_file(ui_client: Client, run: Path) -> None:
    """Those of pairs as well; answers that are the same are counted and not voted on."""
    client, file = ui_client(run.parent), run.parent / "pairs.jsonl"
    rows = [{"prompt": text, "chosen": "So.", "rejected": "No."} for text in ("one", "two", "fail", "three")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"run_a": str(run), "run_b": str(run), "which_a": "after", "which_b": "after", "count": "2"}
    post(client, "ahead", **given, prompts=str(file))
    assert ", 2 by" in (state := until_over(client, run.parent)) and "2 of them alike" in state
    post(client, "ahead", **{**given, **BOTH, "count": "4"}, prompts="pairs.jsonl")
    state = until_over(client, run.parent)
    assert "2 of 4 prompts answered" in state and ", 2 by" in state and "the prompt is too long" in state
    assert len(comparisons_of(run.parent)) == 2


def test_models_that_do_not_fit_together_answer_all_prompts_in_turn(ui_client: Client, run: Path) -> None:
    """Each is loaded once."""
    (run / "small").touch()
    client = ui_client(run.parent)
    held_out(run, "one", "two", "three")
    post(client, "ahead", run_a=str(run), run_b=str(run), **BOTH, prompts="held-out", count="3")
    assert ", 3 by" in until_over(client, run.parent)
    assert (run / "small").read_text().split() == ["before", "after"]


def test_making_answers_can_be_stopped_and_is_not_begun_twice(ui_client: Client, run: Path) -> None:
    client = ui_client(run.parent)
    held_out(run, *map(str, range(500)))
    given = {"run_a": str(run), "run_b": str(run), **BOTH, "prompts": "held-out", "count": "500"}
    assert "data-goes-on" in post(client, "ahead", **given).text
    assert post(client, "ahead", **given).status_code == 400
    post(client, "ahead/stop")
    assert "data-goes-on" not in until_over(client, run.parent)
    assert len(comparisons_of(run.parent)) < 500


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"count": "0"}, 400),
        ({"count": "many"}, 400),
        ({"prompts": "/etc/passwd"}, 403),
        ({"prompts": "missing.jsonl"}, 400),
        ({"prompts": ""}, 400),
        ({"prompts": "one"}, 400),
        ({"which_b": "x"}, 404),
        ({"temperature": "hot"}, 400),
    ],
)
def test_prompts_that_cannot_be_answered(ui_client: Client, run: Path, fields: dict[str, str], status: int) -> None:
    given = {"run_a": str(run), "run_b": str(run), **BOTH, "prompts": "held-out", "count": "3"}
    assert post(ui_client(run.parent), "ahead", **{**given, **fields}).status_code == status
    assert work_in(run.parent) is None
