"""Metrics and times of the optimizer steps, written to the run folder and shown in the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from prefold import ranks
from prefold.files import flush_to_disk, read_jsonl, write_text
from prefold.memory import PEAK
from prefold.terminal import Advance


def restart_peaks() -> None:
    """Start to measure the peak memory of a stage."""
    PEAK.restart()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int | None]:
    """The peak memory of this stage so far, in MiB: on the GPU if there is one, and in RAM, without mapped files."""
    peak = PEAK.read()
    in_ram = None if peak is None else peak // 2**20
    if torch.cuda.is_available():
        return {"peak_memory_mb": torch.cuda.max_memory_allocated() // 2**20, "peak_host_memory_mb": in_ram}
    return {"peak_memory_mb": in_ram}


class StepRecord:
    """Appends one line per optimizer step to `metrics.jsonl` (no clock times) and to `timing.jsonl`, and some of its
    sampled groups to `rollouts.jsonl`.

    A run that resumes from a checkpoint first drops the lines of later steps, so that its file equals that of an
    uninterrupted run. `history` holds the lines of `metrics.jsonl`. Only the first process writes.
    """

    def __init__(self, run_folder: Path, resumed_step: int, update_bar: Advance):
        self.update_bar = update_bar
        self.metrics, self.timing = run_folder / "metrics.jsonl", run_folder / "timing.jsonl"
        self.rollouts = run_folder / "rollouts.jsonl"
        self.history: list[dict[str, float]] = ranks.from_first(lambda: self._history_up_to(resumed_step))

    def _history_up_to(self, step: int) -> list[dict[str, float]]:
        for path in filter(Path.is_file, (self.metrics, self.timing, self.rollouts)):
            _cut(path, step)
        return read_jsonl(self.metrics) if self.metrics.is_file() else []

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.history.append({"step": step, **metrics})
        _append(self.metrics, self.history[-1])
        shown = {"loss": "loss", "reward": "reward", "rewards/margins": "margin", "rewards/accuracies": "acc"}
        shown |= {"margin": "margin", "accuracy": "acc"}
        text = " ".join(f"{label} {metrics[name]:.3g}" for name, label in shown.items() if name in metrics)
        self.update_bar(advance=1, text=text)

    def rollout(self, step: int, groups: Sequence[dict[str, Any]]) -> None:
        for group in groups:
            _append(self.rollouts, {"step": step, **group})

    def flush(self) -> None:
        """Flush the lines so far to the disk, before a checkpoint that counts on them."""
        for path in filter(Path.is_file, (self.metrics, self.timing, self.rollouts)):
            flush_to_disk(path)

    def time(self, step: int, seconds: float, tokens: int) -> None:
        _append(self.timing, {"step": step, "seconds": round(seconds, 3), "tokens": tokens, **peak_memory()})


def record_stage(run_folder: Path, stage: str, seconds: float) -> None:
    """Append the time and the peak memory of a finished stage to `timing.jsonl`."""
    _append(run_folder / "timing.jsonl", {"stage": stage, "seconds": round(seconds, 3), **peak_memory()})


def _append(path: Path, line: dict[str, Any]) -> None:
    if not ranks.is_first():
        return
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _cut(path: Path, step: int) -> None:
    """Drop the lines after a step, and a last line that the end of the process has cut off."""
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].split("\n")[:-1]
    kept = [line for line in lines if json.loads(line).get("step", 0) <= step]
    write_text(path, "".join(f"{line}\n" for line in kept))
