"""A run folder as a DPO run leaves it, made up, and texts that try to break out of a report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

RECIPE = """\
method: dpo
model:
  name: HuggingFaceTB/SmolLM2-135M-Instruct
  revision: null
  dtype: auto
  attn_implementation: auto
lora:
  r: 16
  lora_alpha: 32
  lora_dropout: 0.0
  target_modules: all-linear
data:
  train:
  - path: builtin:plain_words
    split: train
  eval: []
  eval_fraction: 0.1
  max_length: 640
  overlong: drop
train:
  learning_rate: 5.0e-05
  batch_size: 16
  max_steps: 120
  warmup_steps: 10
  lr_scheduler_type: cosine
dpo:
  beta: 0.1
evaluate:
  prompts: 4
  max_new_tokens: 96
output_dir: runs/plain-words
"""

ENVIRONMENT = {
    "prefold": "0.1.0",
    "python": "3.11.7",
    "platform": "Linux-6.1-x86_64",
    "device": "cpu",
    "device_name": "AMD EPYC 9B14",
    "cpu_threads": 2,
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "datasets": "5.2.0"},
    "git": None,
}

DATA = {
    "sources": [
        {"path": "builtin:plain_words", "shape": "prompt, chosen, rejected", "rows_in": 850, "rows_used": 843},
        {"path": "more_pairs.jsonl", "shape": "conversations", "rows_in": 1204, "rows_used": 1192},
    ],
    "findings": [
        {
            "kind": "length_bias",
            "severity": "note",
            "count": 612,
            "rows": [],
            "message": "the chosen answer is the shorter one in 73 % of the pairs",
            "advice": "a model can win by being short; compare answers, not only accuracy",
        },
        {
            "kind": "identical_answers",
            "severity": "warning",
            "count": 11,
            "rows": [{"source": "more_pairs.jsonl", "row": row} for row in range(3, 36, 3)],
            "message": "chosen and rejected are the same text",
            "advice": "the pairs were dropped; see how the file was made",
        },
        {
            "kind": "overlong",
            "severity": "warning",
            "count": 8,
            "rows": [{"source": "builtin:plain_words", "row": row} for row in (12, 90, 311, 312, 400, 622, 701, 833)],
            "message": "longer than `max_length: 640`",
            "advice": "raise data.max_length, or let `overlong: truncate_prompt` shorten the prompts",
        },
    ],
    "tokens": {
        "train": {
            "trees": 1951,
            "prompt": 265336,
            "completions": 724821,
            "packed": 990157,
            "plain": 1255493,
            "shared_share": 0.2113,
            "longest": 638,
        },
        "held_out": {
            "trees": 84,
            "prompt": 11424,
            "completions": 31206,
            "packed": 42630,
            "plain": 54054,
            "shared_share": 0.2113,
            "longest": 611,
        },
    },
    "fingerprint": {"train": "b3f1c9a27e04", "held_out": "58d06c2f91ab"},
}

HELDOUT = {
    "pairs": 84,
    "before": {"accuracy": 0.3095, "accuracy_ci": [0.2207, 0.4146], "margin": -0.4012},
    "after": {"accuracy": 0.9167, "accuracy_ci": [0.8381, 0.9589], "margin": 0.8271},
    "difference": {"accuracy": 0.6072, "ci": [0.5, 0.7024], "p_value": 1e-12, "verdict": "better"},
    "reward": {"accuracy": 0.9762, "margin": 3.2114},
}

GUARDS = {
    "events": [
        {
            "guard": "too_easy",
            "action": "roll_back",
            "step": 57,
            "after": 50,
            "message": "in the last 5 steps the model preferred the chosen answer in every pair",
            "advice": "look at the findings of `prefold check`",
            "rows": "more_pairs.jsonl 3, 9",
        }
    ]
}

SYSTEM = "You answer in plain words."

SAMPLES = [
    (
        "What does a compiler do?",
        "A compiler leverages a sophisticated multi-stage paradigm to holistically transform high-level abstractions "
        "into optimised low-level representations, thereby facilitating seamless execution across heterogeneous "
        "architectures.",
        "It turns the code you write into instructions that a machine can run, and tells you where the code makes no "
        "sense.",
    ),
    (
        "Write a short note to a neighbour whose parcel I took in.",
        "Dear esteemed neighbour,\n\nI am writing to formally inform you that, in the course of today's events, I have "
        "had the opportunity to take receipt of a parcel which was addressed to your good self.\n\nKindly advise as to "
        "your preferred modality of collection at your earliest convenience.\n\nWith the utmost regards",
        "Hi,\n\nI have your parcel. Ring my bell any time after six and I will bring it over.\n\nSee you then",
    ),
    (
        "Why is the sky blue?",
        "The phenomenon is attributable to Rayleigh scattering, wherein the intensity of scattered electromagnetic "
        "radiation is inversely proportional to the fourth power of the wavelength.",
        "Air scatters blue light more than red light. So blue reaches your eyes from every part of the sky, not only "
        "from the sun.",
    ),
    (
        "Give me three tips for better sleep.",
        "1. Optimise your circadian alignment.\n2. Implement a pre-sleep protocol.\n"
        "3. Minimise exposure to blue-spectrum illumination.",
        "1. Go to bed and get up at the same time each day.\n2. Put the phone away an hour before.\n"
        "3. Keep the room cool and dark.",
    ),
]

MERGE = {
    "dtype": "float16",
    "max_logit_difference": 0.031,
    "relative_difference": 4.1e-4,
    "tolerance": 5e-3,
    "base_rounding": 3.8e-4,
    "adapter_effect": 0.12,
    "adapter_kept": 0.999,
    "tokens_compared": 412,
    "likeliest_equal": 409,
    "difference_from_quantised": 0.083,
}

STAGES = {
    "data": (4.2, 410),
    "reference": (64.8, 2900),
    "train": (971.2, 4100),
    "merge": (11.9, 1900),
    "evaluate": (148.3, 2300),
    "report": (0.9, 420),
}


def metrics(steps: int = 120) -> list[dict[str, Any]]:
    noise = random.Random(7)
    rows = []
    for step in range(1, steps + 1):
        progress = 1 - math.exp(-step / 35)
        chosen = 0.5 * progress + noise.gauss(0, 0.05)
        rejected = -2.6 * progress + noise.gauss(0, 0.18)
        margin = chosen - rejected
        rows.append(
            {
                "step": step,
                "epoch": round(step * 16 / 1951, 4),
                "loss": math.log1p(math.exp(-margin)),
                "grad_norm": 3.2 * math.exp(-step / 60) + noise.random(),
                "learning_rate": 5e-5 * min(1, step / 10) * (1 + math.cos(math.pi * step / steps)) / 2,
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": margin,
                "rewards/accuracies": min(16, max(0, round(16 * (0.5 + 0.47 * progress) + noise.gauss(0, 1)))) / 16,
                "logps/chosen": -182.0 + 10 * chosen,
                "logps/rejected": -171.0 + 10 * rejected,
            }
        )
    return rows


def sample(prompt: str, before: str, after: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    return {"prompt": messages, "before": [before], "after": [after]}


def write_run(folder: Path, **changes: Any) -> Path:
    """Write a whole run folder. `changes` replace what a file holds, by the file's stem; None leaves the file out."""
    noise = random.Random(3)
    steps = metrics()
    timing: list[dict[str, Any]] = [
        {
            "step": row["step"],
            "seconds": 8.1 + noise.gauss(0, 0.6),
            "tokens": 8120 + noise.randrange(900),
            "peak_memory_mb": 3100,
        }
        for row in steps
    ]
    timing += [{"stage": name, "seconds": spent, "peak_memory_mb": peak} for name, (spent, peak) in STAGES.items()]
    contents: dict[str, Any] = {
        "recipe": RECIPE,
        "environment": ENVIRONMENT,
        "data": DATA,
        "metrics": steps,
        "timing": timing,
        "heldout": HELDOUT,
        "samples": [sample(*texts) for texts in SAMPLES],
        "merge": MERGE,
        "guards": GUARDS,
    }
    contents |= changes
    evaluated = ("heldout", "tasks", "compared", "win_rate", "scores_before", "scores_after")
    names = {
        "recipe": "recipe.yaml",
        "pairs": "evaluation/heldout.jsonl",
        **{name: f"evaluation/{name}.json" for name in evaluated},
    }
    for stem, content in contents.items():
        ending = ".jsonl" if isinstance(content, list) else ".json"
        path = folder / names.get(stem, stem + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif isinstance(content, list):
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        elif content is not None:
            path.write_text(json.dumps(content), encoding="utf-8")
    return folder


# Each of these, if it ran, would set the document's title or `window.owned`.
HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    "</SCRIPT ><SCRIPT>document.title='owned'</SCRIPT>",
    "<!--<script>document.title='owned'</script>",
    "--><script>document.title='owned'</script>",
    "]]><script>document.title='owned'</script>",
    "</title><script>document.title='owned'</script>",
    "</style><script>document.title='owned'</script>",
    "</pre></code></textarea></noscript><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<svg onload=document.title='owned'>",
    "<svg><script>document.title='owned'</script></svg>",
    "<body onload=document.title='owned'>",
    "<iframe srcdoc=\"<script>parent.document.title='owned'</script>\"></iframe>",
    "<details open ontoggle=document.title='owned'>",
    "<input autofocus onfocus=document.title='owned'>",
    "<a href=\"javascript:document.title='owned'\">click</a>",
    "<object data=\"javascript:document.title='owned'\"></object>",
    "<meta http-equiv=refresh content=\"0;url=javascript:document.title='owned'\">",
    "<base href=//example.invalid/>",
    "<link rel=stylesheet href=//example.invalid/a.css>",
    "<style>body{display:none}</style>",
    "\" onmouseover=\"document.title='owned'",
    "' autofocus onfocus='document.title=\"owned\"",
    "\"><script>document.title='owned'</script>",
    "`${document.title='owned'}`",
    "'};document.title='owned';//",
    "\\u003cscript\\u003edocument.title='owned'\\u003c/script\\u003e",
    "&lt;script&gt;document.title='owned'&lt;/script&gt;",
    "&#60;script&#62;document.title='owned'&#60;/script&#62;",
    "{{7*7}}",
    "{% for x in range(9) %}z{% endfor %}",
    "{{ run.__class__.__mro__ }}",
    "{# comment #}",
    "${7*7} #{7*7} <%= 7*7 %>",
    "$$\\href{javascript:document.title='owned'}{x}$$",
    "line\u2028separator\u2029document.title='owned'",
    "\u202eright to left\u2066 isolate",
    "\x1b[31mred\x1b[2J\x1b]0;owned\x07",
    "\x9b31m C1 control sequence",
    "[bold red]rich markup[/] [link=https://example.invalid]x[/link]",
    "[/not-open]",
    "nul\x00 backspace\x08 bell\x07 delete\x7f",
    "lone surrogate \ud800 here",
    "<math><mtext></p><style><img src=x onerror=document.title='owned'></style>",
    "@{rewards/chosen}{safe} %{x} &amp;",
    "e\u0301" * 20 + "\u0e49" * 40,
    "W" * 3000,
]
