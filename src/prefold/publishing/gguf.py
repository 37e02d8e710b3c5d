"""A merged model as GGUF, the format of llama.cpp, checked by loading the file back and comparing logits and token ids.

Llama, Mistral, Qwen2 and Qwen3, each in the layout that llama.cpp reads; other families are refused. F16 and Q8_0 are
written here, one tensor in memory at a time; the K-quants are made from F16 by llama.cpp's own `llama-quantize`.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, LlamaFileType, RopeScalingType
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from prefold import memory
from prefold.device import choose_device, is_half
from prefold.errors import StageError, UserError, first_line
from prefold.files import new_folder, read_json, write_json
from prefold.generation.opening import WORKING, open_model, stored_weights
from prefold.models.from_gguf import DAMAGED, FREQUENCIES, open_gguf, rope_divisors
from prefold.models.load import load_model
from prefold.models.merge import TOLERANCE as ROUNDING
from prefold.models.merge import logits_of, relative_rms
from prefold.models.messages import quiet
from prefold.plan.machine import Machine
from prefold.publishing.gguf_tokenizer import add_vocabulary, read_vocabulary
from prefold.recipe import Model
from prefold.terminal import console, say
from prefold.trees.memory import free_memory
from prefold.trees.self_check import compute_in_float32

FAMILIES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""llama.cpp's architecture for each `model_type` of transformers."""
SCALINGS = ("default", "linear", "llama3")
WRITTEN = {"F16": LlamaFileType.MOSTLY_F16, "Q8_0": LlamaFileType.MOSTLY_Q8_0}
QUANTIZER = "llama-quantize"
BITS = {
    "F16": 16.0,
    "Q8_0": 8.5,
    "Q6_K": 6.6,
    "Q5_K_M": 5.7,
    "Q5_K_S": 5.5,
    "Q4_K_M": 4.9,
    "Q4_K_S": 4.7,
    "Q3_K_L": 4.3,
    "Q3_K_M": 4.0,
    "Q3_K_S": 3.6,
    "Q2_K": 3.2,
}
"""Bits per weight, about; the K-quants keep some matrices in more than others."""
TOLERANCE = {"F16": 5e-3, "Q8_0": 5e-2}
"""Largest root-mean-square difference of the logits from the merged model's, as a share of the latter's root mean
square."""
UNRELATED = 1.0
"""The same for K-quants, whose loss depends on the model and is reported: logits of another model differ by more."""
BLOCK = 32
"""Weights that share a scale in Q8_0; rows whose width is no multiple of it are kept in F16."""
LARGEST = 65504.0
"""The largest number in F16."""
RECORD = "checks.json"


def require_exportable(model: Path, tokenizer: PreTrainedTokenizerBase, kinds: Sequence[str], where: str) -> None:
    """Raises UserError if the model of a folder cannot become GGUF, or `llama-quantize` is needed and missing."""
    config: Any = AutoConfig.from_pretrained(model, local_files_only=True)
    advice = "leave `gguf` out of `publish.what`"
    if config.model_type not in FAMILIES:
        what = f"a model of the family {config.model_type} cannot become GGUF here"
        raise UserError(what, where=where, expected=f"one of the families {', '.join(FAMILIES)}", advice=advice)
    if (scaling := config.rope_parameters["rope_type"]) not in SCALINGS:
        what = f"its positions are scaled by `{scaling}`, which cannot be written to GGUF here"
        raise UserError(what, where=where, expected=f"one of {', '.join(SCALINGS)}", advice=advice)
    read_vocabulary(tokenizer, where)
    foreign = [kind for kind in kinds if kind not in WRITTEN]
    if foreign and shutil.which(QUANTIZER) is None:
        what = f"{foreign[0]} is made by llama.cpp's `{QUANTIZER}`, and it is not on PATH"
        expected = f"{' or '.join(WRITTEN)}, which need no other program"
        advice = "install llama.cpp and put its programs on PATH"
        raise UserError(what, where="`publish.gguf`", expected=expected, advice=advice)


def export_gguf(
    merged: Path, folder: Path, title: str, kinds: Sequence[str], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Write `folder` with one checked file for each kind, or nothing; an earlier export of the same is kept. Returns
    for each file, named after `title`, its name, kind, size in bytes and the measured difference of its logits.

    Args:
        texts: conversations on which logits and ids are compared, their special tokens spelt out.

    Raises:
        UserError: see `require_exportable`.
        StageError: a file differs from the model, or llama.cpp's program failed.
    """
    names, record = [file_name(title, kind) for kind in kinds], folder / RECORD
    if record.is_file() and record.stat().st_mtime_ns >= (merged.parent / "merge.json").stat().st_mtime_ns:
        made: list[dict[str, Any]] = read_json(record)
        if {check["file"] for check in made} == set(names) and all((folder / name).is_file() for name in names):
            return made
    tokenizer = AutoTokenizer.from_pretrained(merged, local_files_only=True)
    require_exportable(merged, tokenizer, kinds, merged.parent.name)
    original = _original(merged, tokenizer, texts)
    checks = []
    with new_folder(folder) as aside:
        for kind in sorted(kinds, key=lambda kind: kind not in WRITTEN):
            say(f"  writing {kind}")
            file = aside / file_name(title, kind)
            write_gguf(merged, file, kind, title) if kind in WRITTEN else _quantize(merged, file, kind, title)
            difference = _check(file, kind, original)
            say(f"  {kind}: its logits differ by {difference:.1e} of their size from the merged model's")
            size = file.stat().st_size
            checks.append({"file": file.name, "kind": kind, "bytes": size, "relative_difference": difference})
        write_json(aside / RECORD, checks)
    return checks


def file_name(title: str, kind: str) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', title).strip('-.') or 'model'}-{kind}.gguf"


def expected_bytes(merged: Path, kind: str) -> int:
    """The estimated size of a file that does not exist yet."""
    config = AutoConfig.from_pretrained(merged, local_files_only=True)
    numbers = sum(math.prod(tensor.shape) for tensor in _tensors(merged, config, kind))
    return int(numbers * BITS[kind] / 8)


def _quantize(merged: Path, file: Path, kind: str, title: str) -> None:
    source = file.with_name(file_name(title, "F16"))
    kept = source.is_file()
    if not kept:
        write_gguf(merged, source, "F16", title)
    try:
        with console.status(f"{QUANTIZER} is making {kind}"):
            command = [QUANTIZER, str(source), str(file), kind]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise StageError(f"{QUANTIZER} cannot be started ({error.strerror})") from None
    finally:
        if not kept:
            source.unlink()
    if done.returncode or not file.is_file():
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise StageError(f"{QUANTIZER} could not make {kind}: {lines[-1] if lines else f'exit code {done.returncode}'}")


@dataclass(frozen=True)
class Stored:
    """A tensor of the GGUF file: its `name` there, and the tensor `source` of the `file` that it is read from. `heads`:
    the number of heads whose rows are reordered, or 0."""

    name: str
    source: str
    file: Path
    shape: tuple[int, ...]
    kind: Kind
    heads: int

    def load(self) -> NDArray[Any]:
        """The data of the tensor as it is stored, quantised or not."""
        with safe_open(self.file, "pt") as opened:
            weight: Tensor = opened.get_tensor(self.source).float()
        if self.kind == Kind.F16 and not bool((weight.abs() <= LARGEST).all()):
            raise StageError(f"{self.source} holds numbers that F16 does not; it cannot become GGUF")
        values = interleaved(weight, self.heads) if self.heads else weight
        return gguf.quants.quantize(np.ascontiguousarray(values.numpy()), self.kind)


def write_gguf(merged: Path, file: Path, kind: str, title: str) -> None:
    """Write the model of a folder with its tokenizer and chat template as F16 or Q8_0."""
    config: Any = AutoConfig.from_pretrained(merged, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(merged, local_files_only=True)
    tensors = list(_tensors(merged, config, kind))
    writer = GGUFWriter(file, gguf.MODEL_ARCH_NAMES[FAMILIES[config.model_type]])
    try:
        _describe(writer, config, kind, title)
        [embeddings] = [tensor for tensor in tensors if tensor.name == "token_embd.weight"]
        writer.add_vocab_size(embeddings.shape[0])
        add_vocabulary(writer, tokenizer, embeddings.shape[0], merged.parent.name)
        divisors = rope_divisors(config).numpy() if config.rope_parameters["rope_type"] == "llama3" else None
        if divisors is not None:
            writer.add_tensor_info(FREQUENCIES, divisors.shape, divisors.dtype, divisors.nbytes)
        for tensor in tensors:
            block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
            size *= math.prod(tensor.shape) // block
            # The numpy dtype is ignored, given `raw_dtype`.
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float16), size, raw_dtype=tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        for tensor in tensors:
            writer.write_tensor_data(tensor.load())
    finally:
        writer.close()


def _tensors(merged: Path, config: Any, kind: str) -> Iterator[Stored]:
    names = gguf.get_tensor_name_map(FAMILIES[config.model_type], config.num_hidden_layers)
    for file in sorted(merged.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for source in opened.keys():  # noqa: SIM118  (it is no mapping)
                if source == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                name = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise StageError(f"{source} has no place in GGUF; it cannot be exported")
                shape = tuple(opened.get_slice(source).get_shape())
                yield Stored(name, source, file, shape, _kind(kind, shape), _heads(config, name))


def _kind(kind: str, shape: tuple[int, ...]) -> Kind:
    """The type of a tensor: norms and biases stay in float32."""
    if len(shape) < 2:
        return Kind.F32
    return Kind.Q8_0 if kind == "Q8_0" and shape[-1] % BLOCK == 0 else Kind.F16


def _heads(config: Any, name: str) -> int:
    if FAMILIES[config.model_type] is not gguf.MODEL_ARCH.LLAMA:
        return 0
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".attn_k." in name else 0


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """The rows of a query or key matrix `[heads * head_dim, ...]` in llama.cpp's order: its rotary embeddings pair
    neighbouring rows of a head, those of transformers a head's two halves."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _describe(writer: GGUFWriter, config: Any, kind: str, title: str) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer.add_type("model")
    writer.add_name(title)
    writer.add_file_type(WRITTEN[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    # At most the sliding window, which llama.cpp does not support for these families.
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    writer.add_context_length(min(config.max_position_embeddings, window))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


@dataclass(frozen=True)
class Original:
    """What a file is compared with: the merged model's tokenizer, its `logits` `[tokens of all texts, V]` and its
    `dtype`, which a file's weights are loaded in; `numbers`: how many weights it has."""

    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    logits: Tensor
    dtype: torch.dtype
    numbers: int


def _original(merged: Path, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Original:
    ids: Any = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    # In its own dtype: a GPU may have no memory for a larger one.
    dtype: Any = str(AutoConfig.from_pretrained(merged, local_files_only=True).dtype).removeprefix("torch.")
    model = open_model(Model(name=str(merged), dtype=dtype), "GGUF", measured=True, load=load_model)
    original = Original(tokenizer, texts, ids, logits_of(model, ids), model.dtype, stored_weights(merged).numbers)
    del model
    free_memory()
    return original


def _check(file: Path, kind: str, original: Original) -> float:
    """The relative difference of a file's logits from the original's. Raises StageError: it is larger than the file's
    kind explains, or the tokenizer gives other ids."""
    machine = Machine.here(choose_device().type)
    memory.require(file.name, machine.process + WORKING + original.numbers * original.dtype.itemsize, machine.memory)
    with quiet(), redirect_stderr(StringIO()):
        try:
            model, tokenizer = open_gguf(file, original.dtype)
        except DAMAGED as error:
            raise StageError(f"{file.name} cannot be loaded back: {first_line(error)}") from None
    _require_same_tokenizer(original, tokenizer, file.name)
    if choose_device().type == "cpu" and is_half(original.dtype):
        compute_in_float32(model)
    logits = logits_of(cast(Any, model).to(choose_device()), original.ids)
    del model
    free_memory()
    difference = relative_rms(logits - original.logits, original.logits)
    allowed = max(TOLERANCE.get(kind, UNRELATED), ROUNDING[original.dtype])
    if not difference <= allowed:
        measured = f"its logits differ by {difference:.2g} of their size, {allowed:.2g} is allowed"
        raise StageError(f"{file.name} is not the merged model: {measured}; it was not kept")
    return difference


def _require_same_tokenizer(original: Original, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    wanted, texts = original.tokenizer, list(original.texts)
    if read_vocabulary(wanted, name).cuts is None:
        # With a tokenizer from such a file, transformers puts a space before the first word of a text, llama.cpp after
        # every special token: only texts without special tokens are the same to both.
        texts = [str(wanted.decode(list(row), skip_special_tokens=True)) for row in original.ids]
    if wanted(texts, add_special_tokens=False)["input_ids"] != tokenizer(texts, add_special_tokens=False)["input_ids"]:
        raise StageError(f"the tokenizer in {name} writes other ids for the same text; it was not kept")
    if wanted.chat_template != tokenizer.chat_template or wanted.eos_token_id != tokenizer.eos_token_id:
        raise StageError(f"the tokenizer in {name} has another chat template or end token; it was not kept")
