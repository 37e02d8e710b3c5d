"""Kernels of a step, counted on tensors without contents: no more of them for more prompts, and nothing asked for on
the way."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks import launches
from prefold.generation import kv_cache
from prefold.generation.kv_cache import VariableLength

SIZES = ["--layers", "2", "--heads", "2", "--key-heads", "1", "--vocabulary", "300"]


def test_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    launches.main(SIZES)
    counted = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert counted["decode_step"].keys() == {"1", "4", "16"} and counted["training_step"] > 100
    assert len({*counted["decode_step"].values()}) == 1


def test_a_kernel_of_each_prompt_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = VariableLength.attend

    def by_prompts(self: VariableLength, layer: int, query: Any, *given: Any) -> Any:
        for _ in self.prompts:
            query = query + 0
        return attend(self, layer, query, *given)

    monkeypatch.setattr(VariableLength, "attend", by_prompts)
    model = launches.model_of(launches.shape_of(launches.parse(SIZES)))
    one, many = (launches.decode_step(model, prompts).kernels for prompts in (1, 16))
    assert many == one + 15 * 2


def test_what_is_a_kernel() -> None:
    with launches.Launches() as counted:
        states = torch.empty(4, 6)
        states.view(6, 4).T[1:].unsqueeze(0)
        states.add_(1).detach()
        torch.nn.functional.linear(states, torch.ones(3, 6))
    assert counted.names == {"add_": 1, "ones": 1, "mm": 1} and counted.kernels == 3


def test_asking_the_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = kv_cache.SequenceBatch.advance

    def asking(self: kv_cache.SequenceBatch) -> None:
        advance(self)
        self.positions.tolist()

    monkeypatch.setattr(kv_cache.SequenceBatch, "advance", asking)
    model = launches.model_of(launches.shape_of(launches.parse(SIZES)))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        launches.decode_step(model, 1)
