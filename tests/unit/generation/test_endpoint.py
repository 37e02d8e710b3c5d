"""The client of chat endpoints against a real server on this machine, well and unwell."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from chat_server import ChatServer
from json_server import Failure

from prefold.data.preference import Message, Prompt, RowId
from prefold.errors import UserError
from prefold.generation import endpoint, http
from prefold.generation.endpoint import Endpoint
from prefold.generation.http import Refused, in_parallel
from prefold.generation.journal import Journal, key_of
from prefold.rewards.judge import Judge, NoVerdict

ASKED = [Message(role="user", content="Why?")]
SECRET = "sk-averysecretkey"


def refusal(server: ChatServer, timeout: float = 5.0) -> UserError:
    with pytest.raises(UserError) as caught:
        Endpoint(server.address, "m", timeout).ask(ASKED)
    return caught.value


@pytest.mark.parametrize("path", ["", "/", "/chat/completions"])
def test_an_answer(chat_server: ChatServer, path: str) -> None:
    chat_server.answer = lambda body: " So. \n"
    assert Endpoint(chat_server.address + path, "m").ask(ASKED, temperature=0.5, seed=3).text == "So."
    sent = {"model": "m", "messages": ASKED, "temperature": 0.5, "seed": 3}
    assert chat_server.requests == [{"path": "/v1/chat/completions", **sent}]
    assert chat_server.keys == [None]


def test_the_key_is_sent_and_never_shown(chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    chat_server.failures = [Failure(401, f'{{"error": {{"message": "bad key {SECRET}"}}}}')]
    error = refusal(chat_server)
    assert chat_server.keys == [f"Bearer {SECRET}"]
    assert "HTTP 401: bad key ***" in str(error) and SECRET not in str(error)
    assert "set the environment variable OPENAI_API_KEY" in str(error)


@pytest.mark.parametrize(
    "failure",
    [
        Failure(500, "oops"),
        Failure(503, '{"error": "busy"}'),
        Failure(429, headers={"Retry-After": "0.02"}),
        Failure(429, headers={"Retry-After": "soon"}),
        Failure(408),
        Failure(200, "<html>"),
    ],
)
def test_what_goes_away_is_tried_again(chat_server: ChatServer, failure: Failure) -> None:
    chat_server.failures = [failure, failure]
    assert Endpoint(chat_server.address, "m").ask(ASKED, seed=1) == ("w w", True)
    assert len(chat_server.requests) == 3


@pytest.mark.parametrize("as_date", [False, True])
def test_the_server_says_how_long_to_wait(
    chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch, as_date: bool
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=31))
    chat_server.failures = [Failure(429, headers={"Retry-After": date if as_date else "30"})]
    chat_server.failures += [Failure(429, headers={"Retry-After": "1e9"})]
    Endpoint(chat_server.address, "m").ask(ASKED)
    # The server of this test sleeps for its answers, too.
    asked = [seconds for seconds in waited if seconds]
    assert asked == [pytest.approx(30, abs=2), http.LONGEST_WAIT]


def test_waits_grow(chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "WAITS", (1.0, 2.0, 4.0))
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    chat_server.failures = [Failure(500, "oops")] * 4
    assert "HTTP 500: oops (4 tries)" in str(refusal(chat_server))
    assert [seconds for seconds in waited if seconds] == [1.0, 2.0, 4.0]


def test_a_slow_answer(chat_server: ChatServer) -> None:
    chat_server.failures = [Failure(seconds=0.4)]
    assert Endpoint(chat_server.address, "m", timeout=0.2).ask(ASKED, seed=0).text == "w"
    chat_server.failures = [Failure(seconds=0.2)] * 6
    assert "no answer within 0.05 s (6 tries)" in str(refusal(chat_server, timeout=0.05))


def test_an_endpoint_that_is_down() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(endpoint, "WAITS", (0.0,))
        with pytest.raises(UserError) as caught:
            Endpoint("http://127.0.0.1:9/v1", "m").ask(ASKED)
    assert "http://127.0.0.1:9/v1: cannot be reached" in str(caught.value)
    assert "what was done is kept" in str(caught.value)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (Failure(404, '{"detail": "no model"}'), "HTTP 404: no model\n  to do: check the address"),
        (Failure(403), "HTTP 403: Forbidden"),
        (Failure(400, '{"error": {"message": "too long"}}'), "HTTP 400: too long"),
        (Failure(302, headers={"Location": "/elsewhere"}), "HTTP 302"),
        (Failure(200, "[]"), "its reply holds no answer: []\n  expected: the chat-completions protocol"),
        (Failure(200, '{"choices": []}'), 'its reply holds no answer: {"choices": []}'),
        (Failure(200, '{"choices": [{"text": "So."}]}'), "its reply holds no answer"),
        (Failure(200, '{"choices": [{"message": {"content": 5}}]}'), "its reply holds no answer"),
    ],
)
def test_what_does_not_go_away_is_said_at_once(chat_server: ChatServer, failure: Failure, message: str) -> None:
    chat_server.failures = [failure]
    error = refusal(chat_server)
    assert f"{chat_server.address}: {message}" in str(error)
    assert len(chat_server.requests) == 1
    assert isinstance(error, Refused) == (failure.status == 400)


def test_broken_json_that_stays_is_shown(chat_server: ChatServer) -> None:
    chat_server.failures = [Failure(200, '{"choices": [')] * 6
    assert 'its reply is not JSON: {"choices": [ (6 tries)' in str(refusal(chat_server))


@pytest.mark.parametrize("content", ["null", '""', '"\\ud800"'])
def test_empty_and_odd_contents_are_answers(chat_server: ChatServer, content: str) -> None:
    chat_server.failures = [Failure(200, f'{{"choices": [{{"message": {{"content": {content}}}}}]}}')]
    assert Endpoint(chat_server.address, "m").ask(ASKED).text in ("", "?")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "is not the address of an endpoint"),
        ("ftp://host/v1", "is not the address of an endpoint"),
        ("", "is not the address of an endpoint"),
        ("http://host:port/v1", "is not the address of an endpoint"),
        (f"http://me:{SECRET}@host/v1", "the address of an endpoint holds a password"),
    ],
)
def test_addresses_that_are_none(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Endpoint(url, "m")
    assert SECRET not in str(caught.value)


def test_a_key_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\nmore")
    with pytest.raises(UserError, match="OPENAI_API_KEY holds characters") as caught:
        Endpoint("http://host/v1", "m")
    assert SECRET not in str(caught.value)


# ---- in parallel ------------------------------------------------------------------------------------------------


def test_in_parallel_is_parallel_and_complete() -> None:
    together = threading.Barrier(3, timeout=5)

    def doubled(item: int) -> int:
        assert threading.current_thread().daemon
        if item < 3:
            together.wait()
        return 2 * item

    assert sorted(in_parallel(doubled, range(20), workers=3)) == [(item, 2 * item) for item in range(20)]


def test_in_parallel_stops_at_an_error() -> None:
    done: list[int] = []

    def failing(item: int) -> None:
        done.append(item)
        time.sleep(0.01)
        if item == 1:
            raise UserError("no")

    with pytest.raises(UserError):
        list(in_parallel(failing, range(100), workers=1))
    time.sleep(0.1)
    assert len(done) < 5


# ---- journal ----------------------------------------------------------------------------------------------------


def test_a_journal_survives_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "work"
    Journal(path).add("a", [1, None])
    with path.open("ab") as file:
        file.write(b'["b", [2')
    again = Journal(path)
    assert "b" not in again and again["a"] == [1, None]
    again.add("c", "\ud800 and \u2028")
    last = Journal(path)
    assert (last["a"], last["c"]) == ([1, None], "\ud800 and \u2028") and "b" not in last


def test_a_file_that_is_no_journal_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "work").write_bytes(b'\xff\xfe\n{"a": 1}\n5\n[1, 2]\n[1, 2, 3]\nnull\n')
    assert "a" not in Journal(tmp_path / "work")


def test_keys_differ_where_values_do() -> None:
    keys = [key_of(1), key_of("1"), key_of([1]), key_of(1, 2), key_of({"a": 1, "b": 2})]
    assert len(set(keys)) == len(keys)
    assert key_of({"b": 2, "a": 1}) == keys[-1]


# ---- judge ------------------------------------------------------------------------------------------------------


def judge(server: ChatServer, cache: Path) -> Judge:
    cache.mkdir(exist_ok=True)
    return Judge.at(Endpoint(server.address, "j"), cache)


def answers_shown(body: dict[str, list[dict[str, str]]]) -> tuple[str, str]:
    text = body["messages"][0]["content"]
    first, second = text.partition("[Answer 1]\n")[2].partition("\n\n[Answer 2]\n")[::2]
    return first, second.partition("\n\n[End]")[0]


def test_the_judge_asks_both_orders_and_nothing_twice(chat_server: ChatServer, tmp_path: Path) -> None:
    def longer(body: dict[str, list[dict[str, str]]]) -> str:
        first, second = answers_shown(body)
        return "1" if len(first) > len(second) else "2."

    chat_server.answer = longer
    completions = ["a {b}", "longest of all", "a {b}", "x"]
    # Won against three; against the last and half against its twin; against none.
    expected = pytest.approx([1.5 / 3, 1, 1.5 / 3, 0])
    assert judge(chat_server, tmp_path / "c").shares(ASKED, completions) == expected
    asked = [answers_shown(body) for body in chat_server.requests]
    assert ("a {b}", "x") in asked and ("x", "a {b}") in asked and ("a {b}", "a {b}") not in asked
    # Five pairs of answers differ, but two of them are the same ones again.
    assert len(asked) == len(set(asked)) == 6
    assert "user: Why?" in chat_server.requests[0]["messages"][0]["content"]
    assert judge(chat_server, tmp_path / "c").shares(ASKED, completions) == expected
    assert len(chat_server.requests) == 6


def test_a_judge_that_goes_by_the_order_is_not_believed(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.answer = lambda body: "1"
    assert judge(chat_server, tmp_path).shares(ASKED, ["a", "b", "c"]) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "reply", ["1", " 2. ", "**1**", "Answer 1", "The better answer is 2", "<think>1 or 2?</think>\n1"]
)
def test_replies_that_are_verdicts(chat_server: ChatServer, tmp_path: Path, reply: str) -> None:
    chat_server.answer = lambda body: reply
    assert judge(chat_server, tmp_path).shares(ASKED, ["a", "b"]) == [0.5, 0.5]


@pytest.mark.parametrize("reply", ["", "both", "3", "12", "1 or 2", "Answer 1 is worse", "I like 2 better than 1"])
def test_replies_that_are_none(chat_server: ChatServer, tmp_path: Path, reply: str) -> None:
    chat_server.answer = lambda body: reply
    with pytest.raises(NoVerdict):
        judge(chat_server, tmp_path).shares(ASKED, ["a", "b"])


def test_what_a_prompt_gives_its_template_is_sent() -> None:
    prompt = Prompt((), {}, RowId("a", 1), {"tools": [{"type": "function"}], "enable_thinking": False})
    assert endpoint.beside_messages(prompt) == {
        "tools": [{"type": "function"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert endpoint.beside_messages(Prompt((), {}, RowId("a", 1))) == {}
