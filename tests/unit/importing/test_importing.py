"""Recipes from the files of other tools: what is carried over, what is said, and that nothing gets lost."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefold.cli import recipes
from prefold.errors import UserError
from prefold.importing import Imported, import_recipe, losses
from prefold.recipe import RecipeBase, load_recipe, parse_yaml

SAMPLES = sorted((Path(__file__).parent / "samples").glob("*.yaml"))
NAMES = [path.stem for path in SAMPLES]
METHODS = {name: word for name in NAMES for word in ("dpo", "orpo") if name.startswith("handbook") and word in name}
METHODS |= {"trl_orpo": "orpo"}


@cache
def imported(name: str) -> Imported:
    return import_recipe(str(SAMPLES[NAMES.index(name)]), METHODS.get(name))


def recipe_of(name: str, folder: Path) -> RecipeBase:
    """The recipe of a sample, written to a file and read back."""
    file = folder / "mine.yaml"
    file.write_text(imported(name).text)
    return load_recipe(str(file))


@pytest.fixture
def write(tmp_path: Path):
    def written(text: str) -> str:
        file = tmp_path / "theirs.yaml"
        file.write_text(text)
        return str(file)

    return written


def keys_of(values: dict[str, Any]) -> set[str]:
    """The keys of a file; those in a section or in entries of a list of data sets as `outer.inner`."""
    mixture = values.get("dataset_mixture") or {}
    values = values | {f"dataset_mixture.{key}": value for key, value in mixture.items()}
    found = set(values)
    for outer in (
        "datasets",
        "test_datasets",
        "trl",
        "peft",
        "peft_config",
        "quant_config",
        "dataset_mixture.datasets",
    ):
        inner = values.get(outer) or []
        for entry in inner if isinstance(inner, list) else [inner]:
            found |= {f"{outer}.{key}" for key in entry}
            found |= {f"{outer}.{key}" for key in entry["type"]} if isinstance(entry.get("type"), dict) else set()
    return found


# ---- for every sample -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_a_recipe(name: str, tmp_path: Path) -> None:
    recipe = recipe_of(name, tmp_path)
    assert recipe.model.name == parse_yaml(imported(name).text, name)["model"]["name"]
    assert imported(name).text.startswith("# ")


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_the_file_is_accounted_for(name: str) -> None:
    given = keys_of(parse_yaml(SAMPLES[NAMES.index(name)].read_text(), name))
    result = imported(name)
    assert given == {key for note in result.notes for key in note.keys}
    words = result.account.replace(",", " ").replace(":", " ").split()
    assert given <= set(words)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wider_than_a_terminal(name: str) -> None:
    assert max(map(len, imported(name).account.splitlines())) < 80
    assert max(map(len, imported(name).text.splitlines())) <= 120


def first_seen(name: str) -> set[str]:
    """The keys of a file that no earlier one of the same tool and method has."""

    def kind(other: str) -> tuple[str, str]:
        return imported(other).tool, parse_yaml(imported(other).text, other)["method"]

    keys, *earlier = (
        set(parse_yaml(SAMPLES[NAMES.index(other)].read_text(), other))
        for other in (name, *NAMES[: NAMES.index(name)])
        if kind(other) == kind(name)
    )
    return keys.difference(*earlier)


@pytest.mark.parametrize("name", NAMES)
def test_strange_values_are_one_message_at_most(name: str, write) -> None:
    values = parse_yaml(SAMPLES[NAMES.index(name)].read_text(), name)
    for key in first_seen(name):
        for strange in ("x", 0.5, ["x", {}], {"a": 1}):
            try:
                import_recipe(write(yaml.safe_dump({**values, key: strange})), METHODS.get(name))
            except UserError:
                continue


# ---- TRL --------------------------------------------------------------------------------------------------------


def test_trl_qlora(tmp_path: Path) -> None:
    recipe = recipe_of("trl_dpo_qlora", tmp_path)
    assert recipe.method == "dpo" and recipe.algorithm.beta == 0.05 and recipe.algorithm.label_smoothing == 0.1
    assert (recipe.model.load_in_4bit, recipe.model.bnb_4bit_quant_type) == (True, "nf4")
    assert recipe.model.bnb_4bit_use_double_quant is True and recipe.model.dtype == "bfloat16"
    assert (recipe.lora.r, recipe.lora.lora_alpha) == (32, 64)
    assert recipe.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert recipe.train.batch_size == 2 * 8
    assert recipe.train.warmup_steps == 0.1
    assert (recipe.data.max_length, recipe.data.max_prompt_length) == (2048, 768)
    assert recipe.data.overlong == "truncate_prompt"
    assert (recipe.data.train[0].path, recipe.data.train[0].name) == ("acme/helpful-pairs", "english")
    assert recipe.data.eval[0].split == "test"
    assert (recipe.train.eval_steps, recipe.train.metric_for_best_model) == (50, "loss")
    assert recipe.train.report_to == ["wandb", "mlflow"]
    assert recipe.publish.hub_model_id == "acme/helpful-dpo"


def test_dropout_that_the_trainer_switches_off_is_written_as_0(tmp_path: Path) -> None:
    assert recipe_of("trl_dpo_qlora", tmp_path).lora.lora_dropout == 0
    assert "not 0.1: TRL switches all dropout off" in imported("trl_dpo_qlora").text
    assert recipe_of("trl_grpo", tmp_path).lora.lora_dropout == 0.1
    assert recipe_of("axolotl_dpo_qlora", tmp_path).lora.lora_dropout == 0
    assert recipe_of("axolotl_grpo", tmp_path).lora.lora_dropout == 0.1
    assert recipe_of("llamafactory_rm", tmp_path).lora.lora_dropout == 0.1


def test_trl_defaults_where_the_file_is_silent(tmp_path: Path) -> None:
    recipe, text = recipe_of("trl_dpo_bare", tmp_path), imported("trl_dpo_bare").text
    assert (recipe.train.learning_rate, recipe.train.num_train_epochs, recipe.train.batch_size) == (1e-6, 3, 8)
    assert (recipe.train.lr_scheduler_type, recipe.train.warmup_steps) == ("linear", 0)
    assert (recipe.lora, recipe.data.max_length, recipe.algorithm.beta) == ("none", 1024, 0.1)
    assert "learning_rate: 1.0e-06 # TRL's default" in text
    assert "beta: 0.1 # TRL's default" in text


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ("metric_for_best_model: eval_logps/chosen\ngreater_is_better: false\n", False),
        ("load_best_model_at_end: true\ngreater_is_better: true\n", True),
        ("greater_is_better: true\n", None),
        ("load_best_model_at_end: false\ngreater_is_better: false\n", None),
    ],
)
def test_which_way_a_metric_is_better(keys: str, wanted: bool | None, write) -> None:
    head = "model_name_or_path: m\ndataset_name: a.jsonl\nloss_type: sigmoid\neval_strategy: steps\neval_steps: 50\n"
    result = import_recipe(write(head + keys))
    assert load_recipe(write(result.text)).train.greater_is_better is wanted
    assert "greater_is_better" in result.account


@pytest.mark.parametrize("loss", losses.LOSSES["dpo"])
def test_every_loss_of_pairs(loss: str, write) -> None:
    file = write(f"model_name_or_path: m\ndataset_name: a.jsonl\nbeta: 0.3\nloss_type: {loss}\n")
    result = import_recipe(file)
    recipe = load_recipe(write(result.text))
    assert recipe.method == losses.LOSSES["dpo"][loss].method
    assert getattr(recipe.algorithm, "beta", 0.3) == 0.3


def test_bco_and_robust_are_as_trl_has_them(write) -> None:
    head = "model_name_or_path: m\ndataset_name: a.jsonl\n"
    assert "reward_shift: false # as TRL has it" in import_recipe(write(head + "loss_type: bco_pair\n")).text
    assert "label_smoothing: 0.0 # as TRL has it" in import_recipe(write(head + "loss_type: robust\n")).text


def test_several_losses_are_a_mixture(tmp_path: Path) -> None:
    recipe = recipe_of("trl_dpo_mixed", tmp_path)
    assert recipe.algorithm.losses == [
        {"name": "dpo", "weight": 0.8, "beta": 0.1},
        {"name": "bco", "weight": 0.2, "beta": 0.1, "reward_shift": False},
        {"name": "sft", "weight": 1.0},
    ]
    assert [source.weight for source in recipe.data.train] == [0.7, 0.3]
    assert recipe.data.train[1].path == "second.jsonl"
    assert (recipe.data.eval_fraction, recipe.train.eval_steps) == (0.05, 0.5)


def test_simpo_alone_and_with_trls_supervised_loss(tmp_path: Path) -> None:
    alone = recipe_of("trl_simpo", tmp_path)
    assert (alone.method, alone.algorithm.beta, alone.algorithm.simpo_gamma) == ("simpo", 2.5, 1.2)
    both = recipe_of("axolotl_simpo_full", tmp_path)
    assert both.algorithm.losses == [
        {"name": "simpo", "weight": 1.0, "beta": 2.0, "simpo_gamma": 1.0},
        {"name": "sft", "weight": 1.0},
    ]
    assert "`cpo_alpha: 1.0` unless told otherwise" in imported("axolotl_simpo_full").text


def test_grpo_counts_completions(tmp_path: Path) -> None:
    recipe = recipe_of("trl_grpo", tmp_path)
    assert recipe.train.batch_size == 8 * 2 // 4
    assert (recipe.algorithm.scale_rewards, recipe.algorithm.loss_type) == ("none", "dr_grpo")
    assert recipe.data.max_length == 256
    assert [(one.name, one.file, one.weight) for one in recipe.rewards] == [
        ("regex", None, 0.2),
        ("right_number", "my_rewards.py", 1.0),
    ]
    assert "get_soft_overlong_punishment: write it" in imported("trl_grpo").account


def test_grpo_over_all_weights_has_no_reference(write) -> None:
    file = write("model_name_or_path: m\ndataset_name: a.jsonl\nbeta: 0.04\nnum_generations: 8\n")
    result = import_recipe(file)
    assert load_recipe(write(result.text)).algorithm.beta == 0
    assert "full fine-tuning keeps no reference" in result.text
    assert "to write" in result.text and "my_reward" in result.text


@pytest.mark.parametrize(
    ("keys", "method"),
    [
        ("desirable_weight: 1.0", "kto"),
        ("loss_type: kto", "kto"),
        ("center_rewards_coefficient: 0.01", "reward"),
        ("reward_model_name_or_path: some/model", "grpo"),
        ("loss_type: dapo", "grpo"),
        ("simpo_gamma: 0.5\ncpo_alpha: 0.5", "cpo"),
        ("f_divergence_type: js_divergence", "dpo"),
    ],
)
def test_the_command_is_told_by_the_keys(keys: str, method: str, write) -> None:
    result = import_recipe(write(f"model_name_or_path: m\ndataset_name: a.jsonl\n{keys}\n"))
    assert load_recipe(write(result.text)).method == method


# ---- Axolotl ----------------------------------------------------------------------------------------------------


def test_axolotl_qlora(tmp_path: Path) -> None:
    recipe, told = recipe_of("axolotl_dpo_qlora", tmp_path), imported("axolotl_dpo_qlora").account
    assert (recipe.model.load_in_4bit, recipe.model.bnb_4bit_use_double_quant) == (True, True)
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.target_modules) == (32, 16, "all-linear")
    assert recipe.algorithm.beta == 0.2
    assert recipe.train.batch_size == 2 * 4
    assert (recipe.train.num_train_epochs, recipe.train.eval_steps) == (4, 0.125)
    assert (recipe.train.optim, recipe.train.lr_scheduler_type) == ("adamw_bnb_8bit", "cosine")
    assert (recipe.train.report_to, recipe.train.project, recipe.train.run_name) == (["wandb"], "chats", "first")
    assert recipe.data.train[0].columns == {"messages": "conversation", "chosen": "better"}
    assert (recipe.data.train[1].path, recipe.data.train[1].columns) == ("more.jsonl", {"prompt": "ask"})
    assert (recipe.data.max_length, recipe.data.overlong) == (4096, "truncate_prompt")
    for said in ("deepspeed\n", "something_of_tomorrow", "flash_attention\n", "saves_per_epoch"):
        assert said in told


def test_axolotl_defaults_and_names_without_counterpart(tmp_path: Path) -> None:
    recipe, result = recipe_of("axolotl_orpo", tmp_path), imported("axolotl_orpo")
    assert (recipe.method, recipe.algorithm.beta, recipe.model.load_in_8bit) == ("orpo", 0.1, True)
    assert (recipe.train.lr_scheduler_type, recipe.train.warmup_steps) == ("cosine", 6)
    assert recipe.train.optim == "adamw_torch"
    assert "optimi_adamw: not one of transformers' optimizers" in result.account
    assert "rex: choose one of transformers' schedules" in result.account
    assert recipe.output_dir == "runs/axolotl_orpo"


def test_axolotl_without_an_adapter_trains_all_weights(tmp_path: Path) -> None:
    recipe = recipe_of("axolotl_simpo_full", tmp_path)
    assert (recipe.lora, recipe.data.eval[0].path, recipe.train.eval_steps) == ("none", "held_out.jsonl", 0.25)
    assert recipe.train.report_to == ["tensorboard"]


def test_axolotl_grpo(tmp_path: Path) -> None:
    recipe = recipe_of("axolotl_grpo", tmp_path)
    assert (recipe.algorithm.beta, recipe.algorithm.temperature, recipe.train.batch_size) == (0.001, 0.8, 2)
    assert [(one.name, one.file, one.weight) for one in recipe.rewards] == [
        ("correctness", "rewards.py", 1.0),
        ("reward_model", None, 0.5),
    ]
    assert recipe.train.warmup_steps == 0.03


# ---- LLaMA-Factory ----------------------------------------------------------------------------------------------


def test_llamafactory_dpo(tmp_path: Path) -> None:
    recipe, result = recipe_of("llamafactory_dpo", tmp_path), imported("llamafactory_dpo")
    assert recipe.algorithm.losses == [{"name": "dpo", "weight": 1.0, "beta": 0.1}, {"name": "sft", "weight": 0.2}]
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.target_modules) == (8, 16, "all-linear")
    assert (recipe.model.load_in_4bit, recipe.model.bnb_4bit_quant_type) == (True, "nf4")
    assert [(one.path, one.count) for one in recipe.data.train] == [("my_pairs", 1000), ("data/more.json", 1000)]
    assert "my_pairs of dataset_info.json, which is not at hand: write" in result.text
    assert recipe.train.batch_size == 8
    assert "template\n" in result.account


def test_llamafactory_kto_over_all_weights(tmp_path: Path) -> None:
    recipe = recipe_of("llamafactory_kto_full", tmp_path)
    assert (recipe.method, recipe.lora) == ("kto", "none")
    assert (recipe.algorithm.beta, recipe.algorithm.undesirable_weight) == (0.2, 1.5)
    assert (recipe.data.eval_fraction, recipe.train.num_train_epochs) == (0.1, 3)


def test_llamafactory_orpo_goes_on_from_an_adapter(tmp_path: Path) -> None:
    recipe = recipe_of("llamafactory_orpo", tmp_path)
    assert (recipe.method, recipe.algorithm.completion_only_loss) == ("orpo", True)
    assert (recipe.model.adapter, recipe.lora, recipe.model.dtype) == ("saves/sft", None, "float16")
    assert (recipe.train.learning_rate, recipe.data.max_length) == (5e-5, 2048)


def test_llamafactory_reward_model(tmp_path: Path) -> None:
    recipe = recipe_of("llamafactory_rm", tmp_path)
    assert (recipe.method, recipe.lora.modules_to_save) == ("reward", ["embed_tokens"])
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]


# ---- bad input --------------------------------------------------------------------------------------------------

TRL = "model_name_or_path: m\ndataset_name: a.jsonl\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a mapping of settings"),
        ("- a\n- b\n", "not a mapping of settings"),
        ("a: [1\n", "not valid YAML"),
        ("beta: 1\nbeta: 2\n", "`beta` is given twice"),
        ("batch: 3\n", "the file of no tool that prefold knows"),
        ("base_model: m\ndataset_name: a\n", "keys of several tools"),
        ("method: dpo\nmodel: {name: m}\n", "a recipe of prefold already"),
        (TRL, "its keys fit several\n  expected: --method dpo | orpo"),
        (TRL + "beta: 0.1\n", "--method dpo"),
        (TRL + "packing: true\n", "supervised fine-tuning"),
        (TRL + "loss_type: [sigmoid, kto_pair]\n", "`loss_type: kto_pair` has no counterpart"),
        (TRL + "loss_type: sapo\n", "`loss_type: sapo` has no counterpart"),
        (TRL + "loss_type: apo_zero_unpaired\n", "no counterpart"),
        (TRL + "loss_type: sigmoid\nlearning_rate: '1e-5'\n", "`train.learning_rate` is '1e-5'"),
        ("dataset_name: a.jsonl\nloss_type: ipo\n", "names no model"),
        ("base_model: m\nadapter: lora\ndatasets: [{path: a, type: alpaca}]\n", "it has no `rl`"),
        ("base_model: m\nrl: gdpo\n", "`rl: gdpo` has no counterpart"),
        ("stage: sft\nmodel_name_or_path: m\n", "`stage: sft`"),
        ("stage: pt\nmodel_name_or_path: m\n", "pre-training"),
        ("stage: ppo\nmodel_name_or_path: m\n", "GRPO does PPO's job"),
        ("stage: dpo\npref_loss: kto_pair\nmodel_name_or_path: m\n", "`pref_loss: kto_pair` has no counterpart"),
    ],
)
def test_bad_files_are_one_message(text: str, message: str, write) -> None:
    with pytest.raises(UserError) as error:
        import_recipe(write(text))
    assert message in str(error.value)
    assert "theirs.yaml" in str(error.value)


def test_a_method_that_the_file_contradicts(write) -> None:
    with pytest.raises(UserError, match="the file says `rl: kto`"):
        import_recipe(write("base_model: m\nrl: kto\n"), "dpo")
    with pytest.raises(UserError, match="the file says `stage: kto`"):
        import_recipe(write("stage: kto\nmodel_name_or_path: m\n"), "dpo")
    with pytest.raises(UserError, match="is none of TRL's"):
        import_recipe(write(TRL), "ppo")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read"):
        import_recipe("nowhere.yaml")


# ---- the command ------------------------------------------------------------------------------------------------


def test_the_recipe_is_on_stdout_and_the_account_on_stderr(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipes("import", str(SAMPLES[NAMES.index("trl_orpo")]), "orpo")
    out, err = capsys.readouterr()
    (tmp_path / "mine.yaml").write_text(out)
    assert load_recipe(str(tmp_path / "mine.yaml")).method == "orpo"
    assert "a file of TRL" in err and "Carried over under another name" in err


def test_import_needs_a_file_and_built_in_recipes_take_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no file to import"):
        recipes("import", None, None)
    with pytest.raises(UserError, match="go with `import`"):
        recipes("demo", "x.yaml", None)
    recipes("demo", None, None)
    assert capsys.readouterr().out.startswith("# DPO")
