"""Surroundings of the tests that ask tasks: caches of their own, and nobody to call."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import datasets
import pytest
from harness_tasks import write_tasks


@pytest.fixture
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    # The harness lists what is installed, which takes seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tasks of every kind."""
    return write_tasks(tmp_path / "tasks")


@pytest.fixture
def no_connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every connection fails, also those that the settings for working offline do not know of; what was tried."""
    tried: list[Any] = []

    def refuse(*arguments: Any, **settings: Any) -> Any:
        tried.append(arguments)
        raise OSError("no connections in this test")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return tried
