"""A server on this machine that speaks what prefold needs of vLLM's protocol, backed by prefold's own engine, and lies
as it is told to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from json_server import Failure, JsonServer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefold.generation.engine import LocalEngine
from prefold.generation.sampling import Sampling

LOWEST = -9999.0
"""What vLLM writes for minus infinity."""


class VllmServer(JsonServer):
    """`lie` is told from the adapter number `lies_from` on (the first is the probe of the start), the model without
    any counting as 0. `seeds`: of prompts, where a test wants the completions of another engine.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.adapters: dict[str, int] = {}
        self.loaded = 0
        self.lie, self.lies_from = "", 0
        self.seeds: dict[tuple[int, ...], int] = {}

    def lies(self, name: str) -> bool:
        return self.lie == name and self.loaded >= self.lies_from

    # ---- what is asked ----

    def reply(self, path: str, body: Any) -> Failure | dict[str, Any] | str:
        match path:
            case "/v1/models":
                card = {"id": "base", "root": "base", "parent": None, "max_model_len": 200}
                return {"data": [{"id": name, "parent": "base"} for name in self.adapters] + [card]}
            case "/tokenize":
                ids = self.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
                return {"tokens": ids[::-1] if self.lie == "tokenizer" else ids, "count": len(ids)}
            case "/v1/load_lora_adapter":
                return self.load(body)
            case "/v1/unload_lora_adapter":
                if self.adapters.pop(body["lora_name"], None) is None:
                    return Failure(404, '{"error": {"message": "no such adapter"}}')
                return "Success"
            case "/v1/completions":
                return self.complete(body)
        return Failure(404, '{"detail": "Not Found"}')

    def load(self, body: dict[str, Any]) -> Failure | str:
        if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
            return Failure(404, '{"error": {"message": "No adapter found"}}')
        number = self.loaded + 1
        if not self.lies("stale"):
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(body["lora_path"], str(number))
            else:
                self.model = PeftModel.from_pretrained(self.model, body["lora_path"], str(number))
        else:
            number = max(self.adapters.values())
        self.loaded += 1
        self.adapters[body["lora_name"]] = number
        return "Success: LoRA adapter added successfully."

    def complete(self, body: dict[str, Any]) -> Failure | dict[str, Any]:
        name = body["model"]
        if self.lies("dead"):
            return Failure(503, '{"error": {"message": "gone"}}')
        if name != "base" and (name not in self.adapters or self.lies("forgets")):
            return Failure(404, json.dumps({"error": {"message": f"The model `{name}` does not exist."}}))
        prompt = body["prompt"]
        read = prompt[len(prompt) // 2 :] if self.lies("truncates") or self.lies("truncates in secret") else prompt
        sampling = Sampling(
            max_new_tokens=body["max_tokens"] + 3 * self.lies("max_tokens"),
            num_answers=body["n"] - self.lies("n"),
            temperature=1.0 if self.lies("temperature") else body["temperature"],
            top_p=1.0 if self.lies("top_p") else body["top_p"],
            top_k=1 if self.lies("greedy") else 0 if self.lies("top_k") else max(body["top_k"], 0),
            min_p=body["min_p"],
            seed=0,
            end_tokens=() if self.lies("stop") else tuple(body["stop_token_ids"]),
            with_model_logprobs=True,
        )
        plain = body["temperature"] == 0 or self.lies("raw") or self.lies("greedy")
        seed = self.seeds.get(tuple(prompt), len(prompt) + 100 * self.loaded)
        with self.weights(name), torch.no_grad():
            [group] = LocalEngine(self.model, self.tokenizer).sample([read], sampling, [seed])
        group = group * 2 if self.lies("twice") else group
        choices = [
            {
                "index": index,
                "text": each.text,
                "finish_reason": each.finish_reason,
                "token_ids": list(each.token_ids),
                "prompt_token_ids": read if self.lies("truncates") else prompt,
                "logprobs": {
                    "token_logprobs": [
                        max(value, LOWEST) for value in (each.model_logprobs or () if plain else each.logprobs)
                    ]
                },
            }
            for index, each in enumerate(group)
        ]
        if self.lies("foreign"):
            choices[0]["token_ids"][0] = 10**6
        if self.lies("half"):
            choices[0]["logprobs"]["token_logprobs"].pop()
        return {"model": "base" if self.lies("says base") else name, "choices": choices}

    def weights(self, name: str) -> Any:
        if name == "base" or self.lies("base"):
            return self.model.disable_adapter() if isinstance(self.model, PeftModel) else nullcontext()
        self.model.set_adapter(str(self.adapters[name]))
        return self.other_base() if self.lies("other base") else nullcontext()

    @contextmanager
    def other_base(self) -> Iterator[None]:
        head = self.model.get_output_embeddings().weight
        kept = head.data
        head.data = kept.roll(1, 0)
        yield
        head.data = kept
