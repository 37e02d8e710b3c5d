"""The tables of `docs/gpus.md`, by the plan: `python docs/gpus_table.py` prints them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from prefold.plan.flops import Steps
from prefold.plan.machine import CUDA_BYTES, Machine
from prefold.plan.plan import Plan
from prefold.plan.planner import Planner
from prefold.recipe import make_recipe

TREES = [(400, 300, 300)] * 16
TOKENS = 2048
CARDS = (8, 12, 16, 24, 32, 48, 80)
MEMORY = (8, 16, 24, 32, 64, 128, 256)
STAGES = ("train", "merge", "evaluate")
PROCESS = 500 * 10**6
"""Of a CPU run, before a model is loaded."""


def shape(family: str, vocabulary: int, width: int, mlp: int, layers: int, heads: int, keys: int, tied: bool) -> Any:
    return AutoConfig.for_model(
        family,
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


MODELS = {
    "SmolLM2 135M": ("llama", 49_152, 576, 1536, 30, 9, 3, True),
    "Qwen2.5 1.5B": ("qwen2", 151_936, 1536, 8960, 28, 12, 2, True),
    "Mistral 7B": ("mistral", 32_000, 4096, 14_336, 32, 32, 8, False),
    "Llama 3 8B": ("llama", 128_256, 4096, 14_336, 32, 32, 8, False),
    "Qwen2.5 14B": ("qwen2", 152_064, 5120, 13_824, 48, 40, 8, False),
    "Llama 3 70B": ("llama", 128_256, 8192, 28_672, 80, 64, 8, False),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA, 4 bits": {"model": {"load_in_4bit": True}, "lora": {"r": 16}},
    "LoRA, bfloat16": {"lora": {"r": 16}},
    "full, 8-bit AdamW": {"lora": "none", "train": {"optim": "adamw_8bit"}},
}


def plan_of(model: str, machine: Machine, setting: str) -> Plan:
    recipe = {
        "method": "dpo",
        "model": {"name": "unused", "dtype": "bfloat16"},
        "data": {"train": [{"path": "unused"}]},
        "train": {"batch_size": 16, "max_tokens": TOKENS, "gradient_checkpointing": True},
        "evaluate": {"prompts": 8, "max_new_tokens": 96},
        "output_dir": "runs/planned",
    }
    for name, values in SETTINGS[setting].items():
        before: Any = recipe.get(name)
        recipe[name] = {**before, **values} if isinstance(before, dict) else values
    config, steps = shape(*MODELS[model]), Steps(TREES, [range(16)])
    return Planner(make_recipe(recipe), config, machine, steps, TREES[:2]).plan()


def smallest(needed: int, sizes: tuple[int, ...]) -> str:
    return next((f"{size} GB" for size in sizes if needed <= size * 10**9), "several")


def peak_of_training(plan: Plan) -> int:
    return max(plan.peaks[phase] for phase in ("load", "self-check", "train"))


def gpu_row(model: str) -> str:
    machine, cells = Machine("cuda", 10**12, CUDA_BYTES), []
    for setting in SETTINGS:
        plan = plan_of(model, machine, setting)
        needed = peak_of_training(plan)
        cells.append(f"{needed / 1e9:.1f}: {smallest(needed, CARDS)}")
    needed = plan.peaks["evaluate"]
    return f"| {model} | {' | '.join(cells)} | {needed / 1e9:.1f}: {smallest(needed, CARDS)} |"


def cpu_row(model: str) -> str:
    """In 4 bits, on a CPU with the least memory in which every stage fits; else the most there is in the list."""
    for size in MEMORY:
        plan = plan_of(model, Machine("cpu", size * 10**9, PROCESS), "LoRA, 4 bits")
        if plan.fits:
            break
    own = [size - plan.memory[phase]["mapped"] for phase, size in plan.peaks.items() if phase in STAGES]
    numbers = " | ".join(f"{needed / 1e9:.1f}" for needed in own)
    mapped = plan.memory["evaluate"]["mapped"] / 1e9
    kept = "16 bits" if plan.in_16_bits else "float32"
    return f"| {model} | {size if plan.fits else f'over {size}'} GB | {numbers} | {mapped:.1f} | {kept} |"


GPU_HEAD = f"""\
| model | {" | ".join(SETTINGS)} | evaluate |
|---|{"---|" * len(SETTINGS)}---|
"""
CPU_HEAD = """\
| model | RAM | train | merge | evaluate | and mapped | evaluated in |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    print(GPU_HEAD + "\n".join(map(gpu_row, MODELS)), end="\n\n")
    print(CPU_HEAD + "\n".join(map(cpu_row, MODELS)))


if __name__ == "__main__":
    main()
