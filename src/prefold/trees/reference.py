"""Log-probs of the reference: the model as it was before training, its adapter off, or as it came where training goes
on with one.

They never change during a run, so they are computed once, before the first step, and kept on disk under a key of all
that determines them: the configuration, the weights as loaded (quantised or not), those of the adapter that was there,
their dtypes, the device, the attention path, the token ids and which of them are scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prefold import ranks
from prefold.files import new_file
from prefold.terminal import Advance, progress_bar
from prefold.trees.attention import unwrapped
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer, frozen_adapter, reference_model

VERSION = "2"
"""Part of the key; to be raised when the numbers that this engine gives change."""


def reference_logprobs(
    scorer: Scorer, trees: Sequence[TokenTree], cache: Path, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Log-probs of every scored token of every tree under the reference.

    Args:
        scorer: of the policy before its first step; a PEFT adapter is switched off meanwhile.
        trees: in any order; the result is in the same.
        cache: folder of the cache; the file in it is whole or absent.
        dtype: in which the training step will compute; with the same rounding on both sides, most of it cancels.

    Returns:
        For each tree, `[scored tokens of its completions]` float32 log-probs in nats, on the CPU.
    """
    file = cache / "reference" / f"{_key(scorer, trees, dtype)}.safetensors"
    logprobs = ranks.from_first(lambda: load_file(file)["logprobs"] if file.is_file() else None)
    if logprobs is None:
        with progress_bar("reference", len(trees)) as advance:
            logprobs = torch.cat(compute_reference(scorer, trees, dtype, advance))
        if ranks.is_first():
            with new_file(file) as temporary:
                save_file({"logprobs": logprobs}, temporary)
    return list(logprobs.split([tree.scored_tokens for tree in trees]))


@torch.no_grad()
def compute_reference(
    scorer: Scorer,
    trees: Sequence[TokenTree],
    dtype: torch.dtype = torch.float32,
    advance: Advance = lambda **changes: None,
) -> list[Tensor]:
    """`reference_logprobs` without its cache."""
    reference: list[Tensor] = [torch.empty(0)] * len(trees)
    device = next(scorer.model.parameters()).device.type
    precision = torch.autocast(device, dtype) if dtype in (torch.bfloat16, torch.float16) else nullcontext()
    with reference_model(scorer.model), precision:
        for row, logprobs in scorer.scored(trees):
            lengths = [trees[i].scored_tokens for i in row]
            for i, part in zip(row, logprobs.tokens.float().cpu().split(lengths), strict=True):
                reference[i] = part
            advance(advance=len(row))
    return reference


def _key(scorer: Scorer, trees: Sequence[TokenTree], dtype: torch.dtype) -> str:
    model, adapter = scorer.model, frozen_adapter(scorer.model)
    base = [(name, tensor) for name, tensor in model.state_dict().items() if "lora_" not in name]
    digest = model_digest(
        model,
        [*base, *adapter.items()],
        lambda module: getattr(module, "scaling", "") if adapter else "",
        f"{VERSION} attention={scorer.attention} {dtype}",
    )
    for tree in trees:
        digest.update(tree.key.encode())
    if scorer.sharded:
        digest = hashlib.sha256("".join(ranks.gather(digest.hexdigest())).encode())
    return str(digest.hexdigest())[:32]


def model_digest(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    state: Callable[[nn.Module], object] = lambda module: "",
    salt: str = "",
) -> Any:
    """A digest, to which more may be added, of a model's configuration, tensors and the dtypes that it computes in.

    Args:
        tensors: with their names; of each its dtype, shape, kind of device and every byte counts, of a sharded one
            those of this process.
        state: what else counts of each module.
        salt: what else decides the numbers.
    """
    digest: Any = hashlib.sha256(f"{salt} torch={torch.__version__}".encode())
    settings = unwrapped(model).config.to_dict()
    config = {name: value for name, value in settings.items() if name != "_name_or_path"}
    digest.update(json.dumps(config, default=str, sort_keys=True).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.device.type}".encode())
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        digest.update(own.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for module in model.modules():
        digest.update(f"{getattr(module, 'compute_dtype', '')}{state(module)}".encode())
    return digest
