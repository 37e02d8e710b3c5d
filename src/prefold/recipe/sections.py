"""The sections of a recipe, in the order of the stages; rewards and judges have a file of their own."""

from __future__ import annotations

import math
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from prefold.errors import did_you_mean
from prefold.recipe.rewards import EndpointJudge, WinRate, without_password
from prefold.recipe.sampling import MaxNewTokens, MinP, Sampling
from prefold.recipe.section import Section
from prefold.recipe.values import Values
from prefold.recipe.where import Where


class Model(Section):
    name: str = Field(min_length=1)
    """Hub id, folder, GGUF file, or `pypi:PACKAGE==VERSION`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the device computes in it natively, float16 on older GPUs, float32 else."""
    attn_implementation: Literal["auto", "trees", "sdpa", "eager"] = "auto"
    """`auto`: trees (each prompt encoded once) if the self-check passes, else plain sdpa; `trees`: fail instead of
    falling back; `sdpa`, `eager`: the plain path with that attention."""
    device_map: str | dict[str, str | int] | None = None
    """As transformers takes it; unset: the whole model on the training device."""
    adapter: str | None = Field(None, min_length=1)
    """Folder of a LoRA adapter of this model, e.g. another run's `adapter/`: training goes on with it, and the
    reference is a frozen copy of it. It brings its own LoRA settings, so the section `lora` is left out."""
    reference: Literal["base"] | None = None
    """With `adapter`: `base` takes the model without the adapter for the reference, in place of the frozen copy."""
    chat_template: str | None = None
    """The chat format that a base model is to learn: `chatml`, or a file FILE.jinja with a template whose tokens the
    tokenizer has. The rows of its tokens in the embeddings are trained. Unset: the tokenizer's own template."""
    chat_template_kwargs: dict[str, Any] = {}
    """What the chat template is given beside messages, wherever prefold writes them: `{enable_thinking: false}`,
    `{date_string: 30 Jun 2025}`. A row's own go before these. `strftime_now: 2025-06-30` fixes the day that a template
    writes as today's."""
    load_in_4bit: bool = False
    """Train over weights that are held in 4 bits (QLoRA). The adapter is merged into the unquantised weights, and they
    are what is evaluated."""
    load_in_8bit: bool = False
    """The same in 8 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    """Number format of 4-bit weights; unset: `nf4`. Beware that transformers' own default is `fp4`."""
    bnb_4bit_use_double_quant: bool | None = None
    """Quantise the scales of 4-bit weights as well, which saves 0.4 bits per weight; unset: `false`."""
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """What 4-bit weights are unpacked to for each product; unset: `auto`, that of `dtype`."""

    @model_validator(mode="before")
    @classmethod
    def four_bits_are_spelt_out(cls, values: Any) -> Any:
        """With 4-bit weights the unset settings take their values here, so that the resolved recipe names them."""
        if not isinstance(values, dict) or not values.get("load_in_4bit"):
            return values
        given = {name: value for name, value in values.items() if value is not None or name not in FOUR_BITS}
        return {**FOUR_BITS, **given}

    @field_validator("chat_template_kwargs")
    @classmethod
    def the_date_is_one(cls, keywords: dict[str, Any]) -> dict[str, Any]:
        """As text, whether YAML took it for a date or not."""
        if "strftime_now" not in keywords:
            return keywords
        try:
            day = date.fromisoformat(str(keywords["strftime_now"]))
        except ValueError:
            raise ValueError(f"`strftime_now` is `{keywords['strftime_now']}`; write a date like 2025-06-30") from None
        return {**keywords, "strftime_now": day.isoformat()}

    @model_validator(mode="after")
    def settings_are_used(self) -> Model:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("give either `load_in_4bit` or `load_in_8bit`, not both")
        if self.reference and not self.adapter:
            raise ValueError("`reference` would be ignored without `adapter`: the base is the reference then")
        idle = [name for name in FOUR_BITS if getattr(self, name) is not None]
        if idle and not self.load_in_4bit:
            raise ValueError(f"`{idle[0]}` would be ignored without `load_in_4bit: true`")
        if self.chat_template not in (None, "chatml") and not str(self.chat_template).endswith(".jinja"):
            raise ValueError(f"`chat_template` is `{self.chat_template}`; write `chatml`, or name a file FILE.jinja")
        return self

    def whole(self, folder: Path) -> Model:
        """These settings for what has become of the model: whole weights in a folder, with their chat format."""
        kept = ("dtype", "attn_implementation", "device_map", "chat_template_kwargs")
        return Model(name=str(folder), **{name: getattr(self, name) for name in kept})


FOUR_BITS = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "auto"}
"""What the settings of 4-bit weights are where they are left out."""


class Lora(Section):
    """Field names and meanings are those of peft's `LoraConfig`."""

    r: int = Field(16, gt=0)
    """Rank of the update."""
    lora_alpha: float = Field(32, gt=0)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the inputs of the update that are dropped in training."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear`, a regular expression, or a list of module names."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead of lora_alpha / r, so that high ranks learn as fast as low ones."""
    use_dora: bool = False
    """Train the length of every output's weights beside their direction (DoRA): slower, often better at low ranks."""
    modules_to_save: list[str] = []
    """Modules that are trained and saved whole beside LoRA, by name, e.g. `[lm_head]`."""


class Rows(Section):
    """Where rows are read from, and which of them."""

    path: str = Field(min_length=1)
    """A file (.jsonl, .json, .csv, .parquet; the first three also .gz, .bz2, .xz or .zst), a folder or a glob of files,
    a built-in set (`builtin:short_answers`), or a data set of the Hub (`org/name`)."""
    name: str | None = None
    """Configuration of a Hub data set, where it has several."""
    split: str | None = None
    """Split of a built-in set or Hub data set, `all` for all of a Hub data set; unset: `train`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set."""
    streaming: bool = False
    """Read a Hub data set over the network without storing it; `count` then takes its first rows."""
    where: str | None = None
    """Condition on a row's own columns, e.g. `rating >= 5 and in_gsm8k_train == false`; other rows are left out."""

    @field_validator("where")
    @classmethod
    def condition_can_be_read(cls, value: str | None) -> str | None:
        if value is not None:
            Where(value)
        return value


class Source(Rows):
    columns: dict[str, str] | None = None
    """Columns that have other names than those of a known shape, or a path into one: `{prompt: input.question}`."""
    values: Values | None = None
    """What the values of the vote or label column mean: `{first: "< 0", second: "> 0", tie: 0}`."""
    weight: float | None = Field(None, gt=0)
    """Share of the rows, relative to the other sources that have a weight. The mixture is the largest one that keeps
    these proportions without repeating a row; the rows are drawn by `train.seed`."""
    count: int | float | None = Field(None, gt=0)
    """Number of rows, or below 1 their share, drawn by `train.seed`."""
    pairs_from: Literal["best_worst", "adjacent", "all"] | None = None
    """Which pairs are made of rows that rank several answers: the best against the worst (`best_worst`; of equal
    ones, the first), each against the next one in the order (`adjacent`), or every two (`all`). Equal ratings make no
    pair. Unset: `best_worst`; where a row has lists of chosen and of rejected answers, each against each."""
    min_margin: float | None = Field(None, gt=0)
    """Pairs of a ranking whose ratings differ by less are left out; ranks count 1 from each to the next."""

    @model_validator(mode="after")
    def one_way_to_choose_rows(self) -> Source:
        if self.weight and self.count:
            raise ValueError("give either `weight` or `count`, not both")
        share = self.count if isinstance(self.count, float) else None
        if share and share >= 1:
            raise ValueError("`count` is a whole number of rows, or a share of the rows below 1")
        if self.streaming and (self.weight or share):
            what = "a share in `count`" if share else "`weight`"
            raise ValueError(
                f"{what} needs the number of rows, which is unknown with `streaming`; give a whole `count`"
            )
        return self


class Benchmark(Rows):
    column: str = Field(min_length=1)
    """The column that holds the text, e.g. `question`."""


class Data(Section):
    train: list[Source] = Field(min_length=1)
    """Where the training pairs come from."""
    eval: list[Source] = []
    """Where the held-out pairs come from; or set `eval_fraction`."""
    eval_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the training rows to hold out, equal prompts on one side. 0.1 where neither this nor `eval` is given."""
    shuffle: bool = False
    """Shuffle the examples of all sources together by `train.seed`. Each epoch of training draws an order anyway."""
    duplicates: Literal["keep", "drop_exact", "drop_near"] = "keep"
    """What happens to a repeated pair: `drop_exact` leaves out those that are the same word for word,
    `drop_near` also those whose prompt, chosen and rejected each share 0.8 of their runs of 5 words with an earlier
    pair's."""
    decisions: str | None = Field(None, min_length=1)
    """File of decisions about single rows, which `prefold ui` writes: rows that are left out, and pairs whose answers
    change sides. The rows are checked to be those that were meant."""
    decontaminate: list[Benchmark] = []
    """Texts to be evaluated on: training pairs that hold 13 words of one in a row, or a shorter one whole, are left
    out."""
    system: str | None = None
    """System message put before each prompt; a row that brings another one is left out."""
    template: Literal["chat", "none"] = "chat"
    """How messages become text: by the model's chat template, or `none`: a prompt and its answer as they are, with the
    tokenizer's BOS token before and its EOS token behind them."""
    max_length: int = Field(1024, gt=1)
    """Tokens of prompt and completion together; of the prompt alone where completions are sampled."""
    max_prompt_length: int | None = Field(None, gt=0)
    """Tokens that `overlong: truncate_prompt` leaves of a prompt; unset: what fits beside the longer completion."""
    overlong: Literal["drop", "truncate_prompt", "error"] = "drop"
    """What happens to a pair that is longer than `max_length`."""
    bad_rows: Literal["drop", "error"] = "drop"
    """What happens to a row that is broken, empty, not text, or for which `where` cannot be evaluated."""

    @model_validator(mode="after")
    def one_way_to_hold_out(self) -> Data:
        if self.eval and self.eval_fraction:
            raise ValueError("give either `eval` or `eval_fraction`, not both")
        if self.max_prompt_length and self.overlong != "truncate_prompt":
            raise ValueError("`max_prompt_length` is used by `overlong: truncate_prompt` only")
        return self


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Written down, since reading them from transformers takes seconds.
SCHEDULERS = _names("""
    constant constant_with_warmup cosine cosine_warmup_with_min_lr cosine_with_min_lr cosine_with_restarts inverse_sqrt
    linear polynomial warmup_stable_decay
""")
"""transformers' schedules, without the two that follow a metric which training on steps does not have."""
OPTIMIZERS = _names("""
    adafactor adagrad adamw_8bit adamw_anyprecision adamw_bnb_8bit adamw_torch adamw_torch_4bit adamw_torch_8bit
    adamw_torch_fused adamw_torch_npu_fused adamw_torch_xla ademamix ademamix_8bit grokadamw lion_32bit lion_8bit
    paged_adamw_32bit paged_adamw_8bit paged_ademamix_32bit paged_ademamix_8bit paged_lion_32bit paged_lion_8bit rmsprop
    rmsprop_bnb rmsprop_bnb_32bit rmsprop_bnb_8bit sgd stable_adamw
""")
"""transformers' optimizers that work here."""
UNUSABLE = {
    "galore": "works on modules that `optim_target_modules` names, which a recipe cannot",
    "apollo": "works on modules that `optim_target_modules` names, which a recipe cannot",
    "lomo": "changes weights amid the backward pass, and a step here has several",
    "adalomo": "changes weights amid the backward pass, and a step here has several",
    "schedule_free": "keeps other weights for training than for use, and nothing here changes from one to the other",
}
"""Optimizers of transformers that cannot work here, by the beginning of their names."""


def _unusable(optimizer: str) -> str:
    return next((why for name, why in UNUSABLE.items() if optimizer.startswith(name)), "")


def in_steps(value: int | float, steps: int) -> int:
    """A number of steps, or what a share below 1 of all these steps comes to, as transformers rounds it."""
    return math.ceil(value * steps) if value < 1 else int(value)


Tracker = Literal["wandb", "tensorboard", "mlflow", "trackio"]


class Train(Section):
    """Field names and meanings are those of transformers' `TrainingArguments`, but for `batch_size` and
    `max_tokens`."""

    learning_rate: float = Field(5e-5, gt=0)
    """The highest rate, after warm-up."""
    batch_size: int = Field(16, gt=0)
    """Pairs (or prompts) per optimizer step, over all devices."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the training data."""
    max_steps: int | None = Field(None, gt=0)
    """Optimizer steps; overrides `num_train_epochs`."""
    max_tokens: int | Literal["auto"] = "auto"
    """Token budget of a micro-batch: how much is computed at once. It changes speed and memory, never the numbers."""
    warmup_steps: int | float = Field(0, ge=0)
    """Optimizer steps in which the rate rises from 0, or below 1 their share of all steps, rounded up."""
    lr_scheduler_type: str = "linear"
    """How the rate goes on after warm-up, by transformers' names: `linear`, `cosine`, `constant`, ..."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Settings of that schedule, as transformers takes them."""
    optim: str = "adamw_torch"
    """The optimizer, by transformers' names: `adamw_torch`, `adamw_bnb_8bit`, `paged_adamw_32bit`, ..."""
    weight_decay: float = Field(0.0, ge=0)
    """Of the optimizer."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the optimizer's first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of its second moment."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients of a larger norm are scaled down to it."""
    fsdp: bool = False
    """Shard the model over all processes (FSDP2): each holds a part of every weight, and fetches the others' while it
    computes. For models of which a device cannot hold a copy."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = Field(42, ge=0)
    """Of the data order, the initialisation of LoRA and of a reward model's head, and dropout."""
    save_steps: int | float = Field(50, gt=0)
    """Optimizer steps between checkpoints, or below 1 their share of all steps, rounded up."""
    save_total_limit: int = Field(2, gt=0)
    """Checkpoints kept."""
    eval_steps: int | float | None = Field(None, gt=0)
    """Optimizer steps between measurements of the held-out data while training, or below 1 their share of all steps;
    unset: none are made."""
    metric_for_best_model: str | None = None
    """A held-out metric, such as `loss` or `rewards/margins`, by which checkpoints are compared."""
    greater_is_better: bool | None = None
    """Unset: yes, unless the metric's name ends in `loss`."""
    load_best_model_at_end: bool = False
    """Go on with the best checkpoint instead of the last; `loss` decides unless `metric_for_best_model` is given."""
    early_stopping_patience: int | None = Field(None, gt=0)
    """Measurements in a row without a better metric after which training ends."""
    report_to: list[Tracker] = []
    """Trackers that get every step's metrics."""
    project: str = "prefold"
    """What the trackers call the group of runs: project, or experiment."""
    run_name: str | None = None
    """Name of the run in the trackers; unset: the name of the run folder."""

    @field_validator("optim", "lr_scheduler_type")
    @classmethod
    def known_to_transformers(cls, value: str, info: ValidationInfo) -> str:
        if info.field_name == "optim" and (why := _unusable(value)):
            raise ValueError(f"`{value}` {why}; take another, such as `adamw_torch` or `adamw_bnb_8bit`")
        known = SCHEDULERS if info.field_name == "lr_scheduler_type" else OPTIMIZERS
        if value not in known:
            raise ValueError(f"`{value}` is unknown; {did_you_mean(value, known) or ', '.join(sorted(known))}")
        return value

    @model_validator(mode="after")
    def metrics_are_measured(self) -> Train:
        wanted = ("metric_for_best_model", "greater_is_better", "load_best_model_at_end", "early_stopping_patience")
        given = self.changed(*wanted)
        if given and self.eval_steps is None:
            raise ValueError(f"`{given[0]}` needs held-out metrics while training; set `eval_steps`")
        best = self.metric_for_best_model or self.load_best_model_at_end
        idle = [name for name in ("greater_is_better", "early_stopping_patience") if name in given and not best]
        if idle:
            raise ValueError(f"`{idle[0]}` needs a `metric_for_best_model`")
        return self

    @model_validator(mode="after")
    def steps_are_whole_or_shares(self) -> Train:
        for name in ("warmup_steps", "save_steps", "eval_steps"):
            if isinstance(value := getattr(self, name), float) and value >= 1:
                raise ValueError(f"`{name}` is a whole number of steps, or a share of all steps below 1")
        return self


def _server(url: str) -> str:
    parts = urlsplit(without_password(url))
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"`{url}` is not the address of a server; write http://HOST:PORT/v1")
    return url


class Generation(Section):
    """What writes the completions that are trained on, and those that `evaluate` measures. May be changed while a run
    is under way."""

    engine: Literal["prefold", "vllm"] = "prefold"
    """`prefold`: the model itself, where it is trained; `vllm`: servers that are given its weights at every step."""
    urls: list[Annotated[str, AfterValidator(_server)]] = []
    """Addresses of the servers, e.g. `[http://gpu-1:8000/v1, http://gpu-2:8000/v1]`. A key is read from the environment
    variable VLLM_API_KEY."""
    adapter_folder: str | None = Field(None, min_length=1)
    """Where the weights of a step are put for the servers: a folder that they reach by the same path; unset: `served/`
    in the run folder."""
    concurrency: int = Field(64, gt=0)
    """Requests to each server at a time, with all completions of a prompt in each."""
    timeout: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Seconds that the completions of a prompt may take."""

    @property
    def by_servers(self) -> bool:
        return self.engine == "vllm"

    @model_validator(mode="after")
    def servers_are_named(self) -> Generation:
        if self.by_servers and not self.urls:
            raise ValueError("`engine: vllm` needs the servers' addresses, e.g. `urls: [http://localhost:8000/v1]`")
        idle = self.changed("urls", "adapter_folder", "concurrency", "timeout")
        if idle and not self.by_servers:
            raise ValueError(f"`{idle[0]}` would be ignored without `engine: vllm`")
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError("`urls` names a server twice")
        return self


Warns = Literal["off", "warn"]
Stops = Literal["off", "warn", "stop"]
Acts = Literal["off", "warn", "stop", "roll_back", "lower_rate"]


class Guards(Section):
    """What follows when training goes wrong: `off`: not looked for; `warn`: said once, and reported; `stop`: the run
    ends and keeps its checkpoints; `roll_back`: back to the last checkpoint, and on at half the rate; `lower_rate`: on
    at half the rate. May be changed while a run is under way."""

    not_finite: Literal["stop", "roll_back"] = "stop"
    """Loss or gradient is NaN or infinite; the rows of the step are shown."""
    no_gradient: Stops = "warn"
    """The gradient is 0 step after step."""
    stuck_at_start: Stops = "warn"
    """The loss stays at ln 2, where DPO starts, although the rate has risen."""
    chosen_falling: Acts = "warn"
    """Log-probs of the chosen answers collapse while the margin grows."""
    too_easy: Stops = "warn"
    """The model prefers the chosen answer in every pair after a few steps."""
    held_out_falling: Acts = "warn"
    """The margin on held-out pairs falls (with `train.eval_steps`)."""
    kl_running_off: Acts = "warn"
    """The model moves far away from the reference."""
    equal_rewards: Stops = "warn"
    """All completions of each prompt get the same reward."""
    cut_off: Stops = "warn"
    """Nearly all completions reach the longest length."""
    undertrained: Warns = "warn"
    """At the end the model hardly prefers the chosen answers."""

    @field_validator("*", mode="before")
    @classmethod
    def off_is_a_word(cls, value: Any) -> Any:
        """YAML reads a bare `off` as false."""
        return "off" if value is False else value


class Merge(Section):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: the dtype that was trained in."""


class Evaluate(Sampling):
    tasks: list[str] = []
    """What to ask before and after: suites (`open_llm_leaderboard`, `nous`), tasks and groups of
    lm-evaluation-harness, the built-in `everyday_facts`, and tasks of your own, all by name."""
    include_path: str | None = Field(None, min_length=1)
    """Folder of YAML files in the harness's format, with tasks of your own."""
    limit: int | None = Field(None, gt=0)
    """Questions of each task, the first ones; unset: all."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples before each question, for tasks that are not named by a suite and have no fixed number; unset: each
    task's own."""
    apply_chat_template: bool = False
    """Ask the tasks as chat messages; off, as most published scores are."""
    prompts: int | list[str] = 8
    """How many held-out prompts are answered before and after, or the prompts themselves."""
    max_new_tokens: MaxNewTokens = 96
    num_answers: int = Field(1, gt=0)
    """Answers per prompt and model."""
    compare_with: list[str] = []
    """Other models, by any name that `model.name` can have, and run folders, that are asked the tasks as well. They are
    compared with the model before training."""
    win_rate: WinRate | None = None
    """Have a judge, or people's votes, say which answer to each prompt is better, the one before or the one after."""

    @model_validator(mode="after")
    def tasks_are_asked(self) -> Evaluate:
        idle = self.changed("include_path", "limit", "num_fewshot", "apply_chat_template")
        if idle and not self.tasks:
            raise ValueError(f"`{idle[0]}` is for `tasks`, and there are none")
        if self.compare_with and not self.tasks:
            raise ValueError("`compare_with` asks other models the `tasks`, and there are none")
        return self

    @model_validator(mode="after")
    def sampling_is_used(self) -> Evaluate:
        if isinstance(self.prompts, int) and self.prompts < 0:
            raise ValueError("`prompts` must be a count of 0 or more, or a list of prompts")
        if self.temperature == 0 and (idle := self.changed("top_p", "top_k", "min_p", "num_answers")):
            what = ", ".join(f"`{name}`" for name in idle)
            raise ValueError(f"{what} would change nothing at temperature 0; set `temperature`")
        if self.win_rate and not self.prompts:
            raise ValueError("`win_rate` judges the answers to `prompts`, and there are none")
        return self


class Rounds(Section):
    """Train on the model's own answers, round after round: it answers every prompt, the answers are scored, the best is
    trained against the worst, and the model that comes out answers again."""

    number: int = Field(gt=0)
    """How many rounds at most. A round that did not make the model better is the last."""
    num_completions: int = Field(4, gt=1)
    """Answers to each prompt."""
    max_new_tokens: MaxNewTokens = 256
    temperature: float = Field(0.8, gt=0, allow_inf_nan=False)
    """At 0 all answers to a prompt would be the same."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that make up this share."""
    top_k: int = Field(0, ge=0)
    """Sample from so many likeliest tokens; 0 is off."""
    min_p: MinP = 0.0
    min_margin: float = Field(0.0, ge=0)
    """Least difference of a pair's scores."""
    max_length_ratio: float | None = Field(None, ge=1)
    """A pair's longer answer is at most so many times the shorter."""
    reference: Literal["last", "base"] = "last"
    """What the policy of a round is compared with: the model that the `last` round left, which it starts from, or the
    `base`, which the first round starts from."""
    judge: EndpointJudge | None = None
    """Who scores the answers in place of `rewards`: a chat model, which is shown every two of them."""
    votes: str | None = Field(None, min_length=1)
    """Folder of people's votes, `1.jsonl` of the first round, and so on: they make the pairs, and the scores compare
    the models. A round writes what is to be voted on, and ends there as long as its votes are not there."""


GgufKind = Literal["F16", "Q8_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"]
HUB_MODEL_ID = r"[A-Za-z0-9][\w.-]{0,94}/[A-Za-z0-9][\w.-]{0,94}"


class Publish(Section):
    """Where the result goes. The token of the Hub is never written here: `hf auth login` or HF_TOKEN."""

    hub_model_id: str | None = Field(None, pattern=f"^{HUB_MODEL_ID}$")
    """The repository to push to, NAME/MODEL; created if it does not exist."""
    to: str | None = Field(None, min_length=1)
    """A folder to put the files into, instead or as well."""
    what: list[Literal["merged", "adapter", "gguf"]] = Field(["merged"], min_length=1)
    """`merged`: the whole model; `adapter`: the LoRA weights; `gguf`: files for llama.cpp."""
    gguf: list[GgufKind] | None = Field(None, min_length=1)
    """Which GGUF files, e.g. `[F16, Q4_K_M]`; the kinds with a K need llama.cpp's `llama-quantize`. Unset: `[Q8_0]`."""
    private: bool = True
    """Whether a repository that is created is private. A public one is not pushed to while this is set."""
    tags: list[str] = []
    """Tags of the model card, beside its own."""
    branch: str | None = Field(None, min_length=1)
    """Branch to push to, created if it does not exist; unset: `main`."""
    create_pr: bool = False
    """Open a pull request instead of pushing to `main`."""
    commit_message: str | None = Field(None, min_length=1)
    """Unset: which method and which base."""
    checkpoints: bool = False
    """Push the weights of every checkpoint too, to the repository's branch `checkpoints`; training waits meanwhile. A
    push that fails is reported, and the run continues."""

    @model_validator(mode="before")
    @classmethod
    def kinds_are_spelt_out(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("gguf") is not None or "gguf" not in (values.get("what") or ()):
            return values
        return {**values, "gguf": ["Q8_0"]}

    @model_validator(mode="after")
    def settings_are_used(self) -> Publish:
        if not (self.hub_model_id or self.to):
            raise ValueError("give `hub_model_id`, the Hub repository to push to, or `to`, a folder")
        if self.gguf and "gguf" not in self.what:
            raise ValueError("`gguf` would be ignored: `what` does not have `gguf`")
        idle = self.changed("branch", "create_pr", "commit_message", "checkpoints")
        if idle and not self.hub_model_id:
            raise ValueError(f"`{idle[0]}` would be ignored without `hub_model_id`")
        if self.branch and self.create_pr:
            raise ValueError("a pull request is opened against `main`; remove `branch` or `create_pr`")
        return self
