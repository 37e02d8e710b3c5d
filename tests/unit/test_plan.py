"""The plan of a run: parts of memory by hand, from a configuration alone, and changes that can be pasted."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import SHAPE, random_trees, tiny_llama
from tiny_tokenizer import CHATML, make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import prefold
from prefold.errors import UserError
from prefold.plan import timing
from prefold.plan.flops import Steps, Tokens, with_completions
from prefold.plan.machine import Machine, bytes_of
from prefold.plan.memory import BUFFERS
from prefold.plan.meta_model import MetaModel
from prefold.plan.passes import ON_GPU, AllocatedBytes, Row, scoring_pass, training_pass
from prefold.plan.plan import Plan
from prefold.plan.planner import Planner
from prefold.plan.timing import Rate, Rates
from prefold.recipe import RecipeBase, make_recipe
from prefold.runs.check import check
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer

D, INNER, LAYERS, HEADS, KEYS = 32, 48, 3, 4, 16
"""Width, of the MLP, layers, heads, and width of the keys of the tiny model."""
RANK = 4
GB = 10**9
GROUPS = {"num_generations": 4, "max_completion_length": 16}
TREES = [(30, 20, 25), (10, 12, 9), (40, 8, 30), (22, 17, 31)]


def values(method: str = "dpo", **changes: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "method": method,
        "model": {"name": "unused", "dtype": "float32"},
        "lora": {"r": RANK},
        "data": {"train": [{"path": "unused"}]},
        "train": {"batch_size": 2},
        "output_dir": "runs/planned",
    }
    for name, change in changes.items():
        before = recipe.get(name)
        recipe[name] = {**before, **change} if isinstance(before, dict) and isinstance(change, dict) else change
    return recipe


def recipe_of(method: str = "dpo", **changes: Any) -> RecipeBase:
    return make_recipe(values(method, **changes))


def config_of(**changes: Any) -> PreTrainedConfig:
    return AutoConfig.for_model("llama", **{**SHAPE, **changes})


def seven_billion() -> PreTrainedConfig:
    """The shape of Llama 3 8B."""
    return AutoConfig.for_model(
        "llama",
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    )


def planner(
    recipe: RecipeBase, config: PreTrainedConfig, machine: Machine, trees: Sequence[tuple[int, ...]] = TREES
) -> Planner:
    trees = with_completions(recipe, trees)
    size = recipe.train.batch_size
    order = [range(start, min(start + size, len(trees))) for start in range(0, len(trees), size)]
    return Planner(recipe, config, machine, Steps(trees, order), trees[:2])


def plan_of(
    recipe: RecipeBase, config: PreTrainedConfig | None = None, machine: Machine | None = None, **settings: Any
) -> Plan:
    return planner(recipe, config or config_of(), machine or Machine("cpu", 100 * GB, 0), **settings).plan()


# ---- by hand ----------------------------------------------------------------------------------------------------

LINEAR = {"q": D * D, "k": D * KEYS, "v": D * KEYS, "o": D * D, "gate": D * INNER, "up": D * INNER, "down": D * INNER}
LORA = RANK * (2 * (D + D) + 2 * (D + KEYS) + 3 * (D + INNER)) * LAYERS
VOCABULARY = SHAPE["vocab_size"] * D
PARAMETERS = LAYERS * (sum(LINEAR.values()) + 2 * D) + 2 * VOCABULARY + D


def test_parts_by_hand() -> None:
    parts = plan_of(recipe_of()).memory["train"]
    assert parts["weights"] == 4 * PARAMETERS
    assert parts["adapter"] == parts["gradients"] == 4 * LORA
    assert parts["optimizer"] == pytest.approx(8 * LORA, rel=1e-3)
    assert parts["reference"] == 0


def test_full_fine_tuning_by_hand() -> None:
    plan = plan_of(recipe_of(lora="none", dpo={"beta": 0.1}, model={"dtype": "bfloat16"}))
    parts = plan.memory["train"]
    assert plan.trained == plan.parameters == PARAMETERS
    assert parts["weights"] == parts["gradients"] == 4 * PARAMETERS
    assert parts["adapter"] == 0
    assert plan.disk.merged == 2 * PARAMETERS


@pytest.mark.parametrize(
    ("optim", "a_number"), [("adamw_torch", 8), ("sgd", 0), ("adamw_8bit", 2), ("lion_32bit", 4), ("adafactor", 0)]
)
def test_optimizer_states(optim: str, a_number: float) -> None:
    if optim.endswith("bit"):
        pytest.importorskip("bitsandbytes")
    parts = plan_of(recipe_of(train={"optim": optim})).memory["train"]
    assert parts["optimizer"] == pytest.approx(a_number * LORA, rel=0.03, abs=0.05 * LORA)


@pytest.mark.parametrize(
    ("settings", "of_linear"),
    [
        ({"load_in_4bit": True}, 0.5 + 4 / 64),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 0.5 + 1 / 64 + 4 / 64 / 256),
        ({"load_in_8bit": True}, 1.0),
    ],
)
def test_quantised_weights_by_hand(settings: dict[str, Any], of_linear: float) -> None:
    pytest.importorskip("bitsandbytes")
    parts = plan_of(recipe_of(model=settings)).memory["train"]
    whole = PARAMETERS - LAYERS * sum(LINEAR.values())
    rows = 4 * LAYERS * (D + KEYS + KEYS + D + INNER + INNER + D) if "load_in_8bit" in settings else 0
    wanted = 4 * whole + of_linear * LAYERS * sum(LINEAR.values()) + rows
    assert parts["weights"] == pytest.approx(wanted, rel=5e-3)  # a small matrix rounds its scales up


def test_what_a_layer_keeps_by_hand() -> None:
    """Two norms keep their input and one number, the products of a layer their inputs and the inner states of LoRA,
    attention its queries, keys, values, outputs and normalisers, the MLP both halves of the gate and their product."""
    tree = (50, 30, 20)
    floats = 4 * D + 2 + 2 * D + 2 * KEYS + HEADS + 4 * INNER + 7 * RANK
    three, four = (
        sum(
            training_pass(
                MetaModel(recipe_of(), config_of(num_hidden_layers=layers), torch.float32), (tree,), 512, JOINED
            )
        )
        for layers in (3, 4)
    )
    assert four - three == pytest.approx(4 * floats * sum(tree), rel=0.01)


JOINED = "prefold_joined"


def test_checkpointing_keeps_the_input_of_each_layer() -> None:
    tree = (50, 30, 20)
    recipe = recipe_of(train={"gradient_checkpointing": True})
    three, four = (
        sum(training_pass(MetaModel(recipe, config_of(num_hidden_layers=layers), torch.float32), (tree,), 512, JOINED))
        for layers in (3, 4)
    )
    assert four - three == pytest.approx(4 * D * sum(tree), rel=0.01)


def test_the_head_is_a_chunk_and_its_gradient() -> None:
    scored = 10
    _, head = training_pass(MetaModel(recipe_of(), config_of(), torch.float32), ((20, 6, 4),), 512, JOINED)
    logits, jacobian = 4 * scored * SHAPE["vocab_size"], 4 * scored * D
    # The logits become the exponentials in place; the pull and the expected row stand beside the gradient.
    assert logits + jacobian <= head <= logits + 5 * jacobian


def test_dropout_and_dora_take_more() -> None:
    def activations(**lora: Any) -> int:
        return plan_of(recipe_of(lora={"r": RANK, **lora})).memory["train"]["activations"]

    assert activations() < activations(lora_dropout=0.1)
    assert activations() < activations(use_dora=True)


def test_rollouts_by_hand() -> None:
    """Two prompts of 40 tokens at most with four completions of 16 each; the weights once folded, once reordered."""
    recipe = recipe_of("grpo", rewards=[{"name": "length", "target": 8}], grpo=GROUPS)
    parts = plan_of(recipe).memory["rollouts"]
    states = LAYERS * 2 * KEYS * 4
    assert parts["cache"] == 2 * (40 + 4 * 16) * states + 2 * 4 * LAYERS * sum(LINEAR.values())
    assert parts["optimizer"] > 0


@pytest.mark.parametrize(("bits", "computed", "size"), [("4", "auto", 2), ("4", "float32", 4), ("8", None, 0)])
def test_rollouts_over_quantised_weights(bits: str, computed: str | None, size: int) -> None:
    """Of 4 bits a copy in the dtype that they compute in, where half of what is left holds it."""
    model = {"dtype": "bfloat16", f"load_in_{bits}bit": True, "bnb_4bit_compute_dtype": computed}
    recipe = recipe_of("grpo", rewards=[{"name": "length", "target": 8}], grpo=GROUPS, model=model)
    copy, states = size * LAYERS * sum(LINEAR.values()), 2 * (40 + 4 * 16) * LAYERS * 2 * KEYS * 4
    parts = plan_of(recipe).memory["rollouts"]
    assert parts["cache"] == states + copy
    for left, copied in ((2 * copy, copy), (2 * copy - 2, 0)):
        machine = Machine("cpu", parts["process"] + parts["weights"] + left, 0)
        assert plan_of(recipe, machine=machine).memory["rollouts"]["cache"] == states + copied


@pytest.mark.parametrize("counts_mapped", [False, True])
def test_merging_by_hand(counts_mapped: bool) -> None:
    """Six sets of logits, of 96 tokens of three trees' prompts and first completions; or three and the largest tensor
    in float32; or before that two of the largest with LoRA. The models stay in their files, which only some limits
    count."""
    parts = plan_of(recipe_of(), machine=Machine("cpu", 100 * GB, 0, counts_mapped)).memory["merge"]
    assert parts["mapped"] == (4 * PARAMETERS if counts_mapped else 0)
    logits = 4 * 96 * SHAPE["vocab_size"]
    beside = max(4 * VOCABULARY - 3 * logits, 2 * 4 * D * INNER - 6 * logits, 0)
    assert (parts["head"], parts["activations"], parts["adapter"]) == (6 * logits, beside, 4 * LORA)
    on_gpu = plan_of(recipe_of(), machine=Machine("cuda", 100 * GB, 0))
    assert on_gpu.peaks["merge"] < 4 * PARAMETERS
    assert on_gpu.host == parts["head"] + parts["activations"]  # where whole models may be compared on the CPU


def test_a_merge_that_rounds_by_hand() -> None:
    """Of a wide model of bfloat16, into float16: the head is copied in 16 and in 32 bits; two matrices of the MLP are
    less."""
    config = config_of(dtype="bfloat16", hidden_size=512, vocab_size=4096)
    for dtype, copies in (("float16", 4 + 2), ("bfloat16", 4), ("float32", 4)):
        recipe = recipe_of(model={"dtype": "bfloat16"}, merge={"dtype": dtype})
        parts = plan_of(recipe, config, machine=Machine("cpu", 100 * GB, 0)).memory["merge"]
        wide = copies * 512 * 4096
        assert parts["head"] / 2 + wide == parts["head"] + parts["activations"]


def test_weights_that_need_no_cast_stay_in_their_files() -> None:
    config, linear = config_of(dtype="bfloat16"), LAYERS * sum(LINEAR.values())
    as_stored, cast = (plan_of(recipe_of(model={"dtype": dtype}), config) for dtype in ("bfloat16", "float32"))
    for phase in ("load", "train"):
        assert as_stored.memory[phase]["mapped"] == as_stored.weights == 2 * PARAMETERS
        assert as_stored.memory[phase]["weights"] == cast.memory[phase]["mapped"] == 0
        assert cast.memory[phase]["weights"] == 4 * PARAMETERS
    pytest.importorskip("bitsandbytes")
    quantised = plan_of(recipe_of(model={"dtype": "bfloat16", "load_in_4bit": True}), config).memory["train"]
    assert quantised["mapped"] == 2 * (PARAMETERS - linear) and quantised["weights"] == pytest.approx(linear * 0.5625)
    whole = plan_of(recipe_of(lora="none", model={"dtype": "bfloat16"}), config).memory["train"]
    assert (whole["mapped"], whole["weights"]) == (0, 4 * PARAMETERS)


def test_evaluating_in_16_bits_where_float32_does_not_fit() -> None:
    recipe = recipe_of(model={"dtype": "bfloat16"}, evaluate={"prompts": 0})
    config = config_of(dtype="bfloat16", num_hidden_layers=12)
    ample = plan_of(recipe, config)
    bound = plan_of(recipe, config, Machine("cpu", ample.peaks["evaluate"] - 1, 0))
    assert (ample.in_16_bits, bound.in_16_bits) == (False, True)
    whole, narrow = ample.memory["evaluate"], bound.memory["evaluate"]
    assert (whole["mapped"], whole["weights"]) == (0, 4 * ample.parameters)
    assert (narrow["mapped"], narrow["weights"]) == (2 * ample.parameters, 0)
    assert narrow["activations"] == whole["activations"] + 4 * VOCABULARY
    on_gpu = plan_of(recipe, config, Machine("cuda", 1, 0))
    assert not on_gpu.in_16_bits and on_gpu.memory["evaluate"]["weights"] == 2 * ample.parameters
    assert on_gpu.host < 10**6


LOADED = 10**8 + BUFFERS + 4 * PARAMETERS


def test_an_adapter_to_go_on_from_has_a_frozen_copy(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    given = values(model={"adapter": str(tmp_path)})
    del given["lora"]
    parts = plan_of(make_recipe(given)).memory["train"]
    assert parts["reference"] == parts["adapter"] == 4 * RANK * 2 * D * LAYERS


@pytest.mark.parametrize(
    ("recipe", "peaks", "flops", "largest_budget"),
    [
        (
            recipe_of(),
            {
                "load": LOADED,
                "self-check": 250433600,
                "train": 251284789,
                "merge": 250287539,
                "evaluate": 250714531,
            },
            78419328,
            13880640,
        ),
        (
            recipe_of("grpo", rewards=[{"name": "length", "target": 8}], grpo=GROUPS),
            {
                "load": LOADED,
                "self-check": 250595149,
                "train": 251742259,
                "rollouts": 250505167,
                "merge": 250287539,
                "evaluate": 250714531,
            },
            75571456,
            12467520,
        ),
        (
            recipe_of(lora="none"),
            {
                "load": LOADED,
                "self-check": 250407542,
                "train": 251731898,
                "merge": 250261480,
                "evaluate": 250714531,
            },
            85258624,
            12438976,
        ),
        (
            recipe_of(model={"attn_implementation": "sdpa"}),
            {"load": LOADED, "train": 252606150, "merge": 250287539, "evaluate": 250714531},
            99017088,
            8386240,
        ),
    ],
    ids=["dpo", "grpo", "full", "plain"],
)
def test_planned_figures(recipe: RecipeBase, peaks: dict[str, int], flops: float, largest_budget: int) -> None:
    """What `benchmarks/results/planned-cpu.json` was measured with: where the engine's allocations change, both do."""
    trees = [*TREES, (18, 10, 50)]
    if recipe.algorithm.kind.samples:
        trees = [tree[:1] for tree in trees]
    plan = plan_of(recipe, machine=Machine("cpu", 100 * GB, 10**8), trees=trees)
    assert (plan.peaks, plan.flops, plan.largest_budget) == (peaks, flops, largest_budget)


# ---- tokens and FLOPs -------------------------------------------------------------------------------------------


def test_tokens_by_hand() -> None:
    assert Tokens.of([(3, 2, 1), (4,)]) == Tokens(unique=10, plain=13, scored=3, attended=6 + 6 + 3 + 3 + 1 + 10)


def test_the_order_counts_a_tree_as_often_as_it_is_drawn() -> None:
    steps = Steps([(3, 2, 1), (5, 1, 1)], [[0, 1], [0]])
    assert steps.tokens(False).unique == 2 * 6 + 7
    assert steps.fullest_row(100, packed=True) == ((3, 2, 1), (5, 1, 1))


def test_sampled_completions_that_end_early_let_more_trees_share_a_row() -> None:
    trees = [(10, 20, 20)] * 3

    def fullest(budget: int, sampled: bool = True) -> Row:
        return Steps(trees, [range(3)], sampled).fullest_row(budget, packed=True)

    assert fullest(80, sampled=False) == ((10, 20, 20),)
    assert fullest(80) == ((10, 20, 20), (10, 10, 10))
    assert fullest(50) == ((10, 20, 20),)
    assert fullest(60) == ((10, 20, 20),)  # no room for a prompt and its completions
    assert fullest(200) == tuple(trees)
    assert Steps(trees, [range(3)], sampled=True).fullest_row(90, packed=False) == ((10, 20, 20), (10, 5, 5))


def test_flops_by_hand() -> None:
    """One tree of a prompt and one token, so that attention is next to nothing."""
    plan = planner(recipe_of("orpo"), config_of(), Machine("cpu", GB, 0), [(1, 1, 1)]).plan()
    layers = 2 * 3 * (2 * LAYERS * sum(LINEAR.values()) + 3 * LORA)
    head = 2 * 2 * 2 * VOCABULARY
    attention = 2 * (1 + 2 + 2) * D * LAYERS * 7
    assert plan.flops == layers + head + attention


def test_plain_path_counts_every_copy_of_a_prompt() -> None:
    packed, plain = (plan_of(recipe_of(model={"attn_implementation": one})) for one in ("trees", "sdpa"))
    assert packed.tokens < plain.tokens == packed.plain_tokens
    assert packed.memory["train"]["activations"] < plain.memory["train"]["activations"]


# ---- what fits --------------------------------------------------------------------------------------------------


def test_memory_grows_with_the_budget() -> None:
    trees = [(60, 40, 50)] * 8
    recipe = {"batch_size": 8}
    peaks = [
        plan_of(recipe_of(train={**recipe, "max_tokens": budget}), trees=trees).peaks["train"]
        for budget in (150, 300, 600, 1200)
    ]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]


def test_checkpointing_keeps_nothing_that_was_freed() -> None:
    kept, returned = (plan_of(recipe_of(train={"gradient_checkpointing": on})).memory["train"] for on in (False, True))
    assert kept["allocator"] > returned["allocator"] == BUFFERS


def test_the_largest_budget_fits_and_no_larger_one() -> None:
    trees = [(400, 240, 160)] * 16
    config = config_of()
    whole = plan_of(recipe_of(train={"batch_size": 16, "max_tokens": 100_000}), config, trees=trees)
    machine = Machine("cpu", whole.peaks["train"] * 2 // 3, 0)

    def train_at(budget: int) -> Plan:
        recipe = recipe_of(train={"batch_size": 16, "max_tokens": budget})
        return planner(recipe, config, machine, trees).plan()

    largest = train_at(1000).largest_budget
    assert largest is not None
    assert train_at(largest).peaks["train"] <= machine.memory
    assert train_at(largest + largest // 5).peaks["train"] > machine.memory


def test_a_model_of_eight_billion_from_its_configuration_alone() -> None:
    started = time.process_time()
    recipe = recipe_of(model={"dtype": "bfloat16", "load_in_4bit": True}, lora={"r": 16})
    plan = plan_of(recipe, seven_billion(), Machine("cuda", 24 * GB, 0), trees=[(400, 300, 280)] * 8)
    assert time.process_time() - started < 10  # about 2 where nothing else runs
    assert plan.parameters == 8_030_261_248
    assert plan.trained == 41_943_040
    assert 5.5 * GB < plan.weights < 6.5 * GB
    assert plan.packed
    assert max(plan.peaks.values()) == plan.peak < 24 * GB


def test_what_is_suggested_can_be_pasted_and_fits(tmp_path: Path) -> None:
    lines = [
        "method: dpo",
        "model:",
        "  name: unused",
        "train:",
        "  batch_size: 8",
        "merge:",
        "  dtype: bfloat16",
        "data: {train: [{path: unused}]}",
        "output_dir: runs/planned",
    ]
    file, text = tmp_path / "recipe.yaml", "\n".join(lines)
    file.write_text(text)
    machine, trees = Machine("cuda", 24 * GB, 0), [(700, 600, 500)] * 8
    first = planner(prefold.load_recipe(str(file)), seven_billion(), machine, trees)
    found = first.with_change(first.plan())
    assert not found.fits
    assert found.change is not None and found.change.fits
    section = ""
    for line in found.change.yaml.splitlines():
        if not line.startswith(" "):
            section = line
        elif section in lines:
            lines.insert(lines.index(section) + 1, line)
        else:
            lines += [section, line]
    file.write_text("\n".join(lines))
    pasted = prefold.load_recipe(str(file))
    assert planner(pasted, seven_billion(), machine, trees).plan().fits
    file.write_text(text)
    overridden = prefold.load_recipe(str(file), found.change.overrides)
    assert planner(overridden, seven_billion(), machine, trees).plan().fits


def test_what_leaves_the_peak_as_it_is_may_be_needed_later() -> None:
    """Rollouts take most at first; once four bits have mended that, training does, which checkpointing mends."""
    grpo = {"num_generations": 8, "max_completion_length": 128}
    model = {"dtype": "bfloat16"}
    recipe = recipe_of("grpo", rewards=[{"name": "length", "target": 8}], grpo=grpo, model=model, lora={"r": 16})
    first = planner(recipe, seven_billion(), Machine("cuda", 18 * GB, 0), [(600,)] * 4)
    plan = first.plan()
    assert max(plan.peaks, key=plan.peaks.__getitem__) == "rollouts"
    change = first.with_change(plan).change
    assert change is not None and change.fits
    assert {"train.gradient_checkpointing", "model.load_in_4bit"} <= change.fields.keys()


def test_four_bits_take_the_place_of_eight() -> None:
    recipe = recipe_of(model={"dtype": "bfloat16", "load_in_8bit": True}, merge={"dtype": "bfloat16"}, lora={"r": 16})
    first = planner(recipe, seven_billion(), Machine("cuda", 26 * GB, 0), [(8000, 6500, 6500)] * 8)
    change = first.with_change(first.plan()).change
    assert change is not None and change.fields["model.load_in_4bit"]
    given = values(model={"dtype": "bfloat16", "load_in_8bit": True})
    for section, fields in yaml.safe_load(change.yaml).items():
        given[section] = {**given.get(section, {}), **fields}
    assert make_recipe(given).model.load_in_4bit


def test_too_little_for_the_weights_is_an_error_and_for_the_rest_a_warning() -> None:
    recipe = recipe_of()
    peak = plan_of(recipe).peak
    severities = [
        [finding.severity for finding in plan_of(recipe, machine=Machine("cpu", memory, 0)).findings()]
        for memory in (2 * peak, peak - 1, 4 * PARAMETERS - 1)
    ]
    assert severities == [[], ["warning"], ["error"]]


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * GB), ("79.6 GiB", int(79.6 * 2**30)), ("800MB", 8 * 10**8)])
def test_amounts_of_memory(text: str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "much", "GB", "-3GB", "24", "24 elephants", "0GB"])
def test_no_amount_of_memory(text: str) -> None:
    with pytest.raises(UserError, match="--device-memory"):
        bytes_of(text)


# ---- several devices --------------------------------------------------------------------------------------------


def launch(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the plan sees it; the environment would have transformers look for the others."""
    for module in ("plan.planner", "launch"):
        monkeypatch.setattr(f"prefold.{module}.launched", lambda: number)


@pytest.mark.parametrize("lora", [{"r": RANK}, "none"])
def test_sharded_weights_are_divided(lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(lora=lora, train={"fsdp": True})
    one = plan_of(recipe)
    launch(4, monkeypatch)
    four = plan_of(recipe)
    divided = {"weights"} if lora != "none" else {"weights", "gradients", "optimizer"}
    for name, size in one.memory["train"].items():
        if name in divided:
            assert four.memory["train"][name] == size // 4, name
        elif name not in ("gathered", "allocator"):
            assert four.memory["train"][name] == size, name
    assert one.memory["train"]["gathered"] == 0 < four.memory["train"]["gathered"] <= 8 * PARAMETERS
    # Checkpoints hold whole tensors, and the whole model is merged by one process.
    assert four.disk == replace(one.disk, free=four.disk.free)
    assert four.memory["merge"] == one.memory["merge"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    hybrid = plan_of(recipe_of(lora=lora, train={"fsdp": "hybrid"}))
    assert hybrid.memory["train"]["weights"] == one.memory["train"]["weights"] // 2


@pytest.mark.parametrize("spread", [{"train": {"fsdp": True}}, {"model": {"device_map": "auto"}}])
def test_a_model_that_is_too_large_for_one_device_may_be_spread(spread: dict[str, Any]) -> None:
    plan = plan_of(recipe_of(**spread), machine=Machine("cuda", 2 * PARAMETERS, 0))
    assert plan.memory["train"]["weights"] > plan.at_hand
    [finding] = plan.findings()
    assert finding.severity == "warning" and "devices" in str(finding.advice)


def test_scales_of_4_bits_are_whole_in_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    launch(4, monkeypatch)
    parts = plan_of(recipe_of(model={"load_in_4bit": True}, train={"fsdp": True})).memory["train"]
    linear = LAYERS * sum(LINEAR.values())
    assert parts["weights"] == pytest.approx((4 * (PARAMETERS - linear) + linear / 2) / 4 + 4 / 64 * linear, rel=5e-3)
    vocabulary_and_norms, two_layers = 4 * (PARAMETERS - linear), 2 * linear / LAYERS * (0.5 + 4 / 64)
    assert parts["gathered"] == pytest.approx(vocabulary_and_norms + two_layers, rel=5e-3)


def test_what_is_suggested_goes_with_sharding() -> None:
    sharded = planner(recipe_of(train={"fsdp": True}), config_of(), Machine("cuda", PARAMETERS, 0))
    found = sharded.with_change(sharded.plan()).change
    assert found is not None and found.fields["model.load_in_4bit"]


# ---- time -------------------------------------------------------------------------------------------------------

A_TOKEN = Rate(1.0 / LAYERS, 0.0)
"""One second for a token of all layers."""


def seconds_of(
    monkeypatch: pytest.MonkeyPatch,
    recipe: RecipeBase,
    held_out: Sequence[tuple[int, ...]],
    order: Sequence[list[int]] = ([0, 1], [2, 3]),
) -> Any:
    """Of four trees in two steps; a decoding step of one row takes a second."""
    rates = Rates(A_TOKEN, A_TOKEN, A_TOKEN, decoding=1.0, rows=1)
    monkeypatch.setattr(timing, "measure", lambda *args: rates)
    monkeypatch.setattr("prefold.plan.planner.tokenizer_of", lambda section: None)
    steps = Steps(with_completions(recipe, TREES), order)
    return Planner(recipe, config_of(), Machine("cpu", 100 * GB, 0), steps, held_out).seconds()


EVERYTHING = sum(map(sum, TREES))


def test_time_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out pairs count at each of their measurements: twice in training, before and after it, and once under the
    reference."""
    asked = {"prompts": 3, "max_new_tokens": 5}
    found = seconds_of(monkeypatch, recipe_of(evaluate=asked, train={"eval_steps": 1}), [(5, 3, 2)])
    assert found == {"train": EVERYTHING + 2 * 10, "reference": EVERYTHING + 10, "evaluate": 2 * (10 + 3 * 5)}
    launch(2, monkeypatch)
    shared = seconds_of(monkeypatch, recipe_of(evaluate=asked, train={"eval_steps": 0.5}), [(5, 3, 2)])
    assert shared == {name: value / 2 for name, value in found.items()}


def test_the_reference_takes_what_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seconds_of(monkeypatch, recipe_of(), [(5, 3, 2)], order=[[2, 0], [0, 2], [2]])
    drawn = sum(TREES[0]) + sum(TREES[2])
    assert (found["train"], found["reference"]) == (2 * drawn + sum(TREES[2]), drawn)


def test_time_of_a_reward_model_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers nothing, and there is none before training."""
    assert seconds_of(monkeypatch, recipe_of("reward"), [(5, 3, 2)]) == {"train": EVERYTHING, "evaluate": 10}


def test_time_of_rollouts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of four, once for the two steps; then a completion for each of three held-out prompts, twice."""
    grpo = {"num_generations": 4, "max_completion_length": 16, "num_iterations": 2, "beta": 0.04}
    recipe = recipe_of("grpo", rewards=[{"name": "length", "target": 8}], grpo=grpo, evaluate={"prompts": 0})
    found = seconds_of(monkeypatch, recipe, [(5,), (6,), (7,)])
    tokens = sum(tree[0] + 4 * 16 for tree in TREES)
    assert found["rollouts"] == 2 * 4 * 16 and found["evaluate"] == 2 * 3 * 16
    assert (found["train"], found["reference"]) == (tokens, tokens // 2)


def test_what_is_not_timed_is_named() -> None:
    assert plan_of(recipe_of()).untimed == []
    assert plan_of(recipe_of(evaluate={"tasks": ["everyday_facts"]})).untimed == ["tasks"]


# ---- the pass on tensors without contents -----------------------------------------------------------------------


def test_what_is_held_is_counted() -> None:
    given = torch.zeros(10)
    with AllocatedBytes([given]) as allocated:
        first = given + 1
        view = first[2:]
        second = torch.cat([view, view])
        assert allocated.now == 4 * (10 + 16)
        del first, view
        second.add_(1)
    assert (allocated.now, allocated.peak) == (4 * 16, 4 * 26)


def test_planned_activations_are_those_of_the_real_pass() -> None:
    """The same count on real tensors."""
    config, tree = config_of(), TokenTree((1,) * 40, ((2,) * 20, (3,) * 30))
    model = tiny_llama()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    scorer = Scorer(model, 512, JOINED)
    resident = [*model.parameters(), *(weight.grad for weight in model.parameters()), *model.buffers()]
    with scorer.in_place(), AllocatedBytes([tensor.detach() for tensor in resident if tensor is not None]) as allocated:
        scorer.score([tree]).tokens.sum().backward()
    meta = MetaModel(recipe_of(lora="none"), config, torch.float32)
    assert sum(training_pass(meta, ((40, 20, 30),), 512, JOINED)) == pytest.approx(allocated.peak, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "phi3", "mixtral", "mamba", "falcon_h1"])
def test_every_family_has_a_plan(family: str) -> None:
    """Those whose passes depend on their contents are planned roughly, and none of them fails."""
    changes = {"layer_types": ["sliding_attention", "full_attention"] * 2} if family == "gemma2" else {}
    config = AutoConfig.for_model(family, **{**SHAPE, "num_hidden_layers": 4, "pad_token_id": 0, **changes})
    targets = ["in_proj"] if family in ("mamba", "falcon_h1") else "all-linear"
    plan = plan_of(recipe_of(lora={"target_modules": targets}), config)
    assert plan.memory["train"]["activations"] > 0


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto", "simpo", "sft"])
@pytest.mark.parametrize("attention", [JOINED, ON_GPU, None])
def test_every_pass_can_be_performed(method: str, attention: str | None) -> None:
    meta = MetaModel(recipe_of(method), config_of(), torch.bfloat16)
    assert min(training_pass(meta, (TREES[0],), 512, attention)) >= 0
    assert scoring_pass(meta, torch.float32, (TREES[0],), 512, attention) > 0


def test_nothing_without_contents_is_left_behind() -> None:
    """A mask that a plan made must not serve a real pass."""
    config = AutoConfig.for_model("mistral", **SHAPE, sliding_window=8)
    training_pass(MetaModel(recipe_of(), config, torch.float32), (TREES[0],), 512, JOINED)
    scorer = Scorer(tiny_llama(), 512, "prefold_segments")
    assert torch.isfinite(scorer.score(random_trees(2)).tokens).all()


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    tokenizer = make_tokenizer(CHATML, bos="<|im_start|>")
    AutoModelForCausalLM.from_config(config_of(vocab_size=len(tokenizer))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"Say {i}", "chosen": f"WORD {i}!", "rejected": f"word {i}"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = values(
        model={"name": str(tmp_path / "model")},
        data={"train": [{"path": str(tmp_path / "pairs.jsonl")}]},
        output_dir=str(tmp_path / "run"),
    )
    (tmp_path / "recipe.yaml").write_text(json.dumps(given))
    return str(tmp_path / "recipe.yaml")


def test_check_plans(recipe_file: str) -> None:
    plan = check(recipe_file, ["train.max_tokens=256"]).as_json()["plan"]
    assert plan["optimizer_steps"] == 9 and plan["batch_size"] == 2 and plan["max_tokens"] == 256
    assert plan["device"] == "cpu" and plan["fits"]
    assert plan["peak"] == max(plan["peaks"].values()) == max(sum(parts.values()) for parts in plan["memory"].values())
    assert plan["memory"]["train"]["process"] > 10**8
    assert json.loads(json.dumps(plan)) == plan


def test_check_for_a_named_gpu(recipe_file: str) -> None:
    found = check(recipe_file, device_memory="24GB")
    assert found.plan.device == "cuda" and found.plan.at_hand == 24 * GB and found.plan.fits
    with pytest.raises(UserError, match="for another"):
        check(recipe_file, device_memory="24GB", measure=True)


def test_measuring_gives_seconds(recipe_file: str) -> None:
    seconds = check(recipe_file, measure=True).plan.seconds
    assert seconds is not None
    assert set(seconds) == {"train", "reference", "evaluate"}
    assert all(value >= 0 for value in seconds.values())
