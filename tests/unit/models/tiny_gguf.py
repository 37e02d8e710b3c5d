"""A tiny Llama as a GGUF file, and as the model that it was written from."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tiny import tiny_llama
from transformers import PreTrainedModel

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGED = "ĠĠ"
"""Two spaces: the one merge of the vocabulary."""

LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def tokens() -> list[str]:
    """Special tokens, the 256 bytes in GPT-2's spelling, and one merged piece."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*SPECIAL, *map(chr, printable), *(chr(256 + place) for place in range(len(others))), MERGED]


def write_gguf(path: Path, pre_tokenizer: str = "smollm") -> PreTrainedModel:
    """Write the model and return it. `mlp.gate_proj` is stored as Q4_1; the model gets what that unpacks to."""
    vocabulary = tokens()
    model = tiny_llama(vocab_size=len(vocabulary), tie_word_embeddings=True, intermediate_size=64)
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer, model, vocabulary, pre_tokenizer)
    weights = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in LAYER.items():
            add_layer_weight(writer, f"blk.{layer}.{theirs}.weight", weights[f"model.layers.{layer}.{ours}.weight"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_layer_weight(writer: gguf.GGUFWriter, name: str, weight: np.ndarray) -> None:
    heads = {"attn_q": 4, "attn_k": 2}.get(name.split(".")[2])
    if heads:
        # llama.cpp rotates neighbouring pairs, transformers halves: GGUF stores the rows in llama.cpp's order.
        rows, columns = weight.shape
        weight = weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    if "ffn_gate" in name:
        kind = gguf.GGMLQuantizationType.Q4_1
        packed = gguf.quants.quantize(weight, kind)
        weight[...] = gguf.quants.dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    else:
        writer.add_tensor(name, np.ascontiguousarray(weight))


def describe(writer: gguf.GGUFWriter, model: PreTrainedModel, vocabulary: list[str], pre_tokenizer: str) -> None:
    config = model.config
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in vocabulary])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
