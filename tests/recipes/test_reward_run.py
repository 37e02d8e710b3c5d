"""Training a reward model, from pairs to a classifier that scores the answers of another run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_llama
from tiny_tokenizer import CHATML, LLAMA3, make_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import prefold
from prefold.data.preference import Message
from prefold.errors import UserError
from prefold.recipe import RecipeBase, Reward, dump_recipe, make_recipe
from prefold.reports.card import render_card
from prefold.rewards import reward_model
from prefold.rewards.load import load_rewards
from prefold.rewards.scoring import score
from prefold.training.loop import TrainingLoop

MakeRecipe = Callable[..., RecipeBase]
QUESTIONS = ["Say word 3", "Say word 50"]
ANSWERS = ["WORD 3!", "word 50, maybe, and then some"]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def scores_by_transformers(folder: Path, texts: list[str]) -> list[float]:
    """As anyone would: one padded batch."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        found: list[float] = model(**batch).logits[:, 0].tolist()
    return found


def conversations(folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ]
    return [tokenizer.apply_chat_template(one, tokenize=False) for one in turns]


def shown_in_the_card(folder: Path) -> list[float]:
    """What a reader gets who runs the lines of the card: by the merged model, and by the adapter on its base."""
    text = render_card(folder, ("merged", "adapter")).replace("PATH/OF/THIS/FOLDER", str(folder))
    merged, adapted = (block.split("```")[0] for block in text.split("```python\n")[1:])
    scope: dict[str, Any] = {}
    exec(merged.replace(f'name = "{folder}"', f'name = "{folder / "merged"}"').replace("print(", "found = ("), scope)
    if not (folder / "adapter").exists():
        return [scope["found"]]
    exec(adapted.replace(f'"{folder}"', f'"{folder / "adapter"}"').replace(', subfolder="adapter"', ""), scope)
    return [scope["found"], scope["model"].eval()(**scope["inputs"]).logits.item()]


def shown_by_transformers(folder: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    turns = [("user", "Why is the sky blue?"), ("assistant", "Air scatters blue light.")]
    text = tokenizer.apply_chat_template([{"role": role, "content": said} for role, said in turns], tokenize=False)
    return scores_by_transformers(folder / "merged", [text])[0]


def scores_as_reward(folder: Path) -> list[float | None]:
    [reward] = load_rewards([Reward(name="reward_model", model=str(folder))], ("prompts", "completions"))
    prompts = [[Message(role="user", content=question)] for question in QUESTIONS]
    [found] = score([reward], prompts, ANSWERS, [[0], [0]], {})
    return found.values


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reward models are opened in the dtype of the device."""
    chosen = reward_model.choose_dtype
    monkeypatch.setattr(
        reward_model,
        "choose_dtype",
        lambda setting, device: chosen("float32" if setting == "auto" else setting, device),
    )


@pytest.mark.parametrize(("lora", "attention"), [({"r": 4}, "trees"), ({"r": 4}, "sdpa"), ("none", "trees")])
def test_a_run(recipe: MakeRecipe, tmp_path: Path, lora: Any, attention: str) -> None:
    train = {"max_steps": 8, "eval_steps": 4}
    made = recipe(method="reward", lora=lora, train=train, model={"attn_implementation": attention})
    folder = prefold.run(made)
    metrics = lines(folder)
    assert metrics[-1].keys() >= {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"}
    assert metrics[-1].keys() >= {"eval_loss", "eval_accuracy", "eval_min_reward"}
    assert metrics[-1]["eval_loss"] < 0.5 and metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["min_reward"] < metrics[-1]["mean_reward"] < metrics[-1]["max_reward"]

    heldout = read(folder, "evaluation/heldout.json")
    assert set(heldout) == {"pairs", "after", "chance"}
    assert heldout["pairs"] == 6 and heldout["after"]["accuracy"] == 1.0 and heldout["after"]["accuracy_ci"][0] > 0.5
    assert heldout["after"]["margin"] == pytest.approx(metrics[-1]["eval_margin"], rel=1e-4)
    chance = heldout["chance"]
    assert (chance["accuracy"], chance["p_value"], chance["verdict"]) == (0.5, 2 * 0.5**6, "better")
    pairs = [json.loads(line) for line in (folder / "evaluation" / "heldout.jsonl").read_text().splitlines()]
    assert [pair["after"] for pair in pairs] == [1.0] * 6 and len({pair["key"] for pair in pairs}) == 6
    assert not (folder / "samples.jsonl").exists()
    page = (folder / "report.html").read_text()
    assert "Held-out accuracy is 100" in page and 'id="answers"' not in page
    assert ">After</th>" in page and ">Before<" not in page

    config = read(folder, "merged/config.json")
    assert config["architectures"] == ["LlamaForSequenceClassification"] and len(config["id2label"]) == 1
    assert read(folder, "merge.json")["relative_difference"] < 1e-4
    good, bad = scores_by_transformers(folder / "merged", conversations(folder / "merged"))
    shown = shown_in_the_card(folder)
    assert shown == pytest.approx([shown_by_transformers(folder)] * len(shown), rel=1e-4)
    assert good > bad
    assert scores_as_reward(folder / "merged") == pytest.approx([good, bad], rel=1e-4)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    prefold.run(made)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} == before


def test_the_seed_decides_everything(recipe: MakeRecipe, tmp_path: Path) -> None:
    def run(name: str) -> bytes:
        folder = prefold.train(recipe(method="reward", train={"max_steps": 2}, output_dir=str(tmp_path / name)))
        return (folder / "adapter" / "adapter_model.safetensors").read_bytes()

    first = run("first")
    torch.manual_seed(99)  # the state of the random generator must not matter
    assert run("again") == first


def test_a_resumed_run_is_a_straight_one(recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = prefold.train(recipe(method="reward", output_dir=str(tmp_path / "straight")))
    step = TrainingLoop.step

    def stopping(self: TrainingLoop) -> None:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        step(self)

    stopped = recipe(method="reward", output_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingLoop, "step", stopping)
        prefold.train(stopped)
    resumed = prefold.train(stopped)
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (resumed / name).read_bytes() == (straight / name).read_bytes()


def test_conversations_that_end_with_the_pad_token(recipe: MakeRecipe, tmp_path: Path) -> None:
    """Many models pad with their end token; transformers would then read every score one token early."""
    base = tmp_path / "base"
    tokenizer = make_tokenizer(LLAMA3, eos="<|eot|>", bos="<|begin|>")
    tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=None).save_pretrained(base)
    tokenizer.save_pretrained(base)
    folder = prefold.run(recipe(method="reward", model={"name": str(base)}))
    config, merged = read(folder, "merged/config.json"), AutoTokenizer.from_pretrained(folder / "merged")
    assert merged.pad_token == "<|begin|>" and config["pad_token_id"] == merged.pad_token_id
    found = scores_by_transformers(folder / "merged", conversations(folder / "merged"))
    assert scores_as_reward(folder / "merged") == pytest.approx(found, rel=1e-4)
    heldout = read(folder, "evaluation/heldout.json")
    assert heldout["after"]["accuracy"] > 0.5


def test_a_base_model_learns_a_chat_format_on_the_way(recipe: MakeRecipe, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tokenizer = make_tokenizer(None, eos="<|text_end|>")
    tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id).save_pretrained(base)
    tokenizer.save_pretrained(base)
    folder = prefold.run(recipe(method="reward", model={"name": str(base), "chat_template": "chatml"}))
    found = scores_by_transformers(folder / "merged", conversations(folder / "merged"))
    assert scores_as_reward(folder / "merged") == pytest.approx(found, rel=1e-4)


def test_its_scores_are_the_rewards_of_a_grpo_run(recipe: MakeRecipe, tmp_path: Path) -> None:
    trained = prefold.run(recipe(method="reward", output_dir=str(tmp_path / "reward")))
    made = recipe(
        method="grpo",
        train={"max_steps": 2, "batch_size": 2},
        grpo={"num_generations": 2, "max_completion_length": 8},
        rewards=[{"name": "reward_model", "model": str(trained / "merged")}],
        output_dir=str(tmp_path / "grpo"),
    )
    metrics = lines(prefold.train(made))
    assert len(metrics) == 2 and all(torch.isfinite(torch.tensor(line["reward"])) for line in metrics)


def test_over_4_bit_weights(recipe: MakeRecipe) -> None:
    pytest.importorskip("bitsandbytes")
    folder = prefold.run(recipe(method="reward", model={"load_in_4bit": True}))
    assert read(folder, "evaluation/heldout.json")["after"]["accuracy"] == 1.0
    assert read(folder, "merge.json")["difference_from_quantised"] > 0


def test_going_on_with_a_reward_model(recipe: MakeRecipe, tmp_path: Path) -> None:
    """Whole, its head is kept; so is that of its adapter. The adapter of a model that writes has none."""
    first = prefold.run(recipe(method="reward", output_dir=str(tmp_path / "first")))
    accuracy = 1.0
    whole = recipe(
        method="reward", model={"name": str(first / "merged")}, train={"max_steps": 1}, output_dir=str(tmp_path / "a")
    )
    assert lines(prefold.train(whole))[0]["accuracy"] == accuracy
    values = {"adapter": str(first / "adapter")}
    adapter = recipe(method="reward", model=values, lora=None, train={"max_steps": 1}, output_dir=str(tmp_path / "b"))
    assert lines(prefold.train(adapter))[0]["accuracy"] == accuracy
    writes = prefold.train(recipe(output_dir=str(tmp_path / "dpo")))
    with pytest.raises(UserError, match="has no score head"):
        prefold.train(
            recipe(
                method="reward",
                model={"adapter": str(writes / "adapter")},
                lora=None,
                output_dir=str(tmp_path / "c"),
            )
        )


# ---- what it refuses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": [{"name": "length", "target": 5}]}, "`rewards` would be ignored by `method: reward`"),
        ({"evaluate": {"prompts": 3}}, r"`evaluate.max_new_tokens` would be ignored by `method: reward`"),
        ({"reward": {"center_rewards_coefficient": -1.0}}, "center_rewards_coefficient must be greater than 0"),
        ({"reward": {"beta": 0.1}}, r"`reward\.beta` is not a field"),
        ({"method": "dpo", "reward": {}}, "a section `reward` beside `method: dpo` would be ignored"),
        ({"method": "mixed", "mixed": {"losses": [{"name": "reward"}]}}, "`reward` is not the name of a loss of pairs"),
    ],
)
def test_settings_that_cannot_be(recipe: MakeRecipe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe(**{"method": "reward", **changes})


def test_models_that_cannot_become_one(recipe: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    labelled = tmp_path / "labelled"
    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(labelled)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(labelled)
    with pytest.raises(UserError, match="is a classifier with several labels"):
        prefold.train(recipe(method="reward", model={"name": str(labelled)}, output_dir=str(tmp_path / "a")))
    bert = tmp_path / "bert"
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForSequenceClassification(config).save_pretrained(bert)
    make_tokenizer(CHATML, bos="<|im_start|>").save_pretrained(bert)
    with pytest.raises(UserError, match="every token sees those after it"):
        prefold.train(recipe(method="reward", model={"name": str(bert)}, output_dir=str(tmp_path / "b")))


def test_a_reward_model_does_not_answer(recipe: MakeRecipe) -> None:
    folder = prefold.run(recipe(method="reward", lora={"r": 2}, train={"max_steps": 1}))
    with pytest.raises(UserError, match="is a sequence classifier: it scores texts and writes none"):
        prefold.train(recipe(model={"name": str(folder / "merged")}, output_dir=str(folder.parent / "dpo")))


def test_what_answers_nothing_is_not_judged(recipe: MakeRecipe) -> None:
    values = yaml.safe_load(dump_recipe(recipe(method="reward")))
    values["evaluate"] = {"win_rate": {"judge": {"name": "repetition"}}}
    with pytest.raises(UserError, match=r"`evaluate\.win_rate` would be ignored by `method: reward`"):
        make_recipe(values)


def test_what_answers_nothing_is_not_compared(recipe: MakeRecipe, tiny_model: Path, tmp_path: Path) -> None:
    made = recipe(method="reward")
    made.run_folder.mkdir()
    (made.run_folder / "recipe.yaml").write_text(dump_recipe(made))
    folder = str(made.run_folder)
    for names in ([folder], [folder, str(tiny_model)], [str(tiny_model), folder]):
        with pytest.raises(UserError, match="scores answers and gives none"):
            prefold.compare(names, ["everyday_facts"])
    beside = recipe(
        evaluate={"tasks": ["everyday_facts"], "compare_with": [folder]}, output_dir=str(tmp_path / "beside")
    )
    with pytest.raises(UserError, match="scores answers and gives none"):
        prefold.check(beside)
