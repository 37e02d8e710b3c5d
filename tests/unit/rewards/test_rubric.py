"""The rubric: scores by hand, what is asked and kept, what it costs, and models that do not keep to the schema."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from chat_server import ChatServer
from json_server import Failure

from prefold.data.preference import Message, Prompt, RowId
from prefold.errors import StageError, UserError
from prefold.recipe import Reward, make_section, parse_reward
from prefold.recipe.rewards import Rubric, WinRate
from prefold.rewards.load import load_rewards
from prefold.rewards.rubric import TRIES
from prefold.rewards.scoring import LoadedReward, Scores, costs_of, score

CRITERIA = [
    {"name": "correct", "text": "The number is right.", "weight": 3},
    {"name": "short", "text": "It is one sentence."},
    {"name": "polite", "text": "It is polite.", "weight": 0.5},
]
PROMPT = [Message(role="user", content="How many?")]


def rubric(address: str, **changes: Any) -> LoadedReward:
    values = {"name": "rubric", "endpoint": address, "model": "big", "criteria": CRITERIA, **changes}
    [reward] = load_rewards([make_section(Reward, values)], ["prompts", "completions"])
    return reward


def scores(reward: LoadedReward, *completions: str) -> Scores:
    [found] = score([reward], [PROMPT] * len(completions), completions, None, {})
    return found


def names_what_is_met(body: dict[str, Any]) -> str:
    """Met is each criterion whose name the answer holds."""
    answer = re.search(r"\[Answer\]\n(.*?)\n\n\[Criteria\]", body["messages"][0]["content"], re.DOTALL)
    assert answer is not None
    return json.dumps({criterion["name"]: criterion["name"] in answer[1] for criterion in CRITERIA})


def test_the_score_is_the_share_of_the_weights(chat_server: ChatServer) -> None:
    chat_server.answer = names_what_is_met
    found = scores(rubric(chat_server.address), "correct", "short polite", "", "correct short polite")
    # Weights 3, 1 and 0.5 of 4.5.
    assert found.values == [3 / 4.5, 1.5 / 4.5, 0.0, 1.0]


def test_what_is_asked(chat_server: ChatServer) -> None:
    chat_server.answer = names_what_is_met
    scores(rubric(chat_server.address), "short")
    [body] = chat_server.requests
    assert body["model"] == "big" and body["temperature"] == 0
    text = body["messages"][0]["content"]
    assert "user: How many?" in text and "correct: The number is right." in text
    schema = body["response_format"]["json_schema"]
    assert body["response_format"]["type"] == "json_schema" and schema["strict"] is True
    assert schema["schema"] == {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in ("correct", "short", "polite")},
        "required": ["correct", "short", "polite"],
        "additionalProperties": False,
    }


def test_nothing_is_asked_twice_and_costs_are_those_of_the_scores(chat_server: ChatServer) -> None:
    def answer(body: dict[str, Any]) -> Failure:
        reply = {"choices": [{"message": {"content": names_what_is_met(body)}}]}
        return Failure(body=json.dumps({**reply, "usage": {"prompt_tokens": 100, "completion_tokens": 7}}))

    chat_server.answer = answer
    texts = ["short", "polite", "short"]
    rows = [(Prompt(tuple(PROMPT), {}, RowId("p", 1)), text) for text in texts]
    first = rubric(chat_server.address)
    values = scores(first, *texts).values
    assert len(chat_server.requests) == 2
    # Another weight asks nothing anew; the cost is what these scores took, whenever they were asked for.
    again = rubric(chat_server.address, weight=2.0)
    assert scores(again, *texts).values == values and len(chat_server.requests) == 2
    cost = {"rubric": {"calls": 2, "prompt_tokens": 200, "completion_tokens": 14}}
    assert costs_of([first], rows) == costs_of([again], rows) == cost
    assert costs_of([again], [(rows[0][0], "never asked for")]) == {"rubric": {}}


VALID = '{"correct": true, "short": false, "polite": true}'


@pytest.mark.parametrize("reply", [VALID, f"<think>{{}} hm</think>\n{VALID}", f"```json\n{VALID}\n```", f" {VALID} "])
def test_valid_replies(reply: str, chat_server: ChatServer) -> None:
    chat_server.answer = lambda body: reply
    assert scores(rubric(chat_server.address), "any").values == [3.5 / 4.5]


MALFORMED = [
    "Yes.",
    "",
    None,
    "[true, false, true]",
    '{"correct": true, "short": true}',
    '{"correct": true, "short": true, "polite": true, "more": true}',
    '{"correct": 1, "short": 0, "polite": 1}',
    '{"correct": "yes", "short": true, "polite": true}',
    VALID[:-1],
]


@pytest.mark.parametrize("reply", MALFORMED)
def test_a_malformed_reply_is_asked_for_again_and_then_the_run_stops(reply: str, chat_server: ChatServer) -> None:
    replies = iter([reply, VALID])
    chat_server.answer = lambda body: next(replies)
    reward = rubric(chat_server.address)
    assert scores(reward, "mended").values == [3.5 / 4.5]
    assert [body["temperature"] for body in chat_server.requests] == [0, 1]
    chat_server.requests.clear()
    chat_server.answer = lambda body: reply if "stubborn" in body["messages"][0]["content"] else VALID
    with pytest.raises(StageError) as caught:
        scores(reward, "fine", "stubborn")
    assert len([body for body in chat_server.requests if "stubborn" in body["messages"][0]["content"]]) == TRIES
    assert f"got no reply in its JSON schema in {TRIES} tries" in str(caught.value)
    assert "completion: 'stubborn'" in str(caught.value) and "to do: " in str(caught.value)


def test_a_completion_that_gets_no_valid_reply_can_be_skipped(chat_server: ChatServer) -> None:
    chat_server.answer = lambda body: "no" if "stubborn" in body["messages"][0]["content"] else VALID
    found = scores(rubric(chat_server.address, on_error="skip"), "fine", "stubborn")
    assert found.values == [3.5 / 4.5, None] and found.failed == {1}


def test_a_server_without_schemas_says_so(chat_server: ChatServer) -> None:
    chat_server.failures = [Failure(400, '{"error": {"message": "response_format is not supported"}}')]
    with pytest.raises(UserError, match="response_format is not supported"):
        scores(rubric(chat_server.address), "any")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criteria": []}, "`criteria`"),
        ({"criteria": None}, "`rubric` needs `criteria`"),
        ({"endpoint": None}, "`rubric` needs `endpoint`"),
        ({"criteria": [CRITERIA[0], CRITERIA[0]]}, "two criteria are called `correct`"),
        ({"criteria": [{**CRITERIA[0], "weight": 0}]}, "greater than 0"),
        ({"criteria": [{**CRITERIA[0], "weight": float("inf")}]}, "finite"),
        ({"criteria": [{**CRITERIA[0], "name": "two words"}]}, "`criteria.0.name`"),
        ({"criteria": [{"name": "correct"}]}, "`criteria.0.text` is missing"),
        ({"criteria": ["It is short."]}, "`criteria.0`"),
        ({"endpoint": "http://me:secret@host/v1"}, "holds a password"),
        ({"endpoint": "localhost:8000"}, "is not the address of an endpoint"),
        ({"target": 5}, "`target` is not a setting of `rubric`"),
    ],
)
def test_what_is_wrong_is_said_without_asking(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        rubric("http://localhost:1/v1", **changes)
    assert message in str(caught.value)


def test_by_the_command_line() -> None:
    text = "rubric:endpoint=http://h/v1,model=big,criteria=[{name: short, text: 'Short, and clear.'}],weight=2"
    reward = parse_reward(text)
    assert reward.weight == 2
    assert Rubric(**reward.settings).criteria[0].text == "Short, and clear."
    assert Reward.model_validate_json(reward.model_dump_json()) == reward


def test_as_a_judge_of_answers() -> None:
    spec = {"name": "rubric", "endpoint": "http://h/v1", "model": "big", "criteria": CRITERIA}
    assert isinstance(make_section(WinRate, {"judge": spec}).judge, Reward)
