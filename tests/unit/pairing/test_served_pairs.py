"""Pairs of answers that vLLM servers give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from json_server import Failure, running
from tiny_tokenizer import save_chat_model
from vllm_server import VllmServer

import prefold
from prefold.data.chat import render
from prefold.data.preference import Message
from prefold.errors import UserError
from prefold.generation import servers

HOW = {"reward": "length:target=5,unit=characters", "max_new_tokens": 12, "temperature": 1.0}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_chat_model(tmp_path / "tiny", ends=tuple(range(0, 250, 5)))


@pytest.fixture
def server(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmServer]:
    monkeypatch.setattr(servers, "WAITS", (0.01,) * len(servers.WAITS))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))
    with running(VllmServer(model)) as server:
        yield server


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say word {number}"}) + "\n" for number in range(8)))
    return path


def completions(server: VllmServer) -> list[dict[str, Any]]:
    return [body for body in server.requests if body["path"] == "/v1/completions"]


def test_all_answers_of_a_prompt_in_one_request(server: VllmServer, model: Path, prompts: Path, tmp_path: Path) -> None:
    """What was answered is not asked again; a prompt that the server refuses is left out."""
    server.failures = [Failure(400, '{"error": {"message": "too long"}}'), Failure(503)]
    report = prefold.pairs(prompts, model, tmp_path / "pairs.jsonl", server=server.address, concurrency=1, **HOW)
    assert report.prompts == 8 and report.left_out["refused"] == 1 and report.pairs >= 5
    bodies = completions(server)
    assert len(bodies) == 9 and all(body["n"] == 4 and body["model"] == "base" for body in bodies)
    asked = [Message(role="user", content="Say word 3")]
    assert render(asked, server.tokenizer) in [body["prompt"] for body in bodies]
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert all(abs(5 - len(row["chosen"])) < abs(5 - len(row["rejected"])) for row in rows)
    prefold.pairs(prompts, model, tmp_path / "pairs.jsonl", server=server.address, **HOW)
    assert len(completions(server)) == 10


def test_what_goes_with_servers(server: VllmServer, model: Path, prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    with pytest.raises(UserError, match="--server is for one model"):
        prefold.pairs(prompts, [model, "another"], output, server=server.address, **HOW)
    with pytest.raises(UserError, match="without --endpoint"):
        prefold.pairs(prompts, model, output, server=server.address, endpoint=server.address, **HOW)
    server.lie = "tokenizer"
    with pytest.raises(UserError, match="has another tokenizer than the run"):
        prefold.pairs(prompts, model, output, server=server.address, **HOW)
