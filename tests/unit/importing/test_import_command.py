"""`prefold recipes import`: which of TRL's commands a file is for, and what is written where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from prefold.cli import recipes
from prefold.errors import UserError
from prefold.importing import import_recipe
from prefold.recipe import load_recipe

HEAD = "model_name_or_path: m\ndataset_name: a.jsonl\n"
TEMPLATE = "{% for message in messages %}\n{{ message['content'] + eos_token }}{% endfor %}"


def file_of(folder: Path, text: str, name: str = "theirs.yaml") -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(HEAD + text)
    return str(folder / name)


def method_of(file: str, method: str | None = None) -> str:
    return import_recipe(file, method).text.split("\nmethod: ")[1].split()[0]


@pytest.mark.parametrize(
    ("name", "keys", "method"),
    [
        ("orpo/config_full.yaml", "beta: 0.05\nmax_prompt_length: 512\n", "orpo"),
        ("recipes/dpo.yaml", "beta: 0.1\n", "dpo"),
        ("dpo/config_orpo-8b.yaml", "beta: 0.1\n", "orpo"),
        ("kto/dpo_then_orpo.yaml", "beta: 0.1\n", "kto"),
        ("config-cpo.yaml", "label_smoothing: 0.1\n", "cpo"),
        # The name is not among those that fit.
        ("dpo/config.yaml", "desirable_weight: 1.2\n", "kto"),
        ("dpo.yaml", "num_generations: 4\n", "grpo"),
        # The keys are enough.
        ("config.yaml", "label_smoothing: 0.1\n", "dpo"),
        ("config.yaml", "loss_type: hinge\ncpo_alpha: 0.5\n", "cpo"),
        ("config.yaml", "reward_funcs: [a.b]\n", "grpo"),
        ("config.yaml", "lora_task_type: SEQ_CLS\n", "reward"),
        ("config.yaml", "packing: false\nloss_type: sigmoid\n", "dpo"),
    ],
)
def test_the_command_that_fits(name: str, keys: str, method: str, tmp_path: Path) -> None:
    assert method_of(file_of(tmp_path, keys, name)) == method


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("dpo/dpo.yaml", "", "its keys fit several"),
        ("config.yaml", "lora_task_type: CAUSAL_LM\n", "its keys fit several"),
        ("config.yaml", "precompute_ref_log_probs: true\n", r"--method dpo \| kto\n"),
        ("config.yaml", "desirable_weight: 1.0\nnum_generations: 4\n", "no command has them all"),
        ("rloo.yaml", "num_generations: 4\n", "`rloo` trainer, which has no counterpart"),
        ("sft.yaml", "padding_free: true\n", "a file for supervised fine-tuning"),
        ("config.yaml", "padding_free: true\npacking: true\n", "a file for supervised fine-tuning"),
        ("dpo.yaml", "loss_type: kto_pair\n", "`loss_type: kto_pair` has no counterpart"),
    ],
)
def test_nothing_is_guessed(name: str, keys: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        import_recipe(file_of(tmp_path, keys, name))


def test_the_name_is_said_where_it_decides_and_method_wins(tmp_path: Path) -> None:
    file = file_of(tmp_path, "beta: 0.1\n", "orpo.yaml")
    result = import_recipe(file)
    assert "method: orpo # by the file's name: its keys fit" in result.text
    assert "read as `trl orpo` by the file's name" in " ".join(result.account.split())
    assert method_of(file, "kto") == "kto"


# ---- what is written --------------------------------------------------------------------------------------------


def test_a_recipe_is_written_with_its_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(HEAD + "loss_type: ipo\nchat_template: " + repr(TEMPLATE).replace("\\'", "''") + "\n")
    ours = tmp_path / "new" / "ours.yaml"
    recipes("import", str(file), output=str(ours))
    out, err = capsys.readouterr()
    assert out == "" and f"written: {ours}" in err and f"written: {ours.with_suffix('.jinja')}" in err
    assert load_recipe(str(ours)).model.chat_template == str(ours.with_suffix(".jinja"))
    assert sorted(path.name for path in ours.parent.iterdir()) == ["ours.jinja", "ours.yaml"]


def test_the_template_is_word_for_word(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(
        yaml.safe_dump({"model_name_or_path": "m", "dataset_name": "a", "beta": 1, "chat_template": TEMPLATE})
    )
    recipes("import", str(file), "dpo", str(tmp_path / "ours.yml"))
    assert (tmp_path / "ours.jinja").read_text() == TEMPLATE


def test_without_a_file_for_the_recipe_the_template_is_a_note(tmp_path: Path) -> None:
    result = import_recipe(file_of(tmp_path, "loss_type: ipo\nchat_template: '{{ messages }}'\n"))
    assert not result.files and "chat_template:" not in result.text
    assert "writes it to a file beside the recipe" in " ".join(result.account.split())


def test_a_name_of_a_template_is_no_template(tmp_path: Path) -> None:
    result = import_recipe(file_of(tmp_path, "loss_type: ipo\nchat_template: zephyr\n"), output="ours.yaml")
    assert not result.files and [note.group for note in result.notes if "chat_template" in note.keys] == ["missing"]


def test_nothing_is_overwritten_unless_forced(tmp_path: Path) -> None:
    file = file_of(tmp_path, "loss_type: ipo\nchat_template: '{{ messages }}'\n")
    ours = tmp_path / "ours.yaml"
    (tmp_path / "ours.jinja").write_text("mine")
    with pytest.raises(UserError, match=r"ours\.jinja: there is a file already(.|\n)*--force"):
        recipes("import", file, output=str(ours))
    assert not ours.exists() and (tmp_path / "ours.jinja").read_text() == "mine"
    recipes("import", file, output=str(ours), force=True)
    assert ours.exists() and (tmp_path / "ours.jinja").read_text() == "{{ messages }}"
    with pytest.raises(UserError, match="the file to import"):
        recipes("import", file, output=file, force=True)


def test_on_an_error_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tmp_path / "ours.yaml"
    with pytest.raises(UserError, match="its keys fit several"):
        recipes("import", file_of(tmp_path, ""), output=str(ours))
    file = file_of(tmp_path, "loss_type: ipo\nchat_template: '{{ messages }}'\n")
    with pytest.raises(UserError, match="a recipe is a YAML file"):
        recipes("import", file, output=str(tmp_path / "ours.txt"))

    def full(path: Path, text: str, encoding: str) -> int:
        if ".jinja" in path.name:
            raise OSError(28, os.strerror(28))
        return path.write_bytes(text.encode())

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        recipes("import", file, output=str(ours))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs.yaml"]


def test_output_goes_with_import_alone() -> None:
    with pytest.raises(UserError, match="go with `import`"):
        recipes("demo", output="x.yaml")
