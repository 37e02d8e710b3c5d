"""Merge an adapter into its unquantised base, and verify it: the model loaded back from disk must give the logits of
base and adapter on real tokens, and its tokenizer the same ids.

In half precision weights are rounded, those of the base too if it is stored in another dtype. To tell that from a lost
adapter, the merged model is also compared with the rounded base: how much of the adapter's change of the logits is
left.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from prefold.device import choose_device
from prefold.errors import StageError
from prefold.files import sha256_of, unfinished_folder
from prefold.models.adapters import CONFIG, WEIGHTS, open_adapter
from prefold.models.fetch import fetch, weight_files
from prefold.models.gate import stored_tensors
from prefold.models.load import load_model
from prefold.models.merged_files import Unmergeable, write_merged
from prefold.models.messages import quiet
from prefold.models.score_head import set_padding
from prefold.recipe import Model, RecipeBase
from prefold.terminal import say
from prefold.trees.budget import attempt, pad
from prefold.trees.head import score_layer
from prefold.trees.logprobs import scores_of
from prefold.trees.memory import free_memory, free_on, returning_allocations
from prefold.trees.self_check import in_float32

T = TypeVar("T")

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest root-mean-square difference of the logits, as a share of their own root mean square, by the dtype merged
into, for a model with `DEPTH` layers. All logits are computed in float32."""
DEPTH = 8
SCORE_ALLOWANCE = 4
"""Factor of the tolerance for scores: they lack the offset that logits share, which makes logits large relative to
rounding."""
KEPT = 0.5
"""The share of the adapter's change of the logits that is left in the merged model must differ from 1 by less."""
MEASURABLE = 1e-5
"""Smallest change of the logits, as a share of their size, of which it can be measured how much is left."""
TOKENS = 96
"""Most tokens on which the logits are compared: less than a training step takes."""
CPU = torch.device("cpu")
MARGIN = 1.5
"""Free memory of a GPU, as a multiple of the weights, that the comparison needs to start there."""
SHARD = "5GB"
"""Largest weight file of a model that is not merged file by file."""


def merge_adapter(
    base: Model,
    adapter: Path | None,
    merged: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    dtype: str,
    head_seed: int | None = None,
    trained: Tensor | None = None,
) -> dict[str, Any]:
    """Write `merged` (weights, configuration, generation settings, tokenizer, chat template) and check it.

    Args:
        adapter: None after full fine-tuning: `base` is what was trained, and is cast.
        rows: token ids on which the logits are compared; see `compared`.
        dtype: of the merged weights.
        head_seed: see `load_model`.
        trained: `logits_of` the rows at the end of training, if over a quantised base.

    Returns:
        The content of `merge.json`.

    Raises:
        StageError: the merged model is not base + adapter; nothing is written, the adapter is kept.
        UserError: the adapter belongs to another base, or the base is stored quantised.
    """
    with unfinished_folder(merged, _made_from(base, adapter, dtype, head_seed)) as folder, quiet():
        try:
            write_merged(base, adapter, folder, dtype, head_seed, tokenizer.pad_token_id)
        except Unmergeable as reason:
            say(f"  merged as a whole, in memory: {reason}")
            _write_whole(base, adapter, folder, dtype, head_seed, tokenizer.pad_token_id)
        free_memory()
        tokenizer.save_pretrained(folder)
        _require_same_tokenizer(tokenizer, folder, rows)
        case = Case(base, adapter, folder, rows, getattr(torch, dtype), head_seed, trained)
        sizes = (sum(file.stat().st_size for file in files) for files in (case.base_files, weight_files(folder)))
        result = where_it_fits(partial(_comparison, case), max(sizes))
        _require_equal(result)
    return result


def compared(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ends of real rows, which contain the trained tokens: on these the logits are compared."""
    return [list(row[-(TOKENS // len(rows)) :]) for row in rows]


def _made_from(base: Model, adapter: Path | None, dtype: str, head_seed: int | None) -> str:
    """A hash of what determines the bytes of the merged files."""
    folder = fetch(base.name, base.revision)
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.*"))]
    trained = [sha256_of(adapter / name) for name in (CONFIG, WEIGHTS)] if adapter is not None else []
    versions = [version(name) for name in ("prefold", "torch", "transformers", "peft", "safetensors")]
    facts = (str(folder), stats, trained, versions, base.model_dump(mode="json"), dtype, head_seed)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _write_whole(
    base: Model, adapter: Path | None, folder: Path, dtype: str, head_seed: int | None, pad_token: int | None
) -> None:
    """`write_merged` for a model that fits into memory in float32, on the CPU."""
    model: Any = load_model(base, dtype="float32" if adapter else dtype, head_seed=head_seed, device=CPU)
    if adapter is not None:
        model = open_adapter(model, adapter).merge_and_unload(safe_merge=True).to(getattr(torch, dtype))
    if head_seed is not None:
        set_padding(model, pad_token)
    model.save_pretrained(folder, max_shard_size=SHARD)


# ---- the comparison -----------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What is compared: `base` + `adapter` with the model in `folder`, whose weights are of `dtype`, on `rows`; and the
    logits of a quantised model that was `trained`."""

    base: Model
    adapter: Path | None
    folder: Path
    rows: Sequence[Sequence[int]]
    dtype: torch.dtype
    head_seed: int | None
    trained: Tensor | None

    @property
    def base_files(self) -> list[Path]:
        return weight_files(fetch(self.base.name, self.base.revision))


class Logits(NamedTuple):
    """Logits of base + adapter, `wanted`, of the base alone, and of the base with its weights rounded to the dtype
    merged into; float32 on the CPU, as from `logits_of`."""

    wanted: Tensor
    base: Tensor
    rounded: Tensor


def where_it_fits(compute: Callable[[torch.device], T], weights: int = 0) -> T:
    """The result of `compute` on the GPU; on the CPU if there is no GPU, or it is too small for so many bytes of
    weights and the computation with them."""
    device = choose_device()
    if device.type == "cuda":
        fits = free_on(device) > MARGIN * weights
        if fits and (result := attempt(partial(compute, device))) is not None:
            return result
        free_memory()
        say("  compared on the CPU: the model does not fit into the free memory of the GPU")
    return compute(CPU)


@returning_allocations()
def _comparison(case: Case, device: torch.device) -> dict[str, Any]:
    """The content of `merge.json`. One model is loaded at a time."""
    wanted, plain, rounded = _logits_of_base(case, device)
    free_memory()
    scores, trained = case.head_seed is not None, case.trained
    with _loaded_back(case, device) as saved:
        logits = (_scores_as_read if scores else logits_of)(saved, case.rows)
        tolerance = tolerance_of(saved) * (SCORE_ALLOWANCE if scores else 1)
    moved = wanted - plain
    effect = relative_rms(moved, wanted)
    kept = float((moved * (logits - rounded)).sum() / moved.square().sum()) if effect > MEASURABLE else None
    return {
        "dtype": str(case.dtype).removeprefix("torch."),
        "max_logit_difference": float((logits - wanted).abs().max()),
        "relative_difference": relative_rms(logits - wanted, wanted),
        "tolerance": tolerance,
        "base_rounding": relative_rms(rounded - plain, wanted),
        "adapter_effect": None if case.adapter is None else effect,
        "adapter_kept": kept,
        "tokens_compared": wanted.shape[0],
        "likeliest_equal": None if scores else int((logits.argmax(-1) == wanted.argmax(-1)).sum()),
        "difference_from_quantised": None if trained is None else relative_rms(logits - trained, trained),
    }


def _logits_of_base(case: Case, device: torch.device) -> Logits:
    """Computed in float32 from the weights as they are stored; on a CPU they are mapped from their files."""
    stored = _stored_dtype(case)
    model = load_model(case.base, dtype=stored, head_seed=case.head_seed, device=device)
    with in_float32(model):
        wanted = plain = rounded = logits_of(model, case.rows)
    if getattr(torch, stored) != case.dtype != torch.float32:
        with in_float32(model, case.dtype):
            rounded = logits_of(model, case.rows)
    if case.adapter is not None:
        adapted = open_adapter(model, case.adapter)
        with in_float32(adapted):
            wanted = logits_of(adapted, case.rows)
    return Logits(wanted, plain, rounded)


@contextmanager
def _loaded_back(case: Case, device: torch.device) -> Iterator[PreTrainedModel]:
    """While open, the merged model as transformers reads it, computing in float32."""
    kind: Any = AutoModelForCausalLM if case.head_seed is None else AutoModelForSequenceClassification
    placed = {} if device.type == "cpu" else {"device_map": {"": device}}
    saved = kind.from_pretrained(case.folder, dtype=case.dtype, local_files_only=True, **placed).eval()
    with in_float32(saved):
        yield saved
    del saved
    free_memory()


def _stored_dtype(case: Case) -> str:
    """The dtype that most tensors of the base are stored in."""
    stored = (facts for file in case.base_files for facts in stored_tensors(file, case.base.name).values())
    counted = Counter(facts["dtype"] for facts in stored)
    return {"BF16": "bfloat16", "F16": "float16"}.get(counted.most_common(1)[0][0], "float32")


@torch.no_grad()
def logits_of(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """`[tokens of all rows, V]` float32 on the CPU, computed in one batch; or `[rows]`, scores."""
    model.eval()
    if score_layer(model) is not None:
        return scores_of(model, rows, model.device).float().cpu()
    ids, mask = pad(rows, model.device, 0)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return torch.cat([of_row[: len(row)].float().cpu() for of_row, row in zip(logits, rows, strict=True)])


@torch.no_grad()
def _scores_as_read(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """`[rows]`: scores as transformers itself computes them, in one batch if the model has a pad token."""
    padding = model.config.get_text_config().pad_token_id
    batches = [rows] if padding is not None else [[row] for row in rows]
    padded = (pad(batch, model.device, padding or 0) for batch in batches)
    return torch.cat([model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu() for ids, mask in padded])


def relative_rms(difference: Tensor, wanted: Tensor) -> float:
    """Root mean square of a difference relative to that of the wanted values. Scores below 1 count as 1: rounding does
    not shrink with them."""
    size = wanted.square().mean().sqrt()
    return float(difference.square().mean().sqrt() / (size.clamp(min=1) if wanted.dim() == 1 else size))


# ---- the result in words ------------------------------------------------------------------------------------------


def merge_dtype(recipe: RecipeBase, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the merged model: that of the recipe, else that of the computation; `dtype` is `model.dtype`."""
    setting, computed = recipe.merge.dtype, recipe.model.bnb_4bit_compute_dtype
    named = computed if setting == "auto" else setting
    return dtype if named in (None, "auto") else getattr(torch, named)


def tolerance_of(model: PreTrainedModel) -> float:
    """The relative difference that rounding explains. It adds up like a random walk, with the root of the depth."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", DEPTH)
    return TOLERANCE[model.dtype] * max(1.0, math.sqrt(layers / DEPTH))


def remarks(result: dict[str, Any]) -> list[str]:
    """The results of a merge's checks, as lines for people."""
    measured, allowed = result["relative_difference"], result["tolerance"]
    lines = [f"logits differ by {measured:.1e} of their size, {allowed:.0e} is allowed"]
    effect, kept = result["adapter_effect"], result["adapter_kept"]
    if effect is not None and kept is None:
        lines.append(f"the adapter moves them by {effect:.1e}, too little to say what is left of it")
    elif effect is not None and kept is not None and measured > effect:
        lines.append(
            f"rounding in {result['dtype']} moves them further than the adapter ({effect:.1e}), the base's own by "
            f"{result['base_rounding']:.1e}; {kept:.0%} of what the adapter does is there"
        )
    drift = result["difference_from_quantised"]
    if drift is not None:
        lines.append(f"from those of the quantised model that was trained they differ by {drift:.1e}")
    equal, tokens = result["likeliest_equal"], result["tokens_compared"]
    if equal is not None and equal < tokens:
        lines.append(
            f"the likeliest next token is another one at {tokens - equal} of {tokens} tokens, by that rounding"
        )
    return lines


def _require_equal(result: dict[str, Any]) -> None:
    difference, tolerance, kept = (result[name] for name in ("relative_difference", "tolerance", "adapter_kept"))
    if not difference <= tolerance:
        measured = f"logits differ by {difference:.2g} of their size, {tolerance:.2g} is allowed"
        raise StageError(f"the merged model is not base + adapter: {measured}; adapter kept")
    if kept is not None and not abs(kept - 1) < KEPT:
        raise StageError(
            f"merging into {result['dtype']} loses the adapter: it moves the logits by "
            f"{result['adapter_effect']:.2g} of their size, and {kept:.0%} of that is left; adapter kept. To do: "
            "`merge.dtype=float32`"
        )


def _require_same_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, rows: Sequence[Sequence[int]]) -> None:
    saved = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [str(tokenizer.decode(list(row), skip_special_tokens=False)) for row in rows]
    ids, again = (write(texts, add_special_tokens=False)["input_ids"] for write in (tokenizer, saved))
    kept = ("chat_template", "eos_token_id", "bos_token_id")
    changed = [name for name in kept if getattr(tokenizer, name) != getattr(saved, name)]
    if ids != again or changed:
        what = f"has another {changed[0]}" if changed else "writes other ids for the same text"
        raise StageError(f"the saved tokenizer {what} than the one that was trained with; adapter kept")
