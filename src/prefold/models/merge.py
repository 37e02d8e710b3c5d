"""Merge an adapter into its unquantised base, saved whole, and proven: what is loaded back from disk must give the
logits of base + adapter on real tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from prefold.errors import StageError
from prefold.files import new_folder
from prefold.models.load import load_model, quiet
from prefold.recipe import Model
from prefold.trees.memory import free_memory

TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest root-mean-square difference of the logits, as a share of their own root mean square, by the dtype merged
into."""


def merge_adapter(
    base: Model,
    adapter: Path,
    merged: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    dtype: str,
) -> dict[str, Any]:
    """Write `merged` (weights, configuration, generation settings, tokenizer, chat template) and check it.

    Args:
        rows: token ids on which the logits are compared.
        dtype: of the merged weights.

    Returns:
        The content of `merge.json`.

    Raises:
        StageError: the merged model is not base + adapter; nothing is written, the adapter is kept.
    """
    model = load_model(base, dtype=dtype)
    base_logits = _logits(model, rows)
    with quiet():
        adapted: Any = PeftModel.from_pretrained(model, str(adapter), torch_device=str(model.device))
    wanted = _logits(adapted, rows)
    effect = _relative_rms(base_logits - wanted, wanted)
    return save_and_check(adapted.merge_and_unload(safe_merge=True), merged, tokenizer, rows, wanted, effect)


def save_and_check(
    model: PreTrainedModel,
    merged: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    wanted: Tensor | None = None,
    adapter_effect: float | None = None,
) -> dict[str, Any]:
    """Save a model whole, load it back and compare its logits with `wanted` (unset: its own); see `merge_adapter`."""
    dtype, device = model.dtype, model.device
    wanted = _logits(model, rows) if wanted is None else wanted
    with new_folder(merged) as folder, quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        free_memory()
        saved: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        found = _logits(saved.to(device), rows)
        difference = found - wanted
        result = {
            "dtype": str(dtype).removeprefix("torch."),
            "max_logit_difference": float(difference.abs().max()),
            "relative_difference": _relative_rms(difference, wanted),
            "tolerance": TOLERANCE[dtype],
            "adapter_effect": adapter_effect,
            "tokens_compared": wanted.shape[0],
        }
        _judge(result)
    return result


def _judge(result: dict[str, Any]) -> None:
    found, tolerance, effect = result["relative_difference"], result["tolerance"], result["adapter_effect"]
    measured = f"logits differ by {found:.2g} of their size"
    if not found <= tolerance:
        raise StageError(
            f"the merged model is not base + adapter: {measured}, {tolerance:.2g} is allowed; adapter kept"
        )
    if effect is not None and found > effect > 0:
        raise StageError(
            f"merging into {result['dtype']} loses the adapter: {measured}, the adapter itself moves them by "
            f"{effect:.2g}; adapter kept. To do: `merge.dtype=float32`"
        )


@torch.no_grad()
def _logits(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """`[tokens of all rows, V]` float32 on the CPU."""
    model.eval()
    found = [
        model(torch.tensor([list(row)], device=model.device), use_cache=False).logits[0].float().cpu() for row in rows
    ]
    return torch.cat(found)


def _relative_rms(difference: Tensor, wanted: Tensor) -> float:
    return float(difference.square().mean().sqrt() / wanted.square().mean().sqrt())
