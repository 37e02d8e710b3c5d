"""Reading, rendering and packing preference data, against TRL.

    python -m benchmarks.preparing --data pairs.jsonl --rows 10000

Rows of a .jsonl file of prompt, chosen, rejected, repeated with a number put before the prompt until there are enough,
written as messages to a file that both sides read. prefold does all that `prefold check` does: shapes, findings,
fingerprints. TRL reads with `datasets`, tokenizes by DPOTrainer's own code and collates. Each packs or pads every
batch of 4 once. In turn, several times, by the processor seconds of all threads; prints a table and, as its last line,
JSON: also what prefold takes when the same data are asked for again.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
from rich.console import Console
from rich.table import Table
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from benchmarks.prefold_preparing import MAX_LENGTH, prepare_prefold, settings_for
from benchmarks.results import Ratio, parser_for, quieten, write
from benchmarks.sides import Side, running
from benchmarks.workloads import BATCH
from prefold.data.prepared_cache import prepare
from prefold.models.fetch import fetch
from prefold.models.tokenizer import load_tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_for("preparing", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="jsonl of prompt, chosen, rejected")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    quieten()
    model = fetch(options.model)
    tokenizer = load_tokenizer(model)
    tenth = options.rows // 10
    with tempfile.TemporaryDirectory() as folder:
        file = write_rows(options.data, options.rows, Path(folder) / "pairs.jsonl")
        seconds: dict[str, list[float]] = {"TRL": [], "prefold": []}
        for _ in range(options.repeats):
            for name, side in (("TRL", prepare_trl), ("prefold", prepare_prefold)):
                seconds[name].append(processor_seconds(side, file, tokenizer))
        again = prepared_again(file, tokenizer, Path(folder) / "cache")
        peaks = [peak_mb(write_rows(options.data, tenth, Path(folder) / "tenth.jsonl"), model), peak_mb(file, model)]
        file_mb = file.stat().st_size / 1e6
    ratio = Ratio.of(seconds["TRL"], seconds["prefold"])
    measured = {
        "ratio": ratio.median,
        "spread": ratio.spread,
        "rows": options.rows,
        "seconds": {name: [round(value, 2) for value in values] for name, values in seconds.items()},
        "again_seconds": round(again, 3),
        "peak_mb": {str(tenth): round(peaks[0]), str(options.rows): round(peaks[1])},
        "file_mb": round(file_mb),
        "cpu_count": os.cpu_count(),
    }
    table = Table("", "TRL", "prefold", "ratio")
    table.add_row("median s", *(f"{statistics.median(values):.1f}" for values in seconds.values()), str(ratio))
    console = Console()
    console.print(table)
    console.print(
        f"{options.rows:,} rows, {file_mb:.0f} MB; prefold's peak memory {peaks[0]:.0f} MB for a tenth of the rows, "
        f"{peaks[1]:.0f} MB for all; {again:.2f} s when they are asked for again"
    )
    write("preparing", options, measured)
    print(json.dumps(measured))


def processor_seconds(perform: Callable[..., Any], *arguments: Any) -> float:
    started = time.process_time()
    perform(*arguments)
    return time.process_time() - started


def prepared_again(file: Path, tokenizer: Any, cache: Path) -> float:
    """Processor seconds until data that were prepared before are there, and their lengths known."""
    before = os.environ.get("PREFOLD_CACHE")
    os.environ["PREFOLD_CACHE"] = str(cache)
    try:
        data = settings_for(file)
        prepare(data, tokenizer, seed=1)
        return processor_seconds(lambda: prepare(data, tokenizer, seed=1).train.lengths)
    finally:
        os.environ.pop("PREFOLD_CACHE") if before is None else os.environ.update(PREFOLD_CACHE=before)


def write_rows(source: Path, rows: int, to: Path) -> Path:
    given = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    given = [row for row in given if row["chosen"].strip() and row["rejected"].strip()]
    with to.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = given[number % len(given)]
            prompt = [{"role": "user", "content": f"{number}. {row['prompt']}"}]
            answers = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
            file.write(json.dumps({"prompt": prompt, **answers}) + "\n")
    return to


def prepare_trl(file: Path, tokenizer: Any) -> None:
    datasets.disable_caching()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=folder)
        config = DPOConfig(output_dir=folder, max_length=MAX_LENGTH, use_cpu=True, report_to=[])
        trainer: Any = SimpleNamespace(_tokenizer=tokenizer)
        prepared = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, config, "train")
        collate: Callable[..., Any] = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)
        for start in range(0, len(prepared), BATCH):
            collate([prepared[index] for index in range(start, min(start + BATCH, len(prepared)))])


def peak_mb(file: Path, model: Path) -> float:
    """Peak memory of a process that prepares a file and nothing else."""
    side = Side("prefold", "benchmarks.prefold_preparing:prepare", (file, model))
    with running(side):
        return float(side.receive()) / 1e6


if __name__ == "__main__":
    main()
