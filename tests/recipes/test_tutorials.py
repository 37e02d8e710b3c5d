"""The commands of the tutorials and of the README's tour, given as they are written, one after the other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SAVED = r"Save as `([\w.]+)`:\n\n```\w+\n(.*?)^```"
COMMAND = r"^ {4}(prefold .*)$"
THEIRS = "model_name_or_path: org/model\ndataset_name: org/pairs\nlearning_rate: 5.0e-7\nloss_type: apo_zero\n"


def give(command: str, folder: Path) -> None:
    line = command.replace("prefold", f"{sys.executable} -m prefold", 1)
    done = subprocess.run(line, shell=True, cwd=folder, input="Hello\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


class TestTutorials:
    @pytest.fixture
    def own_cache(self) -> None:
        """The model is kept in the user's cache, not in one of the test's own."""

    @pytest.mark.slow
    @pytest.mark.real_model
    @pytest.mark.parametrize("name", ["dpo", "orpo", "grpo"])
    def test_from_data_to_a_published_model(self, name: str, tmp_path: Path, smollm2: Path) -> None:
        text = (ROOT / "docs" / "tutorials" / f"{name}.md").read_text(encoding="utf-8")
        for file, contents in re.findall(SAVED, text, re.DOTALL | re.MULTILINE):
            (tmp_path / file).write_text(contents, encoding="utf-8")
        commands = re.findall(COMMAND, text, re.MULTILINE)
        assert len(commands) >= 6
        for command in commands:
            give(command, tmp_path)
        assert (tmp_path / "published" / "model.safetensors").is_file()
        assert name in (tmp_path / "published" / "README.md").read_text(encoding="utf-8").lower()


def begin_to_serve(command: str, folder: Path) -> None:
    line = [sys.executable, "-m", *command.split("#")[0].split(), "--no-browser"]
    with subprocess.Popen(line, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None and server.stdout.readline().startswith("http://127.0.0.1:")
        server.terminate()


@pytest.mark.slow
def test_the_tour(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    """With a tiny model in `mine.yaml`, as soon as there is one."""
    tour = (ROOT / "README.md").read_text(encoding="utf-8").split("## A short tour")[1].split("## ")[0]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Say a word"}\n{"prompt": "Say another"}\n')
    (tmp_path / "theirs.yaml").write_text(THEIRS)
    first, *others = re.findall(COMMAND, tour, re.MULTILINE)
    give(first, tmp_path)
    recipe = yaml.safe_load((tmp_path / "mine.yaml").read_text(encoding="utf-8"))
    recipe["model"]["name"] = str(tiny_model)
    recipe["train"]["max_steps"] = 3
    recipe["evaluate"]["max_new_tokens"] = 8
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert len(others) >= 10
    for command in others:
        (begin_to_serve if command.startswith("prefold ui") else give)(command, tmp_path)
    assert (tmp_path / "page.html").is_file() and (tmp_path / "ours.yaml").is_file()
