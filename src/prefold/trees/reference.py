"""Log-probs of the reference: the model as it was before training, its adapter off, or as it came where training goes
on with one.

They never change during a run, so each tree is scored once, when a step first draws it, and kept on disk, where later
runs read it. A file there is named by what determines the numbers beside the trees: the configuration, the weights as
loaded (quantised or not), those of the adapter that was there, their dtypes, the device and the attention path. In it
a tree is known by its token ids and which of them are scored.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from prefold import ranks
from prefold.files import new_file, remove_left_over
from prefold.trees.attention import unwrapped
from prefold.trees.packing import TokenTree
from prefold.trees.scorer import Scorer, frozen_adapter, reference_model

VERSION = "4"
"""Part of the key; to be raised when the numbers that this engine gives change."""

logger = logging.getLogger("prefold")


class Reference:
    """Log-probs of trees under the reference, of those that are asked for.

    Args:
        scorer: of the policy before its first step.
        trees: a data set, which may be larger than what is asked for.
        cache: folder of the cache. A file in it is whole or absent, and is never changed: it holds what one run has
            computed and `keep` has written, so runs side by side do not meet.
        dtype: in which the training step will compute; with the same rounding on both sides, most of it cancels.
    """

    def __init__(self, scorer: Scorer, trees: Sequence[TokenTree], cache: Path, dtype: torch.dtype = torch.float32):
        self.scorer, self.trees, self.dtype, self.folder = scorer, trees, dtype, cache / "reference"
        self._key = _key(scorer, dtype)
        self._new: dict[bytes, Tensor] = {}
        self._kept: dict[bytes, tuple[Path, int, int]] = {}
        for file in sorted(self.folder.glob(f"{self._key}-*.safetensors")) if ranks.is_first() else ():
            self._read_index(file)

    def of(self, indices: Sequence[int]) -> dict[int, Tensor]:
        """By the index of each of these trees, `[scored tokens of its completions]` float32 log-probs in nats, on the
        CPU. Several processes ask for the same, and score a share each of what is not there.

        Trees that are asked for together share rows, so that the numbers of a step are the same to the last bit
        whatever other steps a run has.
        """
        keys = [self.trees[i].digest for i in indices]
        known = ranks.from_first(lambda: [self._known(key) for key in keys])
        missing = {key: i for key, i, tokens in zip(keys, indices, known, strict=True) if tokens is None}
        trees = [self.trees[i] for i in missing.values()]
        new = dict(zip(missing, compute_reference(self.scorer, trees, self.dtype) if trees else (), strict=True))
        self._new.update(new if ranks.is_first() else {})
        return {i: new[key] if tokens is None else tokens for key, i, tokens in zip(keys, indices, known, strict=True)}

    def of_others(self, trees: Sequence[TokenTree]) -> Reference:
        """The same of other trees; what is kept of the two is kept together."""
        other = copy(self)
        other.trees = trees
        return other

    def keep(self) -> None:
        """Write what was computed since the last time. A cache that cannot be written to costs a later run its time."""
        if not self._new:
            return
        name = hashlib.sha256(b"".join(self._new)).hexdigest()[:16]
        file = self.folder / f"{self._key}-{name}.safetensors"
        tensors = {
            "keys": torch.frombuffer(bytearray(b"".join(self._new)), dtype=torch.uint8).view(len(self._new), -1),
            "lengths": torch.tensor([len(tokens) for tokens in self._new.values()]),
            "logprobs": torch.cat([*self._new.values()]),
        }
        try:
            with new_file(file) as temporary:
                save_file(tensors, temporary)
            remove_left_over(self.folder)
        except (OSError, SafetensorError) as error:
            logger.warning("log-probs of the reference are not kept for later runs: %s", error)
            return
        self._new.clear()
        self._read_index(file)

    def _known(self, key: bytes) -> Tensor | None:
        if key in self._new or key not in self._kept:
            return self._new.get(key)
        file, start, stop = self._kept[key]
        try:
            with safe_open(file, "pt") as opened:
                tokens: Tensor = opened.get_slice("logprobs")[start:stop]
                return tokens
        except (OSError, SafetensorError):  # removed meanwhile
            return None

    def _read_index(self, file: Path) -> None:
        """Note where the log-probs of each tree lie. A file that is broken is as none."""
        try:
            with safe_open(file, "pt") as opened:
                keys, lengths = opened.get_tensor("keys").numpy(), opened.get_tensor("lengths")
        except (OSError, SafetensorError):
            return
        stops = lengths.cumsum(0).tolist()
        starts = [0, *stops[:-1]]
        self._kept.update({key.tobytes(): (file, *span) for key, *span in zip(keys, starts, stops, strict=True)})


@torch.no_grad()
def compute_reference(
    scorer: Scorer,
    trees: Sequence[TokenTree],
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The log-probs of trees as `Reference` has them, without its cache."""
    reference: list[Tensor] = [torch.empty(0)] * len(trees)
    device = next(scorer.model.parameters()).device.type
    precision = torch.autocast(device, dtype) if dtype in (torch.bfloat16, torch.float16) else nullcontext()
    with reference_model(scorer.model), precision:
        for row, logprobs in scorer.scored(trees):
            lengths = [trees[i].scored_tokens for i in row]
            for i, part in zip(row, logprobs.tokens.float().cpu().split(lengths), strict=True):
                reference[i] = part
    return reference


def _key(scorer: Scorer, dtype: torch.dtype) -> str:
    model, adapter = scorer.model, frozen_adapter(scorer.model)
    base = [(name, tensor) for name, tensor in model.state_dict().items() if "lora_" not in name]
    digest = model_digest(
        model,
        [*base, *adapter.items()],
        lambda module: getattr(module, "scaling", "") if adapter else "",
        f"{VERSION} attention={scorer.attention} {dtype}",
    )
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
