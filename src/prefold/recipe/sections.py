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
from prefold.recipe.sampling import MaxLengthRatio, MaxNewTokens, MinMargin, MinP, Sampling, TopK, TopP
from prefold.recipe.section import Section
from prefold.recipe.values import Values
from prefold.recipe.where import Where


class Model(Section):
    name: str = Field(min_length=1)
    """Hub id, folder, GGUF file, or `pypi:PACKAGE==VERSION`."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the device computes in it natively, float16 on older GPUs, else float32."""
    attn_implementation: Literal["auto", "trees", "sdpa", "eager"] = "auto"
    """`auto`: trees (each prompt encoded once) if the self-check passes, else plain sdpa; `trees`: fail instead of
    falling back; `sdpa`, `eager`: the plain path with that attention."""
    device_map: str | dict[str, str | int] | None = None
    """As in transformers; unset: the whole model on the training device."""
    adapter: str | None = Field(None, min_length=1)
    """Folder of a LoRA adapter of this model, e.g. another run's `adapter/`: training continues from it, and the
    reference is a frozen copy of it. It brings its own LoRA settings, so leave out the section `lora`."""
    reference: Literal["base"] | None = None
    """With `adapter`: `base` makes the model without the adapter the reference, instead of the frozen copy."""
    chat_template: str | None = None
    """The chat format that a base model learns: `chatml`, or a file FILE.jinja with a template whose tokens the
    tokenizer has. The embedding rows of these tokens are trained. Unset: the tokenizer's own template."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template, wherever prefold applies it: `{enable_thinking: false}`,
    `{date_string: 30 Jun 2025}`. A row's own take precedence. `strftime_now: 2025-06-30` fixes the date that a template
    writes as today's."""
    load_in_4bit: bool = False
    """Train an adapter over weights held in 4 bits (QLoRA). It is merged into the unquantised weights, and the result
    is what is evaluated."""
    load_in_8bit: bool = False
    """The same in 8 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    """Number format of 4-bit weights; unset: `nf4`. Beware that transformers' own default is `fp4`."""
    bnb_4bit_use_double_quant: bool | None = None
    """Quantise the scales of 4-bit weights as well, which saves 0.4 bits per weight; unset: `false`."""
    bnb_4bit_compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """The dtype that 4-bit weights are dequantised to for each product; unset: `auto`, the same as `dtype`."""

    @model_validator(mode="before")
    @classmethod
    def four_bits_are_spelt_out(cls, values: Any) -> Any:
        """With 4-bit weights, fill in the settings left unset, so that the resolved recipe names them."""
        if not isinstance(values, dict) or not values.get("load_in_4bit"):
            return values
        given = {name: value for name, value in values.items() if value is not None or name not in FOUR_BITS}
        return {**FOUR_BITS, **given}

    @field_validator("chat_template_kwargs")
    @classmethod
    def the_date_is_one(cls, keywords: dict[str, Any]) -> dict[str, Any]:
        """Normalise `strftime_now` to text, since YAML reads a bare date as a date."""
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
        ignored = [name for name in FOUR_BITS if getattr(self, name) is not None]
        if ignored and not self.load_in_4bit:
            raise ValueError(f"`{ignored[0]}` would be ignored without `load_in_4bit: true`")
        if self.chat_template not in (None, "chatml") and not str(self.chat_template).endswith(".jinja"):
            raise ValueError(f"`chat_template` is `{self.chat_template}`; write `chatml`, or name a file FILE.jinja")
        return self

    def whole(self, folder: Path) -> Model:
        """The settings for a folder of full weights that this model was trained to: without adapter, quantisation and
        chat template."""
        kept = ("dtype", "attn_implementation", "device_map", "chat_template_kwargs")
        return Model(name=str(folder), **{name: getattr(self, name) for name in kept})


FOUR_BITS = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "auto"}
"""Defaults of the settings of 4-bit weights."""


class Lora(Section):
    """Fields are those of peft's `LoraConfig`."""

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
    """Train the magnitude of each output's weights apart from their direction (DoRA): slower, often better at low
    ranks."""
    modules_to_save: list[str] = []
    """Modules that are trained and saved whole beside LoRA, by name, e.g. `[lm_head]`."""


class Rows(Section):
    """Where rows are read from, and which rows."""

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
    """Names of columns where they differ from those of a known layout, or paths into a column:
    `{prompt: input.question}`."""
    values: Values | None = None
    """What the values of the vote or label column mean: `{first: "< 0", second: "> 0", tie: 0}`."""
    weight: float | None = Field(None, gt=0)
    """Share of the rows, relative to the other sources that have a weight. The mixture is the largest one that keeps
    these proportions without repeating a row; the rows are drawn by `train.seed`."""
    count: int | float | None = Field(None, gt=0)
    """Number of rows, or a share of them below 1, drawn by `train.seed`."""
    pairs_from: Literal["best_worst", "adjacent", "all"] | None = None
    """Which pairs are made of a row that ranks several answers: the best against the worst (`best_worst`; of equals,
    the first), each against the next in order (`adjacent`), or every two (`all`). Equal ratings make no pair. Unset:
    `best_worst`; where a row has lists of chosen and of rejected answers, each chosen one against each rejected one."""
    min_margin: float | None = Field(None, gt=0)
    """Pairs of a ranking whose ratings differ by less are left out; neighbouring ranks differ by 1."""

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
    """Share of the training rows to hold out, equal prompts on one side; 0.1 if neither this nor `eval` is given."""
    shuffle: bool = False
    """Shuffle the examples of all sources together by `train.seed`. Training shuffles each epoch anyway."""
    duplicates: Literal["keep", "drop_exact", "drop_near"] = "keep"
    """What happens to a repeated pair: `drop_exact` leaves out those that are the same word for word, `drop_near` also
    those whose prompt, chosen and rejected each share 0.8 of their runs of 5 words with an earlier pair's (Jaccard
    similarity)."""
    decisions: str | None = Field(None, min_length=1)
    """File of decisions about single rows, which `prefold ui` writes: rows to leave out, and pairs whose answers change
    sides. Each row is checked to be the one that was decided about."""
    decontaminate: list[Benchmark] = []
    """Texts of benchmarks: training pairs that contain 13 words in a row of one, or all of a shorter one, are left
    out."""
    system: str | None = None
    """System message before each prompt; a row with another one is left out."""
    template: Literal["chat", "none"] = "chat"
    """How messages become text: by the model's chat template, or `none`: a prompt and its answer as they are, between
    the tokenizer's BOS and EOS tokens."""
    max_length: int = Field(1024, gt=1)
    """Tokens of prompt and completion together; of the prompt alone where completions are sampled."""
    max_prompt_length: int | None = Field(None, gt=0)
    """Tokens that `overlong: truncate_prompt` keeps of a prompt; unset: what fits beside the longer completion."""
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


# Listed here, since importing them from transformers takes seconds.
SCHEDULERS = _names("""
    constant constant_with_warmup cosine cosine_warmup_with_min_lr cosine_with_min_lr cosine_with_restarts inverse_sqrt
    linear polynomial warmup_stable_decay
""")
"""transformers' schedules, except the two that follow a held-out metric at every step."""
OPTIMIZERS = _names("""
    adafactor adagrad adamw_8bit adamw_anyprecision adamw_bnb_8bit adamw_torch adamw_torch_4bit adamw_torch_8bit
    adamw_torch_fused adamw_torch_npu_fused adamw_torch_xla ademamix ademamix_8bit grokadamw lion_32bit lion_8bit
    paged_adamw_32bit paged_adamw_8bit paged_ademamix_32bit paged_ademamix_8bit paged_lion_32bit paged_lion_8bit rmsprop
    rmsprop_bnb rmsprop_bnb_32bit rmsprop_bnb_8bit sgd stable_adamw
""")
"""transformers' optimizers that work here."""
UNUSABLE = {
    "galore": "needs `optim_target_modules`, which recipes do not have",
    "apollo": "needs `optim_target_modules`, which recipes do not have",
    "lomo": "changes weights during the backward pass, and a step here has several",
    "adalomo": "changes weights during the backward pass, and a step here has several",
    "schedule_free": "trains on other weights than it evaluates, and nothing here switches between them",
}
"""Optimizers of transformers that cannot work here, by the beginning of their names."""


def in_steps(value: int | float, steps: int) -> int:
    """`value` as a number of steps: below 1 it is a share of all `steps`, rounded up as in transformers."""
    return math.ceil(value * steps) if value < 1 else int(value)


Tracker = Literal["wandb", "tensorboard", "mlflow", "trackio"]


class Train(Section):
    """Fields are those of transformers' `TrainingArguments`, except `batch_size` and `max_tokens`."""

    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate, reached after warm-up."""
    batch_size: int = Field(16, gt=0)
    """Pairs (or prompts) per optimizer step, over all devices."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the training data."""
    max_steps: int | None = Field(None, gt=0)
    """Optimizer steps; overrides `num_train_epochs`."""
    max_tokens: int | Literal["auto"] = "auto"
    """Token budget of a micro-batch: how much is computed at once. It changes speed and memory, never the numbers."""
    warmup_steps: int | float = Field(0, ge=0)
    """Optimizer steps in which the learning rate rises from 0; below 1, a share of all steps, rounded up."""
    lr_scheduler_type: str = "linear"
    """Learning rate schedule after warm-up, by transformers' name: `linear`, `cosine`, `constant`, ..."""
    lr_scheduler_kwargs: dict[str, Any] = {}
    """Arguments of that schedule, as in transformers."""
    optim: str = "adamw_torch"
    """The optimizer, by transformers' name: `adamw_torch`, `adamw_bnb_8bit`, `paged_adamw_32bit`, ..."""
    weight_decay: float = Field(0.0, ge=0)
    """The optimizer's weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the optimizer's first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of its second moment."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the square root of the second moment."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients of a larger norm are scaled down to it."""
    fsdp: bool | Literal["hybrid"] = False
    """Shard the model over all processes (FSDP2): each holds a part of every weight, and gathers the rest while it
    computes. For models too large for one device. With `hybrid`, over those of each machine, which then has a copy."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    seed: int = Field(42, ge=0)
    """Seed of the data order, the initialisation of LoRA and of a reward model's head, and dropout."""
    save_steps: int | float = Field(50, gt=0)
    """Optimizer steps between checkpoints; below 1, a share of all steps, rounded up."""
    save_total_limit: int = Field(2, gt=0)
    """Checkpoints kept."""
    eval_steps: int | float | None = Field(None, gt=0)
    """Optimizer steps between measurements on the held-out data; below 1, a share of all steps, rounded up. Unset:
    nothing is measured during training."""
    metric_for_best_model: str | None = None
    """A held-out metric, such as `loss` or `rewards/margins`, by which checkpoints are compared."""
    greater_is_better: bool | None = None
    """Unset: yes, unless the metric's name ends in `loss`."""
    load_best_model_at_end: bool = False
    """Continue with the best checkpoint instead of the last; `loss` decides unless `metric_for_best_model` is given."""
    early_stopping_patience: int | None = Field(None, gt=0)
    """Training ends after this many measurements in a row without a better metric."""
    report_to: list[Tracker] = []
    """Trackers that get every step's metrics."""
    project: str = "prefold"
    """The project (in MLflow, the experiment) of the run in the trackers."""
    run_name: str | None = None
    """Name of the run in the trackers; unset: the name of the run folder."""

    @field_validator("optim", "lr_scheduler_type")
    @classmethod
    def known_to_transformers(cls, value: str, info: ValidationInfo) -> str:
        why = next((why for name, why in UNUSABLE.items() if value.startswith(name)), "")
        if why and info.field_name == "optim":
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
        ignored = [name for name in ("greater_is_better", "early_stopping_patience") if name in given and not best]
        if ignored:
            raise ValueError(f"`{ignored[0]}` needs a `metric_for_best_model`")
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
    """What samples the completions that are trained on, and those that `evaluate` measures. May be changed when a run
    is continued."""

    engine: Literal["prefold", "vllm"] = "prefold"
    """`prefold`: the training process itself; `vllm`: servers, which get the new weights at every step."""
    urls: list[Annotated[str, AfterValidator(_server)]] = []
    """Addresses of the servers, e.g. `[http://gpu-1:8000/v1, http://gpu-2:8000/v1]`. A key is read from the environment
    variable VLLM_API_KEY."""
    adapter_folder: str | None = Field(None, min_length=1)
    """Folder through which the servers get the weights, reached by them under the same path; unset: `served/` in the
    run folder."""
    concurrency: int = Field(64, gt=0)
    """Concurrent requests to each server, each for all completions of a prompt."""
    timeout: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Seconds that the completions of a prompt may take."""

    @property
    def by_servers(self) -> bool:
        return self.engine == "vllm"

    @model_validator(mode="after")
    def servers_are_named(self) -> Generation:
        if self.by_servers and not self.urls:
            raise ValueError("`engine: vllm` needs the servers' addresses, e.g. `urls: [http://localhost:8000/v1]`")
        ignored = self.changed("urls", "adapter_folder", "concurrency", "timeout")
        if ignored and not self.by_servers:
            raise ValueError(f"`{ignored[0]}` would be ignored without `engine: vllm`")
        if len({url.rstrip("/") for url in self.urls}) < len(self.urls):
            raise ValueError("`urls` names a server twice")
        return self


Warns = Literal["off", "warn"]
Stops = Literal["off", "warn", "stop"]
Acts = Literal["off", "warn", "stop", "roll_back", "lower_rate"]


class Guards(Section):
    """What happens when training goes wrong: `off`: nothing; `warn`: it is reported, once; `stop`: the run ends and
    keeps its checkpoints; `roll_back`: it continues from the last checkpoint at half the learning rate; `lower_rate`:
    it continues at half the learning rate. May be changed when a run is continued."""

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
    """The policy moves far away from the reference."""
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
    """`auto`: the dtype of training."""


class Evaluate(Sampling):
    tasks: list[str] = []
    """Tasks to run before and after training, by name: suites (`open_llm_leaderboard`, `nous`), tasks and groups of
    lm-evaluation-harness, the built-in `everyday_facts`, and tasks of your own."""
    include_path: str | None = Field(None, min_length=1)
    """Folder of YAML files in the harness's format, with tasks of your own."""
    limit: int | None = Field(None, gt=0)
    """Use only the first so many questions of each task; unset: all."""
    num_fewshot: int | None = Field(None, ge=0)
    """Few-shot examples before each question, for tasks that no suite names and that have no fixed number; unset: each
    task's own number."""
    apply_chat_template: bool = False
    """Ask the questions as chat messages; off, as for most published scores."""
    prompts: int | list[str] = 8
    """How many held-out prompts are answered before and after, or the prompts themselves."""
    max_new_tokens: MaxNewTokens = 96
    num_answers: int = Field(1, gt=0)
    """Answers per prompt and model."""
    compare_with: list[str] = []
    """Other models, named as in `model.name`, and run folders, to run the tasks on as well. They are compared with the
    model before training."""
    win_rate: WinRate | None = None
    """Let a judge, or people's votes, decide whether the answer to each prompt is better before or after training."""

    @model_validator(mode="after")
    def tasks_are_asked(self) -> Evaluate:
        ignored = self.changed("include_path", "limit", "num_fewshot", "apply_chat_template")
        if ignored and not self.tasks:
            raise ValueError(f"`{ignored[0]}` is for `tasks`, and there are none")
        if self.compare_with and not self.tasks:
            raise ValueError("`compare_with` asks other models the `tasks`, and there are none")
        return self

    @model_validator(mode="after")
    def sampling_is_used(self) -> Evaluate:
        if isinstance(self.prompts, int) and self.prompts < 0:
            raise ValueError("`prompts` must be a count of 0 or more, or a list of prompts")
        if self.temperature == 0 and (ignored := self.changed("top_p", "top_k", "min_p", "num_answers")):
            what = ", ".join(f"`{name}`" for name in ignored)
            raise ValueError(f"{what} would change nothing at temperature 0; set `temperature`")
        if self.win_rate and not self.prompts:
            raise ValueError("`win_rate` judges the answers to `prompts`, and there are none")
        return self


class Rounds(Section):
    """Train on the model's own answers, round after round: it answers every prompt, the answers are scored, the best is
    trained against the worst, and the trained model answers again."""

    number: int = Field(gt=0)
    """Maximum number of rounds; the first that does not improve the model is the last."""
    num_completions: int = Field(4, gt=1)
    """Answers to each prompt."""
    max_new_tokens: MaxNewTokens = 256
    temperature: float = Field(0.8, gt=0, allow_inf_nan=False)
    """Sampling temperature; at 0 all answers to a prompt would be the same."""
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    min_margin: MinMargin = 0.0
    max_length_ratio: MaxLengthRatio = None
    reference: Literal["last", "base"] = "last"
    """The reference of each round: the model that it starts from, which the `last` round left, or the `base`, which the
    first round starts from."""
    judge: EndpointJudge | None = None
    """A chat model that scores the answers in place of `rewards`, comparing every two of them."""
    votes: str | None = Field(None, min_length=1)
    """Folder of people's votes, `1.jsonl` for the first round, and so on: they make the pairs, and the scores only
    compare the models. A round without its file of votes writes what to vote on, and stops."""


GgufKind = Literal["F16", "Q8_0", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"]
HUB_MODEL_ID = r"[A-Za-z0-9][\w.-]{0,94}/[A-Za-z0-9][\w.-]{0,94}"


class Publish(Section):
    """Where the result goes. The Hub's token is never written here: use `hf auth login` or HF_TOKEN."""

    hub_model_id: str | None = Field(None, pattern=f"^{HUB_MODEL_ID}$")
    """The repository to push to, NAME/MODEL; created if it does not exist."""
    to: str | None = Field(None, min_length=1)
    """A folder to write the files to, instead of the Hub or as well."""
    what: list[Literal["merged", "adapter", "gguf"]] = Field(["merged"], min_length=1)
    """`merged`: the whole model; `adapter`: the LoRA weights; `gguf`: files for llama.cpp."""
    gguf: list[GgufKind] | None = Field(None, min_length=1)
    """Which GGUF files, e.g. `[F16, Q4_K_M]`; the kinds with a K need llama.cpp's `llama-quantize`. Unset: `[Q8_0]`."""
    private: bool = True
    """Create the repository as a private one, and refuse to push to a public one."""
    tags: list[str] = []
    """Tags of the model card, in addition to its own."""
    branch: str | None = Field(None, min_length=1)
    """Branch to push to, created if it does not exist; unset: `main`."""
    create_pr: bool = False
    """Open a pull request instead of pushing to `main`."""
    commit_message: str | None = Field(None, min_length=1)
    """Unset: the method and the base model."""
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
        ignored = self.changed("branch", "create_pr", "commit_message", "checkpoints")
        if ignored and not self.hub_model_id:
            raise ValueError(f"`{ignored[0]}` would be ignored without `hub_model_id`")
        if self.branch and self.create_pr:
            raise ValueError("a pull request is opened against `main`; remove `branch` or `create_pr`")
        return self
