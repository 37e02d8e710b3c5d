"""The tutorials, as they are written: their files are saved, and their commands given one after the other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
SAVED = r"Save as `([\w.]+)`:\n\n```\w+\n(.*?)^```"
COMMAND = r"^ {4}(prefold .*)$"


@pytest.fixture
def own_cache() -> None:
    """The model is kept in the user's cache, not in one of the test's own."""


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("name", ["dpo", "orpo", "grpo"])
def test_a_tutorial_leads_from_data_to_a_published_model(name: str, tmp_path: Path, smollm2: Path) -> None:
    text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    for file, contents in re.findall(SAVED, text, re.DOTALL | re.MULTILINE):
        (tmp_path / file).write_text(contents, encoding="utf-8")
    commands = re.findall(COMMAND, text, re.MULTILINE)
    prefold = f"{sys.executable} -m prefold"
    for command in commands:
        line = command.replace("prefold", prefold, 1)
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    assert len(commands) >= 6
    assert (tmp_path / "published" / "model.safetensors").is_file()
    assert name.upper() in (tmp_path / "published" / "README.md").read_text(encoding="utf-8")
