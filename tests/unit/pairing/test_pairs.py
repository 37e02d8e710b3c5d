"""Pairs from a model's own answers: local and remote, scored and judged, stopped and gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, words
from json_server import Failure
from tiny import tiny_llama
from tiny_tokenizer import CHATML, STRICT, make_tokenizer

from prefold.cli import main
from prefold.data import shapes
from prefold.data.conversion import to_records
from prefold.data.preference import Preference
from prefold.data.shapes import find_shape
from prefold.data.sources import read_rows
from prefold.errors import StageError, UserError
from prefold.generation import endpoint
from prefold.generation import samplers as samples
from prefold.generation.journal import Journal
from prefold.pairing.make import make_pairs
from prefold.pairing.scores import Candidate, best_pair
from prefold.recipe import Pairs, Source, make_section, parse_reward

LENGTH = "length:target=0,unit=characters"


def changed(settings: Pairs, **changes: Any) -> Pairs:
    return make_section(Pairs, {**dict(settings), **changes})


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", CHATML)


def save_model(folder: Path, template: str) -> Path:
    tokenizer = make_tokenizer(template, bos="<|im_start|>")
    end = tokenizer.eos_token_id
    model = tiny_llama(
        vocab_size=len(tokenizer), initializer_range=0.05, eos_token_id=end, pad_token_id=end, bos_token_id=None
    )
    # So that random answers come to an end of their own.
    model.generation_config.eos_token_id = [end, *range(0, end, 4)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    write(path, [{"prompt": f"Say word {number}", "answer": str(number), "level": number} for number in range(12)])
    return path


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@pytest.fixture
def local(tiny_model: Path, prompts: Path, tmp_path: Path) -> Pairs:
    return Pairs(
        prompts=prompts,
        model=tiny_model,
        output=tmp_path / "pairs.jsonl",
        reward=LENGTH,
        max_new_tokens=16,
        temperature=1.0,
    )


@pytest.fixture
def remote(chat_server: ChatServer, prompts: Path, tmp_path: Path) -> Pairs:
    return Pairs(
        prompts=prompts,
        model="m",
        output=tmp_path / "pairs.jsonl",
        reward=LENGTH,
        endpoint=chat_server.address,
        concurrency=3,
    )


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trained_on(path: Path) -> list[Preference]:
    """The output as a run reads it: none of its rows may be left out."""
    rows = list(read_rows(Source(path=str(path))))
    shape = find_shape(rows, path.name)
    assert shape.kind == "pairs"
    records = [record for row in rows for record in to_records(row, shape)]
    assert all(isinstance(record, Preference) for record in records), records
    return [record for record in records if isinstance(record, Preference)]


# ---- what comes out ---------------------------------------------------------------------------------------------


def test_best_against_worst_of_a_remote_model(remote: Pairs, chat_server: ChatServer) -> None:
    report = make_pairs(remote)
    rows = rows_of(remote.output)
    assert report.pairs == len(rows) == report.prompts - sum(report.left_out.values())
    assert report.prompts == 12 and report.answers == 48 == len(chat_server.requests)
    answers: dict[str, list[str]] = {}
    for body in chat_server.requests:
        answers.setdefault(body["messages"][-1]["content"], []).append(chat_server.answer(body))
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 512, 0.8)
        assert "top_p" not in body and "n" not in body
    assert len({body["seed"] for body in chat_server.requests}) == 48
    for row in rows:
        lengths = sorted(map(len, answers[row["prompt"]]))
        assert (len(row["chosen"]), len(row["rejected"])) == (lengths[0], lengths[-1])
        assert (row["score_chosen"], row["score_rejected"]) == (-lengths[0], -lengths[-1])
        assert row["answer"] == row["prompt"].split()[-1]
    assert report.mean_score is not None
    assert report.mean_score["chosen"] > report.mean_score["all"] > report.mean_score["rejected"]
    assert [pair.ratings for pair in trained_on(remote.output)] == [
        (row["score_chosen"], row["score_rejected"]) for row in rows
    ]


def test_a_local_model(local: Pairs) -> None:
    report = make_pairs(local)
    assert report.pairs > 6
    first = local.output.read_bytes()
    assert len(trained_on(local.output)) == report.pairs
    make_pairs(changed(local, fresh=True))
    assert local.output.read_bytes() == first
    make_pairs(changed(local, seed=1))
    assert local.output.read_bytes() != first


def test_a_prompt_that_comes_again_gets_other_answers(local: Pairs, prompts: Path) -> None:
    write(prompts, [{"prompt": "Say it"}] * 8)
    make_pairs(local)
    work = local.output.with_name("pairs.jsonl.work").read_text().splitlines()
    answers = [tuple(text for text, _ in json.loads(line)[1]) for line in work[:8]]
    assert len(set(answers)) == 8


def test_token_ids_are_those_of_the_answer(local: Pairs) -> None:
    make_pairs(changed(local, reward=["length:target=0"]))
    tokenizer = make_tokenizer(CHATML)
    for row in rows_of(local.output):
        assert row["score_chosen"] == -len(tokenizer(row["chosen"], add_special_tokens=False)["input_ids"])


def test_rewards_add_up_and_see_columns(remote: Pairs, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def level(completions, level):\n    return [float(one) for one in level]\n")
    make_pairs(changed(remote, reward=[LENGTH, f"{tmp_path / 'mine.py'}:level,weight=1000"]))
    for row in rows_of(remote.output):
        assert row["score_chosen"] == 1000 * row["level"] - len(row["chosen"])


def test_two_models_and_their_own_endpoints(remote: Pairs, chat_server: ChatServer, tiny_model: Path) -> None:
    chat_server.answer = lambda body: body["model"] * 40
    make_pairs(changed(remote, model=["strong", "weak"], reward=["regex:pattern=strong"]))
    assert {(row["chosen"][:6], row["rejected"][:4]) for row in rows_of(remote.output)} == {("strong", "weak")}
    two = changed(remote, model=["strong", str(tiny_model)], endpoint=[chat_server.address, "local"])
    make_pairs(changed(two, reward=["regex:pattern=strong"], max_new_tokens=16))
    rows = rows_of(remote.output)
    assert {row["chosen"] for row in rows} == {"strong" * 40}
    assert all("strong" not in row["rejected"] for row in rows)


def test_the_first_model_is_preferred(remote: Pairs, chat_server: ChatServer) -> None:
    chat_server.answer = lambda body: body["model"]
    report = make_pairs(changed(remote, model=["a", "b"], reward=[], prefer_first=True))
    assert report.mean_score is None and len(chat_server.requests) == 24
    rows = rows_of(remote.output)
    assert len(rows) == 12
    assert all((row["chosen"], row["rejected"]) == ("a", "b") and "score_chosen" not in row for row in rows)


def test_the_judge_decides(remote: Pairs, chat_server: ChatServer) -> None:
    def reply(body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        if "[Answer 1]" not in text:
            return "abcd"[[one for one in asked if one[0] == text].index((text, body["seed"]))]
        first, second = re.findall(r"\[Answer \d\]\n(.)", text)
        return "1" if first < second else "2"

    asked: list[tuple[str, int]] = []

    def answer(body: dict[str, Any]) -> str:
        if "seed" in body:
            asked.append((body["messages"][-1]["content"], body["seed"]))
        return reply(body)

    chat_server.answer = answer
    judged = changed(remote, reward=["judge"], judge_endpoint=chat_server.address, judge_model="j")
    report = make_pairs(judged)
    assert report.pairs == 12
    assert all((row["chosen"], row["rejected"]) == ("a", "d") for row in rows_of(remote.output))
    assert all((row["score_chosen"], row["score_rejected"]) == (1, 0) for row in rows_of(remote.output))
    assert len(chat_server.requests) == 12 * (4 + 12)
    judged.output.with_name("pairs.jsonl.work").unlink()
    asked.clear()
    make_pairs(judged)
    assert len(chat_server.requests) == 12 * (4 + 12) + 12 * 4


def test_a_judge_without_a_verdict(
    remote: Pairs, chat_server: ChatServer, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"]
        if "seed" in body:
            return f"{body['seed']}"
        if "word 3\n" in text or "word 7\n" in text:
            return "both are lovely"
        first, second = map(int, re.findall(r"\[Answer \d\]\n(\d+)", text))
        return "1" if first < second else "2"

    chat_server.answer = answer
    judged = changed(remote, reward=["judge"], judge_endpoint=chat_server.address, judge_model="j")
    report = make_pairs(judged)
    assert report.left_out == {"no_verdict": 2} and report.pairs == 10
    chat_server.answer = lambda body: f"{body['seed']}" if "seed" in body else "Well ..."
    with pytest.raises(
        StageError, match=r"named neither answer for 10 prompts in a row; its last reply: 'Well \.\.\.'"
    ):
        make_pairs(changed(judged, judge_model="other"))


# ---- the best pair ----------------------------------------------------------------------------------------------


def candidates(*scored: tuple[str, float | None]) -> list[Candidate]:
    return [Candidate(text, 0, value) for text, value in scored]


@pytest.mark.parametrize(
    ("found", "margin", "ratio", "expected"),
    [
        (candidates(("b", 2), ("a", 1), ("c", 3), ("d", 1)), 0, None, ("c", "a")),
        (candidates(("b", 1), ("a", 1)), 0, None, "equal_scores"),
        (candidates(("b", 1), ("a", None)), 0, None, "too_few_answers"),
        (candidates(("b", 1)), 0, None, "too_few_answers"),
        (candidates(), 0, None, "too_few_answers"),
        (candidates(("b", 1), (" b ", 2)), 0, None, "identical"),
        (candidates(("b", 1), ("a", 2)), 1, None, ("a", "b")),
        (candidates(("b", 1), ("a", 2)), 1.5, None, "small_margin"),
        (candidates(("bbbb", 1), ("aa", 2)), 0, 2, ("aa", "bbbb")),
        (candidates(("bbbbb", 1), ("aa", 2)), 0, 2, "length_ratio"),
        # The best against the worst is out of bounds, the second best is not.
        (candidates(("bbbbbb", 9), ("aaa", 7), ("cc", 1)), 0, 2, ("aaa", "cc")),
        ("refused", 0, None, "refused"),
    ],
)
def test_best_pair(found: Any, margin: float, ratio: float | None, expected: Any) -> None:
    pair = best_pair(found, margin, ratio)
    assert (pair if isinstance(pair, str) else (pair[0].text, pair[1].text)) == expected


def test_an_answer_that_was_cut_off_is_in_no_pair() -> None:
    best, middle, worst = candidates(("a", 3), ("b", 2), ("c", 1))
    cut = replace(best, finished=False)
    assert best_pair([cut, middle, worst], 0, None) == (middle, worst)
    assert best_pair([cut, middle], 0, None) == "cut_off"


def test_an_endpoint_says_what_it_cut_off(remote: Pairs, chat_server: ChatServer) -> None:
    chat_server.answer = lambda body: Failure(
        body=json.dumps({"choices": [{"message": {"content": words(body)}, "finish_reason": "length"}]})
    )
    with pytest.raises(StageError, match="12 answers cut off at --max-new-tokens"):
        make_pairs(remote)


def test_limits_are_counted(remote: Pairs, chat_server: ChatServer) -> None:
    report = make_pairs(changed(remote, max_length_ratio=1.5, min_margin=2))
    assert set(report.left_out) <= {"length_ratio", "small_margin", "equal_scores", "identical"}
    assert report.left_out["length_ratio"] > 0
    for row in rows_of(remote.output):
        assert 1 < len(row["rejected"]) / len(row["chosen"]) <= 1.5
        assert row["score_chosen"] - row["score_rejected"] >= 2
    chat_server.answer = lambda body: "same"
    with pytest.raises(StageError, match="no pair could be made of 12 prompts: 12 all answers the same"):
        make_pairs(changed(remote, fresh=True))


def test_empty_answers_are_no_candidates(remote: Pairs, chat_server: ChatServer) -> None:
    chat_server.answer = lambda body: [None, "", " \n", "word", "another"][body["seed"] % 5]
    make_pairs(remote)
    assert {row["chosen"] for row in rows_of(remote.output)} == {"word"}
    assert {row["rejected"] for row in rows_of(remote.output)} == {"another"}


# ---- prompts ----------------------------------------------------------------------------------------------------


def test_prompts_of_other_shapes_keep_their_columns(remote: Pairs, prompts: Path) -> None:
    names = {name for known in shapes._KNOWN_COLUMNS.values() for name in known} - {"prompt"}
    names |= {"score_chosen", "rejected-rating"}
    row = {"prompt": "Why?", **dict.fromkeys(names, "1"), "kept": "\ud800", "when": [1, None]}
    write(prompts, [row, {**row, "prompt": "How?"}])
    report = make_pairs(changed(remote, prompt_column="prompt"))
    assert report.pairs == 2
    pairs = trained_on(remote.output)
    assert [pair.prompt[0]["content"] for pair in pairs] == ["Why?", "How?"]
    written = rows_of(remote.output)[0]
    assert pairs[0].ratings == (written["score_chosen"], written["score_rejected"])
    assert (written["source_chatgpt"], written["source_score_chosen"], written["when"]) == ("1", "1", [1, None])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "system": "Be brief."},
        {
            "messages": [
                {"role": "user", "content": "A"},
                {"role": "assistant", "content": "B"},
                {"role": "user", "content": "C"},
            ]
        },
        {"conversations": [{"from": "human", "value": "Why?"}]},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:"},
        {"question": "Why?"},
        {"prompt": [{"role": "user", "content": "Human: I said"}]},
    ],
)
def test_shapes_of_prompts(remote: Pairs, prompts: Path, chat_server: ChatServer, row: dict[str, Any]) -> None:
    write(prompts, [row])
    make_pairs(remote)
    [pair] = trained_on(remote.output)
    assert list(pair.prompt) == chat_server.requests[0]["messages"]


def test_which_prompts(remote: Pairs, chat_server: ChatServer) -> None:
    make_pairs(changed(remote, where="level >= 4", limit=3, system="Be brief."))
    assert {body["messages"][1]["content"] for body in chat_server.requests} == {f"Say word {n}" for n in (4, 5, 6)}
    assert all(body["messages"][0] == {"role": "system", "content": "Be brief."} for body in chat_server.requests)


def test_bad_rows_are_counted(remote: Pairs, prompts: Path) -> None:
    write(prompts, [{"prompt": "Why?"}, "{broken", {"prompt": ""}, {"prompt": 5}, {"prompt": "How?"}])
    report = make_pairs(remote)
    assert (report.prompts, report.pairs) == (5, 2)
    assert report.left_out == {"broken_row": 1, "empty_text": 1, "not_text": 1}


def test_prompts_that_the_template_refuses(local: Pairs, prompts: Path, tmp_path: Path) -> None:
    strict = str(save_model(tmp_path / "strict", STRICT))
    write(prompts, [{"prompt": "Why?"}, {"prompt": "How?", "system": "Be brief."}])
    report = make_pairs(changed(local, model=[strict]))
    assert report.left_out == {"refused": 1} and report.pairs == 1
    with pytest.raises(UserError, match=r"prompts\.jsonl, row 2: the chat template refuses the prompt"):
        make_pairs(changed(local, model=[strict], system="Be brief."))


# ---- going on ---------------------------------------------------------------------------------------------------


def _let_requests_end(server: ChatServer) -> None:
    """Those that were under way when their caller was stopped."""
    before = -1
    while before != len(server.requests):
        before = len(server.requests)
        time.sleep(0.5)


@pytest.mark.parametrize(("kind", "after"), [("local", 5), ("local", 14), ("remote", 1), ("remote", 5), ("remote", 20)])
def test_an_interrupted_run_goes_on_to_the_same_file(
    kind: str, after: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, chat_server: ChatServer
) -> None:
    settings: Pairs = request.getfixturevalue(kind)
    make_pairs(settings)
    straight = settings.output.read_bytes()
    settings.output.unlink()
    work = settings.output.with_name("pairs.jsonl.work")
    whole = len(work.read_bytes().splitlines())
    work.unlink()

    added: list[str] = []
    add = Journal.add

    def interrupted(journal: Journal, key: str, value: Any) -> None:
        if len(added) == after:
            raise KeyboardInterrupt
        added.append(key)
        add(journal, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_pairs(settings)
    assert not settings.output.exists()
    assert len(work.read_bytes().splitlines()) == after
    _let_requests_end(chat_server)
    chat_server.requests.clear()
    make_pairs(settings)
    assert settings.output.read_bytes() == straight
    assert len(work.read_bytes().splitlines()) == whole
    if kind == "remote":
        assert len(chat_server.requests) == 4 * max(0, 12 - after)


def test_nothing_is_made_twice(
    remote: Pairs, local: Pairs, chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_pairs(remote)
    chat_server.requests.clear()
    make_pairs(changed(remote, min_margin=1))
    make_pairs(changed(remote, reward=["repetition:ngram_size=1"]))
    assert chat_server.requests == []
    make_pairs(changed(remote, temperature=0.7))
    assert len(chat_server.requests) == 48
    local = changed(local, output=tmp_path / "local.jsonl")
    make_pairs(local)
    monkeypatch.setattr(samples, "open_model", lambda *args, **kwargs: pytest.fail("the model was loaded again"))
    make_pairs(changed(local, reward=["length:target=1"]))


def test_a_changed_reward_is_asked_again(remote: Pairs, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def mine(completions):\n    return [float(len(c)) for c in completions]\n")
    settings = changed(remote, reward=[f"{file}:mine"])
    make_pairs(settings)
    first = rows_of(remote.output)
    file.write_text("def mine(completions):\n    return [-float(len(c)) for c in completions]\n")
    make_pairs(settings)
    assert [row["chosen"] for row in rows_of(remote.output)] == [row["rejected"] for row in first]


def test_changed_columns_are_scored_again(remote: Pairs, chat_server: ChatServer, prompts: Path) -> None:
    settings = changed(remote, reward=["exact_number", f"{LENGTH},weight=0.1"])
    chat_server.answer = lambda body: f"{body['seed'] % 2}"
    write(prompts, [{"prompt": "0 or 1?", "answer": "0"}] * 3)
    make_pairs(settings)
    assert {row["chosen"] for row in rows_of(remote.output)} == {"0"}
    write(prompts, [{"prompt": "0 or 1?", "answer": "1"}] * 3)
    make_pairs(settings)
    assert {row["chosen"] for row in rows_of(remote.output)} == {"1"}


def test_other_weights_are_another_model(local: Pairs, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "mine", CHATML)
    make_pairs(changed(local, model=[str(folder)]))
    work = local.output.with_name("pairs.jsonl.work")
    lines = len(work.read_bytes().splitlines())
    os.utime(folder / "model.safetensors", ns=(1, 1))
    make_pairs(changed(local, model=[str(folder)]))
    assert len(work.read_bytes().splitlines()) >= lines + 12


def test_ctrl_c_does_not_wait_for_answers(remote: Pairs, chat_server: ChatServer) -> None:
    work = remote.output.with_name("pairs.jsonl.work")

    def answer(body: dict[str, Any]) -> str | Failure:
        return Failure(seconds=30) if "word 9" in str(body) else "w" * (body["seed"] % 9 + 1)

    def interrupt() -> None:
        while not (work.exists() and len(work.read_bytes().splitlines()) == 11):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    chat_server.answer = answer
    started = time.monotonic()
    # A shell has its background jobs ignore Ctrl-C, and the tests may be one.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            make_pairs(remote)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 20
    chat_server.answer = lambda body: "w" * (body["seed"] % 9 + 1)
    chat_server.requests.clear()
    assert make_pairs(remote).prompts == 12
    assert len(chat_server.requests) == 4


# ---- what goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": []}, "nothing says which answer is better"),
        ({"model": []}, "0 models"),
        ({"model": ["a", "b", "c"]}, "3 models"),
        ({"model": ["a", "a"]}, "both models are the same"),
        ({"model": ["a", "b"], "endpoint": ["http://a/v1"] * 3}, "too many --endpoint"),
        ({"num_completions": 1}, "--num-completions 1 leaves nothing to compare"),
        ({"temperature": 0.0}, "at --temperature 0 all completions are the same"),
        ({"prefer_first": True}, "--prefer-first decides by itself"),
        ({"prefer_first": True, "reward": []}, "--prefer-first needs two models"),
        (
            {"prefer_first": True, "reward": [], "model": ["a", "b"], "num_completions": 2},
            "--num-completions 2 has no use with --prefer-first",
        ),
        ({"reward": ["judge"]}, "--reward judge needs an endpoint"),
        ({"reward": ["judge", LENGTH]}, "--reward judge cannot be added to other rewards"),
        ({"judge_model": "j"}, "--judge-endpoint and --judge-model are for --reward judge"),
        ({"output": Path("nowhere/pairs.jsonl")}, "nowhere/pairs.jsonl: its folder does not exist\n  to do: mkdir -p"),
        ({"output": Path("pairs.json")}, "pairs.json: the output is written as JSON lines"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"prompts": ""}, "PROMPTS: `path`"),
        ({"where": "level >"}, "PROMPTS: `where`: cannot be read at character"),
        ({"where": "levle > 3"}, "no row has the column `levle`"),
        ({"where": "level > 99"}, "`where` leaves none of its 12 rows"),
        ({"prompt_column": "nothing"}, "there is no such column"),
        ({"split": "test"}, "a file has no `split`"),
        ({"reward": ["lenght:target=5"]}, "--reward lenght:target=5: `lenght` is not a built-in reward"),
        ({"reward": ["length:5"]}, "--reward length:5: `5` is not a setting"),
        ({"reward": ["length:target=five"]}, "`target` is 'five'"),
        ({"reward": ["length:target=5"]}, "an endpoint gives texts only"),
        ({"reward": ["nowhere.py:mine"]}, "nowhere.py: no such file"),
        ({"reward": ["exact_number"], "where": "level < 5", "prompts": "NO ANSWER"}, "needs `answer`"),
        ({"endpoint": ["localhost"]}, "localhost: is not the address of an endpoint"),
        ({"endpoint": ["local"], "model": ["./nowhere"]}, "./nowhere: no such folder or file"),
        ({"reward": ["model:./nowhere"]}, "./nowhere: no such folder or file"),
    ],
)
def test_wrong_use_is_explained(
    remote: Pairs,
    chat_server: ChatServer,
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if changes.get("prompts") == "NO ANSWER":
        write(tmp_path / "plain.jsonl", [{"prompt": "Why?", "level": 1}])
        changes = {**changes, "prompts": "plain.jsonl"}
    with pytest.raises(UserError) as caught:
        make_pairs(changed(remote, **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "pairs.jsonl").exists() and chat_server.requests == []


def test_the_output_does_not_take_the_place_of_the_prompts(remote: Pairs) -> None:
    with pytest.raises(UserError, match="another file than that of the prompts"):
        make_pairs(changed(remote, output=Path(remote.prompts)))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("length:target=50,unit=characters,weight=0.5", {"name": "length", "weight": 0.5}),
        ("exact_number", {"name": "exact_number"}),
        ("rewards.py:mine", {"name": "mine", "file": "rewards.py"}),
        ("a folder/re.wards.py:mine,weight=2", {"name": "mine", "file": "a folder/re.wards.py", "weight": 2}),
        ("model:org/name", {"name": "reward_model", "model": "org/name"}),
        ("model:./my,model", {"name": "reward_model", "model": "./my,model"}),
        (r"regex:pattern=^\d{1,3}: [a,b]=c", {"name": "regex", "pattern": r"^\d{1,3}: [a,b]=c"}),
        ("regex:pattern=5", {"name": "regex", "pattern": "5"}),
    ],
)
def test_parse_reward(text: str, values: dict[str, Any]) -> None:
    reward = parse_reward(text)
    assert {name: getattr(reward, name) for name in values} == values


def test_an_endpoint_that_goes_down_keeps_what_was_done(
    remote: Pairs, chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def until_four(body: dict[str, Any]) -> str | Failure:
        return "w" * (body["seed"] % 9 + 1) if len(chat_server.requests) <= 16 else Failure(502, "down")

    chat_server.answer = until_four
    with pytest.raises(UserError, match=r"HTTP 502: down \(6 tries\)"):
        make_pairs(changed(remote, concurrency=1))
    monkeypatch.setattr(endpoint, "WAITS", ())
    chat_server.answer = lambda body: "w" * (body["seed"] % 9 + 1)
    chat_server.requests.clear()
    make_pairs(remote)
    assert len(chat_server.requests) == 48 - 16


def test_single_refusals_are_left_out_and_many_stop(remote: Pairs, chat_server: ChatServer) -> None:
    def refuses(*words: str) -> Callable[[dict[str, Any]], str | Failure]:
        def answer(body: dict[str, Any]) -> str | Failure:
            refused = body["messages"][0]["content"].split()[-1] in words
            return Failure(400, '{"error": {"message": "too long"}}') if refused else "w" * (body["seed"] % 9 + 1)

        return answer

    chat_server.answer = refuses("3", "7")
    report = make_pairs(remote)
    assert report.left_out["refused"] == 2
    chat_server.answer = refuses("7")
    assert make_pairs(remote).left_out["refused"] == 1
    chat_server.answer = refuses(*map(str, range(12)))
    with pytest.raises(UserError, match="HTTP 400: too long"):
        make_pairs(changed(remote, fresh=True))
    with pytest.raises(UserError, match="HTTP 400: too long"):
        make_pairs(changed(remote, fresh=True, limit=2))
    write(Path(remote.prompts), [{"prompt": f"{place} {place % 2}"} for place in range(24)])
    chat_server.answer = refuses("1")
    assert make_pairs(changed(remote, concurrency=1)).left_out["refused"] == 12


def test_a_reward_that_fails_shows_its_completion(remote: Pairs, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def mine(completions):\n    return [1 / (len(c) - 3) for c in completions]\n")
    with pytest.raises(UserError, match=r"mine\.py, line 2: the reward `mine` failed: ZeroDivisionError") as caught:
        make_pairs(changed(remote, reward=[f"{tmp_path / 'mine.py'}:mine"]))
    assert "completion: 'w w'" in str(caught.value)


# ---- the command ------------------------------------------------------------------------------------------------


def call(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prefold", "pairs", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
    return int(stop.value.code or 0)


def test_the_command(
    remote: Pairs, chat_server: ChatServer, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    where = [remote.prompts, "--output", str(remote.output), "--endpoint", chat_server.address, "--model", "m"]
    settings = ["--reward", LENGTH, "--num-completions", "3", "--limit", "5", "--top-p", "0.9", "--top-k", "7"]
    assert call(*where, *settings, "--json") == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert report["prompts"] == 5 == report["pairs"] + sum(report["left_out"].values())
    assert set(report["mean_score"]) == {"all", "chosen", "rejected"}
    assert len(chat_server.requests) == 15
    assert (chat_server.requests[0]["top_p"], chat_server.requests[0]["top_k"]) == (0.9, 7)
    assert call(*where, *settings) == 0
    out, err = capfd.readouterr()
    assert out == "" and "pairs of 5 prompts and 15 answers" in err and "mean score: all" in err
    written = b"".join(file.read_bytes() for file in remote.output.parent.rglob("*") if file.is_file())
    assert b"sk-secret" not in written and "sk-secret" not in err
    assert call(*where) == 2
    assert "nothing says which answer is better" in capfd.readouterr().err
