"""Win rate by a chat model behind an endpoint: both orders, what is kept, what is spent, and judges that are unwell."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from chat_server import ChatServer
from json_server import Failure

from prefold.errors import StageError, UserError
from prefold.evaluation.win_rate import FAILURES_IN_A_ROW, measure_win_rate, open_judge
from prefold.recipe import EndpointJudge


def samples(count: int, before: str = "old", after: str = "new") -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": f"Why {place}?"}], "before": [before], "after": [f"{after} {place}"]}
        for place in range(count)
    ]


def measured(server: ChatServer, answers: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    spec = EndpointJudge(**{"endpoint": server.address, "model": "big", "concurrency": 3, **changes})
    return measure_win_rate(open_judge(spec, lambda texts: []), answers)


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """Both answers of a question, in their order."""
    text = body["messages"][0]["content"]
    found = re.search(r"\[Answer 1\]\n(.*?)\n\n\[Answer 2\]\n(.*?)\n\n\[End\]", text, re.DOTALL)
    assert found is not None
    return found[1], found[2]


def likes_new(body: dict[str, Any]) -> str:
    return "1" if shown(body)[0].startswith("new") else "2"


def test_both_orders_are_asked(chat_server: ChatServer) -> None:
    chat_server.answer = likes_new
    found = measured(chat_server, samples(8))
    assert (found["wins"], found["win_rate"], found["verdict"]) == (8, 1.0, "better")
    assert sorted(shown(body)[0][:3] for body in chat_server.requests) == ["new"] * 8 + ["old"] * 8
    assert all(body["temperature"] == 0 for body in chat_server.requests)


def test_a_judge_that_goes_by_the_order_makes_ties(chat_server: ChatServer) -> None:
    chat_server.answer = lambda body: "1"
    found = measured(chat_server, samples(6))
    assert (found["ties"], found["win_rate"], found["p_value"]) == (6, 0.5, 1.0)


def test_equal_answers_are_even_without_a_question(chat_server: ChatServer) -> None:
    found = measured(chat_server, [{"prompt": [], "before": ["same"], "after": ["same"]}])
    assert found["ties"] == 1 and chat_server.requests == []


def test_nothing_is_asked_twice_and_the_cost_is_told(chat_server: ChatServer) -> None:
    def answer(body: dict[str, Any]) -> Failure:
        reply = {"choices": [{"message": {"content": likes_new(body)}}]}
        return Failure(body=json.dumps({**reply, "usage": {"prompt_tokens": 100, "completion_tokens": 2}}))

    chat_server.answer = answer
    first = measured(chat_server, samples(5))
    assert first["judge"] == {
        "kind": "endpoint",
        "name": "big",
        "cost": {"calls": 10, "prompt_tokens": 1000, "completion_tokens": 20},
    }
    again = measured(chat_server, samples(5))
    assert again["judge"]["cost"] == {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}
    assert {**again, "judge": 0} == {**first, "judge": 0} and len(chat_server.requests) == 10


@pytest.mark.parametrize("usage", [None, 3, "many", {}, {"prompt_tokens": None}, {"prompt_tokens": "x"}, []])
def test_odd_figures_of_use_are_passed_over(chat_server: ChatServer, usage: Any) -> None:
    reply = {"choices": [{"message": {"content": "1"}}], "usage": usage}
    chat_server.answer = lambda body: Failure(body=json.dumps(reply))
    assert measured(chat_server, samples(1))["judge"]["cost"] == {
        "calls": 2,
        "prompt_tokens": 0,
        "completion_tokens": 0,
    }


def test_nonsense_is_counted_and_left_out(chat_server: ChatServer) -> None:
    def answer(body: dict[str, Any]) -> str:
        return "Both have merits." if "Why 3?" in body["messages"][0]["content"] else likes_new(body)

    chat_server.answer = answer
    found = measured(chat_server, samples(8))
    assert (found["prompts"], found["wins"], found["left_out"]["no_verdict"]) == (7, 7, 1)
    assert found["replies_without_verdict"] == ["Both have merits."]


def test_a_judge_of_nonsense_is_given_up(chat_server: ChatServer) -> None:
    chat_server.answer = lambda body: "As a language model, I"
    with pytest.raises(StageError) as caught:
        measured(chat_server, samples(40))
    message = str(caught.value)
    assert f"names neither answer for {FAILURES_IN_A_ROW} pairs of answers in a row" in message
    assert "As a language model, I" in message and "to do: " in message
    assert len(chat_server.requests) < 40


def test_nonsense_for_all_of_a_few_is_no_rate(chat_server: ChatServer) -> None:
    chat_server.answer = lambda body: "?"
    with pytest.raises(StageError, match="names neither answer for any of 2 pairs"):
        measured(chat_server, samples(2))


def test_what_the_endpoint_refuses_is_counted(chat_server: ChatServer) -> None:
    def answer(body: dict[str, Any]) -> str | Failure:
        too_long = "Why 1?" in body["messages"][0]["content"]
        return Failure(400, '{"error": {"message": "too long"}}') if too_long else likes_new(body)

    chat_server.answer = answer
    found = measured(chat_server, samples(4))
    assert found["left_out"]["refused"] == 1 and found["prompts"] == 3


def test_a_judge_that_is_down_is_one_message_and_what_was_judged_is_kept(chat_server: ChatServer) -> None:
    chat_server.answer = lambda body: likes_new(body) if "Why 0?" in str(body["messages"]) else Failure(503, "busy")
    with pytest.raises(UserError, match=r"(?s)HTTP 503.*6 tries.*what was done is kept") as caught:
        measured(chat_server, samples(2), concurrency=1)
    assert chat_server.address in str(caught.value)
    asked = len(chat_server.requests)
    chat_server.answer = likes_new
    assert measured(chat_server, samples(2), concurrency=1)["wins"] == 2
    assert len(chat_server.requests) == asked + 2


def test_nobody_there_is_one_message(chat_server: ChatServer) -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        measured(chat_server, samples(1), endpoint="http://127.0.0.1:1/v1")


def test_an_address_that_is_none_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(UserError, match="is not the address of an endpoint"):
        open_judge(EndpointJudge(endpoint="localhost", model="big"), lambda texts: [])
