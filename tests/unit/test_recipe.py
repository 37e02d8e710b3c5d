from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import SchedulerType
from transformers.training_args import OptimizerNames

import prefold
from prefold.algorithms import ALGORITHMS
from prefold.errors import UserError
from prefold.recipe import (
    Recipe,
    as_dict,
    builtin_recipes,
    dump_recipe,
    json_schema,
    load_recipe,
    make_recipe,
    parse_yaml,
)
from prefold.recipe.section import all_fields
from prefold.recipe.sections import OPTIMIZERS, SCHEDULERS, UNUSABLE
from prefold.recipe.values import Values

MINIMAL = """\
method: dpo
model: {name: some/model}
data:
  train: [{path: pairs.jsonl}]
train:
  learning_rate: 5e-5
output_dir: runs/x
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return str(path)


def test_defaults_are_filled_in(recipe_file: str) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.train.learning_rate == 5e-5
    assert recipe.algorithm.beta == 0.1
    assert recipe.data.eval_fraction == 0.1
    assert recipe.lora.r == 16


def test_dump_and_load_are_inverse(recipe_file: str, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["dpo.beta=0.3", "lora=none", "evaluate.prompts=[a, b]"])
    (tmp_path / "dumped.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "dumped.yaml")) == recipe


def test_a_guard_may_be_off_without_quotes(recipe_file: str) -> None:
    assert load_recipe(recipe_file, ["guards.cut_off=off"]).guards.cut_off == "off"
    with pytest.raises(UserError, match="not_finite"):
        load_recipe(recipe_file, ["guards.not_finite=off"])


def test_names_of_transformers() -> None:
    """They are written down, since importing them takes seconds."""
    schedulers = {scheduler.value for scheduler in SchedulerType}
    assert schedulers - SCHEDULERS == {"reduce_lr_on_plateau", "greedy"} and schedulers > SCHEDULERS
    optimizers = {optimizer.value for optimizer in OptimizerNames}
    assert optimizers > OPTIMIZERS
    assert all(name.startswith(tuple(UNUSABLE)) for name in optimizers - OPTIMIZERS)


def test_what_is_published_is_spelt_out(recipe_file: str) -> None:
    recipe = load_recipe(recipe_file, ["publish.to=out", "publish.what=[gguf]"])
    assert recipe.publish.gguf == ["Q8_0"] and recipe.publish.private
    assert "publish" not in as_dict(load_recipe(recipe_file))
    with pytest.raises(UserError, match="`lora: none` leaves none"):
        load_recipe(recipe_file, ["publish.to=out", "publish.what=[adapter]", "lora=none"])


def test_the_home_folder_is_not_written(recipe_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    recipe = load_recipe(recipe_file, ["output_dir=/home/someone/runs/x", "data.train.0.path=/home/someone/a.jsonl"])
    assert "/home/someone" not in dump_recipe(recipe)
    assert recipe.run_folder == Path("/home/someone/runs/x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "`train.learning_rat` is not a field\n  to do: did you mean `learning_rate`?"),
        (
            "train.learning_rate='1'",
            "`train.learning_rate` is '1'\n  expected: number\n  to do: write the number without",
        ),
        ("train.learning_rate=-1", "`train.learning_rate` is -1\n  expected: greater than 0"),
        ("train.learning_rate=", "`train.learning_rate` is empty\n  expected: number"),
        ("train.batch_size=2.5", "`train.batch_size` is 2.5\n  expected: integer"),
        ("train.batch_size=true", "`train.batch_size` is True\n  expected: integer"),
        ("train.beta=0.1", "`train.beta` is not a field\n  to do: it belongs in the section of the method"),
        ("train.per_device_train_batch_size=4", "on one device `batch_size: 4`"),
        ("train.optim=adamx", "`train.optim`: `adamx` is unknown"),
        ("train.optim=adamw_torh", "did you mean `adamw_torch`?"),
        ("train.lr_scheduler_type=cosin", "did you mean `cosine`?"),
        ("train.warmup_ratio=0.1", "write `warmup_steps`, which below 1 is a share"),
        ("train.max_tokens=many", "`train.max_tokens` is 'many'\n  expected: integer or 'auto'"),
        ("train=3", "`train` is 3\n  expected: a section"),
        ("model=", "`model` is empty"),
        ("model.dtype=fp8", "`model.dtype` is 'fp8'\n  expected: 'auto', 'float32', 'bfloat16' or 'float16'"),
        ("dpo.beta=0", "`dpo`: beta must be greater than 0"),
        ("dpo.bet=1", "`dpo.bet` is not a field\n  to do: did you mean `beta`?"),
        ("method=dpoo", "`method` is 'dpoo'\n  expected: 'dpo'"),
        ("data.train=[]", "`data.train` is []"),
        ("data.train.0.pth=x", "did you mean `path`?"),
        ("data.train.3.path=x", "there is no `3` to set"),
        ("data.eval_fraction=1.5", "`data.eval_fraction` is 1.5\n  expected: less than 1"),
        ("data.max_prompt_length=5", "`max_prompt_length` is used by `overlong: truncate_prompt` only"),
        ("evaluate.top_p=0.5", "`top_p` would change nothing at temperature 0"),
        ("lora=some", "`lora` is 'some'"),
        ("ppo.beta=1", "`ppo` is not a field"),
        ("publish.hub_model_id=tiny", "`publish.hub_model_id` is 'tiny'"),
        ("publish={}", "`publish`: give `hub_model_id`, the Hub repository to push to, or `to`, a folder"),
        ("publish={to: out, gguf: [F16]}", "`publish`: `gguf` would be ignored: `what` does not have `gguf`"),
        ("publish={to: out, what: [gguf], gguf: [Q9]}", "`publish.gguf.0` is 'Q9'"),
        ("publish={to: out, branch: v2}", "`publish`: `branch` would be ignored without `hub_model_id`"),
        ("publish={hub_model_id: a/b, branch: v2, create_pr: true}", "a pull request is opened against `main`"),
        ("publish={hub_model_id: a/b, token: hf_x}", "`publish.token` is not a field"),
        ("train.push_to_hub=true", "write `publish: {hub_model_id: NAME/MODEL}`"),
        ("train.hub_model_id=a/b", "it is a field of another section: `publish.hub_model_id`"),
        ("nonsense", "not an override"),
        ("train.seed={a: 1", "not valid YAML"),
    ],
)
def test_wrong_values_are_explained(recipe_file: str, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty"),
        ("- a", "not a mapping of sections"),
        (
            "method: dpo\nmodel: {name: a}\noutput_dir: x\n",
            "`data.train` is missing\n  expected: Where the training pairs",
        ),
        (MINIMAL + "method: dpo\n", "line 8: not valid YAML: `method` is given twice"),
        (MINIMAL.replace("method: dpo\n", ""), "`method` is missing"),
        (MINIMAL.replace("5e-5", "fast"), "line 6: `train.learning_rate` is 'fast'"),
        (MINIMAL + "trian: {}\n", "line 8: `trian` is not a field\n  to do: did you mean `train`?"),
        ("a: [1", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_wrong_files_are_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(tmp_path / "r.yaml"))
    assert message in str(caught.value)


def test_an_unknown_recipe_names_the_built_in_ones() -> None:
    with pytest.raises(UserError, match="did you mean `demo`"):
        load_recipe("dmo")


@pytest.mark.parametrize("name", builtin_recipes())
def test_built_in_recipes_load(name: str) -> None:
    assert load_recipe(name).method


def test_every_setting_of_an_algorithm_is_described_in_the_schema() -> None:
    definitions = json_schema()["$defs"]
    silent = [
        f"{algorithm.__name__}.{name}"
        for algorithm in ALGORITHMS.values()
        for name, found in definitions[algorithm.__name__].get("properties", {}).items()
        if not found.get("description")
    ]
    assert silent == []


def test_the_schema_describes_every_field() -> None:
    import jsonschema

    jsonschema.validate(yaml.safe_load(MINIMAL.replace("5e-5", "0.00005")), json_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**yaml.safe_load(MINIMAL), "extra": 1}, json_schema())


def attributes_read() -> set[str]:
    """Names of all attributes read anywhere in the package, and of those passed on by `model_dump`."""
    names: set[str] = set()
    for path in Path(prefold.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return names


def test_every_field_is_read_somewhere() -> None:
    # The guards, `data.mixture` and `Values` read these by name, the card its tags from the run.
    from prefold.training.guards import AT_THE_END, GUARDS

    passed_on = {*GUARDS, *AT_THE_END, *Values.model_fields, "tags", "bad_rows"}
    read = attributes_read() | passed_on
    unread = [field for field in all_fields(Recipe) if field.split(".")[-1] not in read and field not in ALGORITHMS]
    assert unread == []


def test_recipes_in_the_readme_load() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks: list[Any] = [parse_yaml(block, "README.md") for block in re.findall(r"```yaml\n(.*?)```", readme, re.S)]
    assert blocks
    for block in blocks:
        assert as_dict(make_recipe(block))


@pytest.mark.parametrize("day", ["2025-06-30", "'2025-06-30'"])
def test_the_day_of_the_template_is_text(tmp_path: Path, day: str) -> None:
    """However YAML reads it, so that the resolved recipe gives it again."""
    path = tmp_path / "recipe.yaml"
    model = f"{{name: m, chat_template_kwargs: {{strftime_now: {day}, enable_thinking: false}}}}"
    path.write_text(f"method: dpo\nmodel: {model}\ndata: {{train: [{{path: a.jsonl}}]}}\noutput_dir: runs/x\n")
    recipe = load_recipe(str(path))
    assert recipe.model.chat_template_kwargs == {"strftime_now": "2025-06-30", "enable_thinking": False}
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(str(tmp_path / "again.yaml")).model == recipe.model
    with pytest.raises(UserError, match="write a date like 2025-06-30"):
        load_recipe(str(path), ["model.chat_template_kwargs.strftime_now=today"])
