"""What a command does not use is not imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from tiny_tokenizer import save_chat_model

OF_MODELS = {"peft", "bitsandbytes", "accelerate", "lm_eval", "sympy", "transformers.modeling_utils"}
OF_TABLES = {"datasets", "pandas", "scipy", "sklearn", "statsmodels", "bokeh", "gguf", "wandb"}
HEAVY = {"torch", "transformers", "pyarrow", *OF_MODELS, *OF_TABLES}

SHOW = """
import json, sys
from prefold.cli import main
try:
    main()
finally:
    print("MODULES", json.dumps(sorted(sys.modules)))
"""

IMPORTED = "trl_dpo_qlora.yaml"


def modules(*arguments: str, folder: Path, code: int = 0) -> set[str]:
    """What a command has imported when it ends."""
    command = [sys.executable, "-c", SHOW, *arguments]
    environment = {**os.environ, "PREFOLD_CACHE": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == code, ended.stderr
    return set(json.loads(ended.stdout.rpartition("MODULES ")[2]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a model, data, a sound recipe, two wrong ones and one of another tool."""
    folder = tmp_path_factory.mktemp("start")
    save_chat_model(folder / "model", max_position_embeddings=512, num_hidden_layers=2)
    rows = [{"prompt": f"Word {i}", "chosen": f"WORD {i}!", "rejected": f"word {i}"} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = "method: dpo\nmodel: {name: model}\ndata: {train: [{path: pairs.jsonl}]}\noutput_dir: run\n"
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "wrong.yaml").write_text(recipe.replace("name:", "nam:"))
    (folder / "optim.yaml").write_text(f"{recipe}train: {{optim: adamw_torhc}}\n")
    sample = Path(__file__).parent / "importing" / "samples" / IMPORTED
    (folder / IMPORTED).write_text(sample.read_text())
    return folder


@pytest.mark.parametrize(
    ("command", "code", "most"),
    [
        ("--version", 0, 450),
        ("run --help", 0, 600),
        ("recipes", 0, 450),
        ("recipes demo", 0, 450),
        (f"recipes import {IMPORTED} --method dpo", 0, 600),
        ("schema", 0, 550),
        ("data pairs.jsonl", 0, 650),
        ("data builtin:short_answers --json", 0, 650),
        ("data nowhere.jsonl", 2, 650),
        ("check wrong.yaml", 2, 550),
        ("check optim.yaml", 2, 550),
        ("check recipe.yaml train.epochs=2", 2, 550),
        ("check nowhere --row 1", 2, 550),
        *(
            (f"{command} nowhere", 2, 550)
            for command in ("check", "run", "train", "merge", "evaluate", "report", "publish")
        ),
        ("sweep nowhere train.learning_rate=1e-5,2e-5", 2, 550),
    ],
)
def test_modules_by_command(command: str, code: int, most: int, folder: Path) -> None:
    imported = modules(*command.split(), folder=folder, code=code)
    assert not imported & HEAVY
    assert len(imported) < most


@pytest.mark.skipif(version("transformers").startswith("5.18"), reason="transformers 5.18 imports some of them itself")
def test_modules_of_a_check(folder: Path) -> None:
    """The first one puts a model together; another of the same recipe imports neither models nor statistics, nor does
    a look at a row."""
    first = modules("check", "recipe.yaml", folder=folder)
    assert not first & {"bokeh", "lm_eval", "statsmodels", "wandb"}
    for again in (["recipe.yaml"], ["recipe.yaml", "--row", "1"]):
        imported = modules("check", *again, folder=folder)
        assert {"torch", "transformers"} <= imported
        assert not imported & (OF_MODELS | OF_TABLES)
        assert len(imported) < 1800 < len(first)
