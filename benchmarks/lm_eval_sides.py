"""The sides that answer a harness's requests: its own model for transformers, and prefold's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmarks.results import quieten
from benchmarks.sides import peak_bytes
from prefold.evaluation.harness import TreeLM
from prefold.models.load import load_model
from prefold.models.tokenizer import load_tokenizer
from prefold.recipe import Model
from prefold.trees.memory import arrange_allocations

Request = tuple[str, str]
"""Context and answer."""


class Task(NamedTuple):
    model: Path
    dtype: str


class Answered(NamedTuple):
    """All requests, once."""

    seconds: float
    logprobs: list[float]
    peak_bytes: int


def harness(connection: Connection, task: Task) -> None:
    quieten()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(pretrained=str(task.model), dtype=task.dtype, device=device)

    def answer(requests: Sequence[Request], batch_size: int) -> list[float]:
        model.batch_size_per_gpu = batch_size
        return [logprob for logprob, _ in model.loglikelihood(instances(requests), disable_tqdm=True)]

    serve(connection, answer)


def prefold(connection: Connection, task: Task) -> None:
    quieten()
    arrange_allocations(kept=True)
    model, tokenizer = load_model(Model(name=str(task.model)), dtype=task.dtype), load_tokenizer(task.model)

    def answer(requests: Sequence[Request], batch_size: int) -> list[float]:
        # Anew each time, so that the self-check is paid for.
        return [logprob for logprob, _ in TreeLM(model, tokenizer).loglikelihood(instances(requests))]

    serve(connection, answer)


def instances(requests: Sequence[Request]) -> list[Any]:
    return [Instance("loglikelihood", {}, request, index) for index, request in enumerate(requests)]


def serve(connection: Connection, answer: Callable[[Sequence[Request], int], list[float]]) -> None:
    connection.send("ready")
    while True:
        requests, batch_size = connection.recv()
        started = time.perf_counter()
        logprobs = answer(requests, batch_size)
        connection.send(Answered(time.perf_counter() - started, logprobs, peak_bytes()))
