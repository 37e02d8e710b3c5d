"""Files of the alignment handbook and of TRL's trainers: the values that matter, family by family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from prefold.importing import Imported, import_recipe
from prefold.recipe import RecipeBase, Source, load_recipe

SAMPLES = Path(__file__).parent / "samples"


def recipe_of(name: str, folder: Path, method: str | None = None) -> tuple[RecipeBase, Imported]:
    """A sample under a name that says nothing, as a recipe that was written to a file and read back."""
    theirs, ours = folder / "theirs.yaml", folder / "ours.yaml"
    theirs.write_text((SAMPLES / f"{name}.yaml").read_text())
    result = import_recipe(str(theirs), method, str(ours))
    ours.write_text(result.text)
    return load_recipe(str(ours)), result


def sources(found: list[Source]) -> list[tuple[Any, ...]]:
    return [(source.path, source.name, source.split, source.count, source.weight) for source in found]


ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"


def test_zephyr_over_all_weights(tmp_path: Path) -> None:
    recipe, result = recipe_of("handbook_zephyr_dpo_full", tmp_path, "dpo")
    assert sources(recipe.data.train) == [
        (ULTRAFEEDBACK, "default", "train_prefs", None, None),
        (ULTRAFEEDBACK, "default", "test_prefs", None, None),
    ]
    assert recipe.data.eval_fraction == 0.1
    assert "to set: 2000 rows are held out in the file" in result.text
    assert (recipe.method, recipe.algorithm.beta, recipe.lora) == ("dpo", 0.01, "none")
    assert (recipe.train.batch_size, recipe.train.learning_rate, recipe.train.warmup_steps) == (16, 5e-7, 0.1)
    assert (recipe.data.max_length, recipe.data.max_prompt_length) == (1024, 512)
    assert (recipe.train.eval_steps, recipe.train.save_steps, recipe.model.dtype) == (100, 100, "bfloat16")


def test_zephyr_qlora(tmp_path: Path) -> None:
    recipe, _ = recipe_of("handbook_zephyr_dpo_qlora", tmp_path, "dpo")
    assert sources(recipe.data.train) == [(ULTRAFEEDBACK, None, "train_prefs", None, None)]
    assert sources(recipe.data.eval) == [(ULTRAFEEDBACK, None, "test_prefs", None, None)]
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout) == (16, 16, 0)
    assert (recipe.model.load_in_4bit, recipe.train.optim) == (True, "paged_adamw_32bit")
    assert (recipe.train.eval_steps, recipe.train.warmup_steps) == (100, 0.1)


def test_gemma_and_its_empty_system_message(tmp_path: Path) -> None:
    recipe, result = recipe_of("handbook_zephyr_gemma_dpo", tmp_path)
    assert (recipe.method, recipe.algorithm.beta, recipe.train.batch_size) == ("dpo", 0.05, 16)
    assert [source.split for source in (*recipe.data.train, *recipe.data.eval)] == ["train", "test"]
    assert "puts an empty system message before each prompt" in result.account
    assert recipe.train.report_to == ["tensorboard", "wandb"]


def test_smollm2(tmp_path: Path) -> None:
    recipe, _ = recipe_of("handbook_smollm2_dpo", tmp_path, "dpo")
    assert (recipe.algorithm.beta, recipe.train.num_train_epochs, recipe.data.eval_fraction) == (0.5, 3, 0.03)
    recipe, _ = recipe_of("handbook_smollm2_dpo_small", tmp_path, "dpo")
    assert (recipe.publish.hub_model_id, recipe.publish.branch) == ("acme/smollm2-360M-dpo", "v2")
    assert recipe.publish.private is True
    assert recipe.train.report_to == ["tensorboard", "wandb", "mlflow"]
    # The handbook's own settings of that time, where the file says nothing.
    assert recipe.train.optim == "rmsprop"


def test_smollm3_draws_shares_of_its_sets(tmp_path: Path) -> None:
    recipe, result = recipe_of("handbook_smollm3_apo", tmp_path)
    assert recipe.method == "apo_zero"
    assert [(source.name, source.count, source.weight) for source in recipe.data.train] == [
        ("Preference", 0.5, None),
        ("Preference", 0.25, None),
    ]
    assert (recipe.train.save_steps, recipe.train.warmup_steps) == (0.5, 0.1)
    assert (recipe.train.lr_scheduler_type, recipe.train.lr_scheduler_kwargs["min_lr_rate"]) == (
        "cosine_with_min_lr",
        0.1,
    )
    assert "`count`, the share of its rows that is drawn" in " ".join(result.account.split())


def test_mistral_orpo_with_a_template_of_its_own(tmp_path: Path) -> None:
    recipe, result = recipe_of("handbook_mistral_orpo", tmp_path, "orpo")
    assert (recipe.algorithm.beta, recipe.train.warmup_steps, recipe.train.batch_size) == (0.05, 100, 8)
    template = tmp_path / "ours.jinja"
    assert recipe.model.chat_template == str(template)
    assert result.files == {
        template: yaml.safe_load((SAMPLES / "handbook_mistral_orpo.yaml").read_text())["chat_template"]
    }
    assert (recipe.publish.hub_model_id, recipe.data.eval_fraction) == ("acme/mistral-7b-orpo-capybara", 0.1)


def test_mixtral_orpo_of_a_named_set(tmp_path: Path) -> None:
    recipe, _ = recipe_of("handbook_mixtral_orpo", tmp_path, "orpo")
    assert sources(recipe.data.train) == [("argilla/distilabel-capybara-dpo-7k-binarized", None, "train", None, None)]
    assert recipe.train.lr_scheduler_type == "inverse_sqrt"


def test_llama3_orpo_of_shares_and_configurations(tmp_path: Path) -> None:
    recipe, result = recipe_of("handbook_llama3_orpo", tmp_path, "orpo")
    assert sources(recipe.data.train) == [
        ("orpo-explorers/OHP-Stratified-1", "default", "train", 0.4, None),
        ("acme/short-pairs", "english", "train", None, None),
    ]
    assert (recipe.model.chat_template, recipe.data.eval) == ("chatml", [])
    assert "where the handbook takes the first" in " ".join(result.text.replace("#", "").split())


def test_constitutional_ai_of_two_sets(tmp_path: Path) -> None:
    recipe, _ = recipe_of("handbook_constitutional_dpo", tmp_path, "dpo")
    assert [source.count for source in recipe.data.train] == [None, 0.5]
    assert [(source.split, source.count) for source in recipe.data.eval] == [("test_prefs", None)] * 2
    assert recipe.train.optim == "rmsprop"


def test_the_other_files_of_the_handbook(tmp_path: Path) -> None:
    recipe, _ = recipe_of("handbook_starchat_dpo", tmp_path, "dpo")
    assert [(source.path.partition("/")[2], source.split) for source in recipe.data.train] == [
        ("ultrafeedback_binarized", "train_prefs"),
        ("orca_dpo_pairs", "train_prefs"),
        ("ultrafeedback_binarized", "test_prefs"),
        ("orca_dpo_pairs", "test_prefs"),
    ]
    recipe, _ = recipe_of("handbook_gpt2_dutch_dpo", tmp_path, "dpo")
    assert (recipe.train.eval_steps, recipe.train.num_train_epochs) == (0.25, 4)
    recipe, result = recipe_of("handbook_loss_scan_ipo", tmp_path)
    assert (recipe.method, recipe.algorithm.beta) == ("ipo", 0.01)
    assert "push_to_hub_revision" in result.account


def test_a_set_of_which_no_row_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text("model_name_or_path: m\nloss_type: ipo\ndataset_mixer: {a/b: 0, c/d: 1}\ndataset_splits: [train]\n")
    assert "a/b" not in import_recipe(str(file)).text


# ---- TRL's trainers ---------------------------------------------------------------------------------------------


def test_trl_kto_qlora(tmp_path: Path) -> None:
    recipe, result = recipe_of("trl_kto_qlora", tmp_path)
    assert (recipe.method, recipe.algorithm.desirable_weight, recipe.train.warmup_steps) == ("kto", 1.33, 0.1)
    assert (recipe.lora.target_modules, recipe.model.load_in_4bit) == ("all-linear", True)
    assert (recipe.data.eval[0].split, recipe.train.eval_steps) == ("test", 500)
    assert recipe.train.report_to == ["trackio"]
    assert "swanlab: not a tracker that prefold reports to" in " ".join(result.account.split())


def test_trl_reward(tmp_path: Path) -> None:
    recipe, _ = recipe_of("trl_reward_lora", tmp_path)
    assert (recipe.method, recipe.lora.r, recipe.data.max_length) == ("reward", 32, 2048)
    assert (recipe.train.gradient_checkpointing, recipe.train.eval_steps) == (True, 50)


def test_trl_grpo_for_reasoning(tmp_path: Path) -> None:
    recipe, result = recipe_of("trl_grpo_reasoning", tmp_path)
    assert recipe.data.system == "Think first, between <think> and </think>, then give the answer."
    assert recipe.data.train[0].columns == {"prompt": "problem"}
    assert (recipe.algorithm.num_generations, recipe.train.batch_size, recipe.algorithm.temperature) == (16, 4, 0.7)
    assert [(reward.name, reward.weight) for reward in recipe.rewards] == [
        ("symbolic_equality", 1.0),
        ("regex", 0.5),
        ("steps_are_short", 0.25),
    ]
    assert (recipe.train.project, recipe.train.warmup_steps) == ("reasoning", 0.1)
    assert "`prefold run RECIPE --nproc N` uses N GPUs" in result.account


def test_trl_grpo_as_dapo_and_cispo(tmp_path: Path) -> None:
    recipe, result = recipe_of("trl_grpo_dapo", tmp_path)
    assert (recipe.algorithm.epsilon_high, recipe.algorithm.num_iterations, recipe.train.save_steps) == (0.28, 2, 0.1)
    assert recipe.algorithm.mask_truncated_completions is True
    for name in ("top_entropy_quantile", "use_adaptive_entropy", "vllm_importance_sampling_mode"):
        assert [note.group for note in result.notes if name in note.keys] == ["missing"]
    recipe, _ = recipe_of("trl_grpo_cispo", tmp_path)
    assert (recipe.algorithm.loss_type, recipe.algorithm.epsilon_high) == ("cispo", 5.0)
    assert [(source.path, source.name) for source in recipe.data.train] == [
        ("data/sums", None),
        ("acme/riddles", "hard"),
    ]
    assert recipe.lora.lora_dropout == 0


def test_cispo_takes_its_bound_from_epsilon(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    head = "model_name_or_path: m\ndataset_name: a.jsonl\nnum_generations: 8\nloss_type: cispo\n"
    for keys, bound in (("", 0.2), ("epsilon: 0.3\n", 0.3), ("epsilon: 0.3\nepsilon_high: 4.0\n", 4.0)):
        file.write_text(head + keys)
        (tmp_path / "ours.yaml").write_text(import_recipe(str(file)).text)
        assert load_recipe(str(tmp_path / "ours.yaml")).algorithm.epsilon_high == bound


def test_trl_cpo(tmp_path: Path) -> None:
    recipe, _ = recipe_of("trl_cpo", tmp_path)
    assert (recipe.method, recipe.algorithm.loss_type, recipe.algorithm.cpo_alpha) == ("cpo", "hinge", 0.5)
    assert (recipe.algorithm.beta, recipe.train.batch_size, recipe.train.save_steps) == (10.0, 32, 400)


def test_trl_dpo_of_many_keys(tmp_path: Path) -> None:
    recipe, result = recipe_of("trl_dpo_fsdp", tmp_path)
    assert [loss["weight"] for loss in recipe.algorithm.losses] == [0.7, 0.3]
    assert (recipe.train.eval_steps, recipe.train.save_steps, recipe.train.warmup_steps) == (0.2, 0.2, 0.05)
    assert (recipe.data.eval_fraction, recipe.train.greater_is_better) == (0.02, False)
    assert (recipe.train.report_to, recipe.train.gradient_checkpointing) == ([], True)
    assert "all: not a tracker that prefold reports to" in " ".join(result.account.split())
    assert "trackio_space_id" in result.account


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ("warmup_ratio: 0.1\n", 0.1),
        ("warmup_steps: 0.05\n", 0.05),
        ("warmup_steps: 20.0\nwarmup_ratio: 0.1\n", 20),
        ("warmup_steps: 0\nwarmup_ratio: 0.1\nmax_steps: 50\n", 0.1),
        ("warmup_ratio: 1.0\n", 0),
        ("warmup_ratio: 0\n", 0),
    ],
)
@pytest.mark.parametrize(
    "head",
    [
        "model_name_or_path: m\ndataset_name: a.jsonl\nloss_type: ipo\n",
        "model_name_or_path: m\ndataset: a/b\nstage: dpo\nfinetuning_type: full\n",
    ],
)
def test_a_warm_up_is_a_number_or_a_share(head: str, keys: str, steps: float, tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text(head + keys)
    (tmp_path / "ours.yaml").write_text((result := import_recipe(str(file))).text)
    assert load_recipe(str(tmp_path / "ours.yaml")).train.warmup_steps == steps
    assert {line.partition(":")[0] for line in keys.splitlines()} <= {key for note in result.notes for key in note.keys}
