"""Processor time of commands, against importing what they stand on, in alternation on the same machine.

    python -m benchmarks.startup --rounds 7

`missing_recipe` and `recipes` are ratios to `import torch`, `check_cold` (nothing remembered, no tokenised data) and
`check_warm` (the same again) to `import torch, transformers`. Each command is a process of its own. The last line of
the output is the summary as JSON: medians of the rounds' ratios, and all of them as `spread`.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Ratio, parser_for, quieten, save
from prefold.files import cache_folder
from prefold.models.fetch import fetch

TORCH, BOTH = "import torch", "import torch, transformers"
IMPORTS = {name: ["-c", name] for name in (TORCH, BOTH)}
STANDARDS = {"missing_recipe": TORCH, "recipes": TORCH, "check_cold": BOTH, "check_warm": BOTH}
"""What each command is compared with."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_for("startup", __doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--recipe", default="demo")
    options = parser.parse_args(arguments)
    quieten()
    fetch(options.model)
    with tempfile.TemporaryDirectory() as cache:
        models = cache_folder() / "models"
        if models.is_dir():
            (Path(cache) / "models").symlink_to(models.absolute())
        seconds = measure(options.rounds, options.recipe, options.model, Path(cache))
    ratios = {name: Ratio.of(seconds[name], seconds[standard]) for name, standard in STANDARDS.items()}
    for name, ratio in ratios.items():
        print(f"{name:15} {statistics.median(seconds[name]):5.2f} s  {ratio} of `{STANDARDS[name]}`")
    summary = {name: ratio.median for name, ratio in ratios.items()}
    spread = {name: ratio.spread for name, ratio in ratios.items()}
    save("startup", options, {"seconds": seconds, **summary, "spread": spread})
    print(json.dumps({**summary, "spread": spread}))


def measure(rounds: int, recipe: str, model: str, cache: Path) -> dict[str, list[float]]:
    """Processor seconds of every command, in each round."""
    check = ["-m", "prefold", "check", recipe, f"model.name={model}"]
    commands = {
        **IMPORTS,
        "missing_recipe": ["-m", "prefold", "check", "no-such-recipe"],
        "recipes": ["-m", "prefold", "recipes"],
        "check_cold": check,
        "check_warm": check,
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for round_ in range(rounds + 1):
        for name, command in commands.items():
            if name == "check_cold":
                for part in ("data", "plans"):
                    shutil.rmtree(cache / part, ignore_errors=True)
            took = processor_seconds(command, cache, expected=2 if name == "missing_recipe" else 0)
            if round_:  # the first one fills the system's cache of files
                seconds[name].append(took)
    return seconds


def processor_seconds(command: Sequence[str], cache: Path, expected: int) -> float:
    """Of a command of this Python, user and system. Raises RuntimeError if it ends with another code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PREFOLD_CACHE": str(cache)}
    ended = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode != expected:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}: {ended.stderr}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
