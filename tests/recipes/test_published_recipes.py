"""The recipes of published models, whole, on tiny random models of their architecture and rows in the same shape."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from base_model import base_tokenizer
from tiny import SHAPE
from tiny_tokenizer import CHATML, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import prefold
from prefold.recipe import load_recipe

pytest.importorskip("bitsandbytes")

PAIRS = [
    {
        "system": "You help." if number % 2 else "",
        "question": f"Say word {number}",
        "prompt": f"Say word {number}",
        "chosen": f"WORD {number}!",
        "rejected": f"word {number}, maybe",
    }
    for number in range(150)
]


def openhermes(folder: Path) -> None:
    tokenizer = make_tokenizer(CHATML)
    model = MistralForCausalLM(MistralConfig(**{**SHAPE, "vocab_size": len(tokenizer)}, sliding_window=64))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def llama3(folder: Path) -> None:
    tokenizer = base_tokenizer(adds_bos=True)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": len(tokenizer)}, tie_word_embeddings=False))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name, make", [("neuralhermes-dpo", openhermes), ("orpollama-orpo", llama3)])
def test_the_whole_path(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "model")
    data = load_recipe(name).data
    sources: list[dict[str, Any]] = []
    for place in range(len(data.train)):
        path = tmp_path / f"{place}.jsonl"
        columns = ("system", "question") if name == "neuralhermes-dpo" else ("prompt",)
        share = PAIRS[place :: len(data.train)]
        rows = [{key: row[key] for key in (*columns, "chosen", "rejected")} for row in share]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append({"path": str(path)})
    changes = [
        f"model.name={tmp_path / 'model'}",
        f"data.train={json.dumps(sources)}",
        # Enough for the adapter to move logits by more than float16 rounds them.
        "train.max_steps=4",
        "train.warmup_steps=0",
        "train.learning_rate=1e-2",
        "train.report_to=[]",
        "evaluate.prompts=1",
        "evaluate.max_new_tokens=4",
        f"output_dir={tmp_path / 'run'}",
    ]
    folder = prefold.run(name, changes)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 4
    merge = json.loads((folder / "merge.json").read_text())
    assert merge["dtype"] == "float16" and merge["difference_from_quantised"] > 0
    # What comes out is an ordinary model with its chat format.
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in text
    assert len(tokenizer) <= merged.get_input_embeddings().weight.shape[0]
    ends = merged.generation_config.eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (ends if isinstance(ends, list) else [ends])
    assert "WORD" not in json.dumps(metrics) and (folder / "report.html").is_file()
