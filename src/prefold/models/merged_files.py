"""The files of base + adapter, written tensor by tensor as they are computed, in the memory of one layer.

peft merges the layers one by one: the model has shapes alone, and each layer gets its weights when it is merged. Files,
names and bytes are those that transformers' `save_pretrained` writes for the merged model, with weights distributed
over files as in the base.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from prefold.files import new_file, read_json, sha256_of, write_json, write_text
from prefold.models.adapters import WEIGHTS, open_adapter
from prefold.models.chat_format import grown, new_rows
from prefold.models.fetch import INDEX, fetch, weight_files
from prefold.models.load import load_model
from prefold.models.score_head import set_padding
from prefold.models.tokenizer import load_tokenizer, tokenizer_of
from prefold.recipe import Model
from prefold.terminal import progress_bar
from prefold.trees.memory import returning_allocations

FORMATS = {
    **{torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16"},
    **{torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"},
}
"""safetensors' names of dtypes, in the order in which it writes tensors."""
WRITTEN = "written.json"
"""Lists the complete files of an unfinished folder, with their SHA-256."""


class Unmergeable(Exception):
    """Why a model cannot be merged layer by layer."""


class MergedTensors:
    """Base + adapter, by the names of the tensors in files.

    Args:
        model: of shapes alone, without the adapter, in the dtype to be merged into; the adapter is loaded onto it.

    Raises:
        Unmergeable: weights that the adapter changes are stored in another form than they are computed in, or are
            shared with a layer that it does not change.
    """

    def __init__(self, base: Model, model: PreTrainedModel, adapter: Path | None, files: Sequence[Any]):
        self.shapes = saved_shapes(model)
        self.stored = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # no mapping
        names = {id(weight): name for name, weight in model.named_parameters()}
        self.new_rows = _vocabulary(base, model, names) if base.chat_template else {}
        self.layers: dict[str, tuple[str, Any]] = {}
        self.last: tuple[str, dict[str, Tensor]] = ("", {})
        shared: set[str] = set()
        if adapter is not None:
            adapted: Any = open_adapter(model, adapter)
            adapted.base_model._check_merge_allowed()
            _give_contents(adapted, adapter)
            for path, layer in _adapted_layers(adapted.get_base_model()):
                own = {names[id(weight)] for weight in layer.parameters() if id(weight) in names}
                self.layers |= {name: (path, layer) for name in own if name.startswith(f"{path}.")}
                shared |= {name for name in own if not name.startswith(f"{path}.")}
        self.names = names
        elsewhere = [name for name in self.layers if name not in self.shapes] + sorted(shared - self.layers.keys())
        missing = [name for name in self.shapes if name not in self.stored and name not in self.layers]
        if elsewhere or missing:
            raise Unmergeable(f"`{[*elsewhere, *missing][0]}` is stored in another form")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layers:
            return self._base(name, self.shapes[name].dtype)
        path, layer = self.layers[name]
        if self.last[0] != path:
            self.last = ("", {})
            self.last = (path, self._merged(path, layer))
        return self.last[1][name].to(self.shapes[name].dtype)

    def _base(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of the base, mapped from its file if it needs no cast."""
        tensor: Tensor = self.stored[name].get_tensor(name).to(dtype)
        if name in self.new_rows:
            known, tokenizer = self.new_rows[name]
            return grown(tensor, self.shapes[name].shape[0], new_rows(tokenizer, known, len(tensor)))
        return tensor

    def _merged(self, path: str, layer: nn.Module) -> dict[str, Tensor]:
        """The merged weights of a layer, added up by peft in float32: a base that is rounded first loses every change
        of less than half a rounding step."""
        layer, given = copy.deepcopy(layer), [self.names.get(id(weight)) for weight in layer.parameters()]
        for (inner, weight), name in zip(list(layer.named_parameters()), given, strict=True):
            if name is not None and name in self.stored:
                owner, _, attribute = inner.rpartition(".")
                setattr(
                    layer.get_submodule(owner),
                    attribute,
                    nn.Parameter(self._base(name, torch.float32), weight.requires_grad),
                )
        special = getattr(layer, "unload_and_optionally_merge_module", None)
        if special is not None:
            merged = special(merge=True, safe_merge=True, adapter_names=None)
        else:
            cast(Any, layer).merge(safe_merge=True)
            merged = cast(Any, layer).get_base_layer()
        return {f"{path}.{inner}": weight.detach() for inner, weight in merged.named_parameters()}


def saved_shapes(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors that `save_pretrained` would write, by their names in files, without contents."""
    ignored = model._keys_to_ignore_on_save or ()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    return dict(revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model)))


def _vocabulary(base: Model, model: PreTrainedModel, names: Mapping[int, str]) -> dict[str, tuple[int, Any]]:
    """The tensors that have a row for each token, with the arguments of `new_rows`."""
    head: Any = model.get_output_embeddings()
    ends = (model.get_input_embeddings().weight, getattr(head, "weight", None), getattr(head, "bias", None))
    known = len(load_tokenizer(fetch(base.name, base.revision)))
    return {names[id(weight)]: (known, tokenizer_of(base)) for weight in ends if weight is not None}


def _give_contents(adapted: Any, folder: Path) -> None:
    """Load the adapter's own weights on the CPU: peft leaves them on the base's device, without contents."""
    stored = load_file(folder / WEIGHTS)
    own = get_peft_model_state_dict(adapted, adapted.state_dict(keep_vars=True), save_embedding_layers=False)
    contents = {id(weight): nn.Parameter(stored[name].float(), False) for name, weight in own.items()}
    for module in adapted.modules():
        module._parameters.update(
            {name: contents[id(weight)] for name, weight in module._parameters.items() if id(weight) in contents}
        )
    if empty := [name for name, weight in adapted.named_parameters() if "lora_" in name and weight.is_meta]:
        raise Unmergeable(f"`{empty[0]}` is stored in another form")


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Outermost modules with trained weights, with their names in the base."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        wraps = hasattr(module, "unload_and_optionally_merge_module") or hasattr(module, "base_layer")
        if wraps and not path.startswith(inside):
            inside = (*inside, f"{path}.")
            yield path, module


@returning_allocations()
def write_merged(
    base: Model, adapter: Path | None, folder: Path, dtype: str, head_seed: int | None, pad_token: int | None
) -> None:
    """Write weights, configuration and generation settings. Files that an earlier process completed are kept.

    Raises:
        Unmergeable: see `MergedTensors`.
        UserError: the adapter belongs to another base, or the base cannot be used.
    """
    files = weight_files(fetch(base.name, base.revision))
    model = load_model(base, dtype=dtype, head_seed=head_seed, contents=False)
    if head_seed is not None:
        set_padding(model, pad_token)
    _save_settings(model, folder)
    parameters = model.num_parameters()
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        tensors = MergedTensors(base, model, adapter, opened)
        by_file = {file.name: handle for file, handle in zip(files, opened, strict=True)}
        parts = {name: [key for key in tensors.shapes if tensors.stored.get(key) is by_file[name]] for name in by_file}
        parts = {name: keys for name, keys in parts.items() if keys}
        [*_, last] = parts.values()
        last += [key for key in tensors.shapes if key not in tensors.stored]
        _write_files(folder, parts, tensors)
    if len(files) > 1:
        size = sum(tensor.nbytes for tensor in tensors.shapes.values())
        index = {
            "metadata": {"total_parameters": parameters, "total_size": size},
            "weight_map": {key: name for name, keys in parts.items() for key in keys},
        }
        write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _save_settings(model: PreTrainedModel, folder: Path) -> None:
    """Write what `save_pretrained` writes beside the weights, which would remove weights that are already there."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        cast(Any, model).generation_config.save_pretrained(folder)


def _write_files(folder: Path, parts: Mapping[str, Sequence[str]], tensors: MergedTensors) -> None:
    record = folder / WRITTEN
    written: dict[str, str] = read_json(record) if record.is_file() else {}
    with progress_bar("merge", len(tensors.shapes)) as advance:
        for name, keys in parts.items():
            if name in written and (folder / name).is_file() and sha256_of(folder / name) == written[name]:
                advance(advance=len(keys))
                continue
            with new_file(folder / name) as aside:
                digest = _write_file(aside, sorted(keys), tensors, advance)
            written[name] = digest
            write_json(record, written)
    record.unlink()


def _write_file(path: Path, names: list[str], tensors: MergedTensors, advance: Any) -> str:
    """Write tensors as safetensors' `save_file` does, which needs all of them at once. Returns the SHA-256."""
    shapes, digest, offset = tensors.shapes, hashlib.sha256(), 0
    names.sort(key=lambda name: list(FORMATS).index(shapes[name].dtype))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in names:
        end = offset + shapes[name].nbytes
        header[name] = {
            "dtype": FORMATS[shapes[name].dtype],
            "shape": list(shapes[name].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        for start in (len(text).to_bytes(8, "little"), text):
            file.write(start)
            digest.update(start)
        for name in names:
            tensor = tensors[name]
            assert tensor.shape == shapes[name].shape and not tensor.is_meta, name
            content = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
            file.write(content)
            digest.update(content)
            advance(advance=1)
    return digest.hexdigest()
