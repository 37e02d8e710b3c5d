"""Log-probs of the reference: the model as it was before training. Its adapter is off, or, if training continues an
adapter, as it was loaded.

They never change during a run, so each tree is scored once, when a step first draws it, and cached on disk for later
runs. The name of a file begins with a digest of what determines the numbers besides the trees: the configuration, the
weights as loaded (quantised or not), those of a continued adapter, their dtypes, the device and the attention path. In
the file, a tree is identified by its token ids and by which of them are scored.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
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
"""Part of the key; to be raised when the engine's numbers change."""

logger = logging.getLogger("prefold")


class Reference:
    """Log-probs of trees under the reference, computed for the requested trees alone.

    Args:
        scorer: of the policy before its first step.
        trees: a data set, of which only some trees may be requested.
        cache: folder of the cache. Each `keep` writes a new file, which is whole or absent and never changes, so runs
            may share the folder.
        dtype: the compute dtype of the training step; with the same rounding on both sides, most of it cancels.
    """

    def __init__(self, scorer: Scorer, trees: Sequence[TokenTree], cache: Path, dtype: torch.dtype = torch.float32):
        self.scorer, self.trees, self.dtype, self.folder = scorer, trees, dtype, cache / "reference"
        self._key = _key(scorer, dtype)
        self._new: dict[bytes, Tensor] = {}
        self._kept: dict[bytes, tuple[Path, int, int]] = {}
        for file in sorted(self.folder.glob(f"{self._key}-*.safetensors")) if ranks.is_first() else ():
            self._read_index(file)

    def of(self, indices: Sequence[int]) -> dict[int, Tensor]:
        """By index, each tree's `[scored tokens of its completions]` float32 log-probs in nats, on the CPU. Several
        processes request the same trees, and each scores a share of those that are not cached.

        Only trees that are requested together share rows, so that the numbers of a step are the same to the last bit
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
        """A reference for other trees, which shares the cache of this one."""
        other = copy(self)
        other.trees = trees
        return other

    def keep(self) -> None:
        """Write what was computed since the last call. A cache that cannot be written costs later runs their time."""
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
        """Index the log-probs in a file by tree. A broken file is ignored."""
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
    """Log-probs of trees under the reference, as from `Reference`, without its cache."""
    reference: list[Tensor] = [torch.empty(0)] * len(trees)
    device = next(scorer.model.parameters()).device.type
    with reference_model(scorer.model), torch.autocast(device, dtype, enabled=dtype.itemsize == 2):
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
    """A hash of a model's configuration, tensors and compute dtypes, to which more may be added.

    Args:
        tensors: with their names. Their dtypes, shapes, device types and bytes count; of sharded ones, the bytes of
            this process.
        state: further state of each module that counts.
        salt: what else determines the numbers.
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
