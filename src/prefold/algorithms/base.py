"""What every algorithm is: settings, what it needs, and a loss that returns sums.

A loss is never divided in an algorithm. It returns sums over what it was given, named by what they are to be divided by
(`pairs`, ...); the training step divides by the count over the whole optimizer step. That is why splitting a step into
micro-batches, or over ranks, changes nothing. A loss that ties the completions of a step together says so
(`couples_step`) and is given all of them at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from torch import Tensor as Tensor

    from prefold.trees.logprobs import TreeLogprobs as TreeLogprobs
    from prefold.trees.packing import TokenTree as TokenTree
else:  # losses are read with a recipe, long before torch and the engine
    Tensor = TreeLogprobs = TokenTree = Any

State = Mapping[str, float]
"""What an algorithm carries from step to step: numbers by name, kept in the checkpoint."""
NO_STATE: State = {}

# A learning rate of 5e-5 and rank 16 on all linear layers are what the QLoRA DPO recipes in the field settled on;
# full fine-tuning wants about a hundredth of that rate.
ADAPTER_DEFAULTS: dict[str, Any] = {
    "train.learning_rate": 5e-5,
    "train.gradient_checkpointing": False,
    "data.max_length": 1024,
}


class Mean(NamedTuple):
    """A metric on its way to being a mean: the sum of its values and how many they were."""

    total: Tensor
    number: int


class Extreme(NamedTuple):
    """A metric on its way to being the least or the greatest of its values: `pick` is `min` or `max`."""

    value: Tensor
    pick: Callable[[Iterable[float]], float]


Metric = Mean | Extreme


@dataclass(frozen=True)
class LossOutput:
    """`loss`: scalar sums by the unit that each is divided by; `metrics`: by TRL's names; `state`: what the next
    step's `loss` is to be given; `kept`: values of the tokens that further steps on the same trees are to find among
    their extras, by name (of a loss that does not couple the step)."""

    loss: dict[str, Tensor]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    state: State = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """What methods train on and leave behind, as the recipe, the stages, the plan and the importer need to know it.

    `data`: records of a chosen and a rejected completion; of completions with a label each; or prompts alone.
    `samples`: whether the model writes the completions while it trains, and rewards score them. `scores`: whether the
    model has a head that gives a conversation one score in place of the vocabulary's: it writes nothing, and
    `TreeLogprobs.tokens` are the scores, one to each completion. `measured`: the file of `evaluation/` that compares
    before with after on held-out data.
    """

    data: Literal["pairs", "unpaired", "prompts"]
    samples: bool = False
    scores: bool = False
    measured: Literal["heldout", "rewards"] = "heldout"


PAIRED = Kind("pairs")
UNPAIRED = Kind("unpaired")
SAMPLED = Kind("prompts", samples=True, measured="rewards")
SCORING = Kind("pairs", scores=True)


class Draws(NamedTuple):
    """How a method draws completions of a prompt: their number, their longest length in tokens, and from what; and how
    many times at most they are drawn again where the group would have no advantages."""

    num_generations: int
    max_completion_length: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    resample: int


class Bound(NamedTuple):
    """What the values of a setting are held to, in the `Annotated` of its type; a value of None is free."""

    holds: Callable[[float], bool]
    text: str


def logsigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), any shape."""
    from torch.nn import functional

    return functional.logsigmoid(x)


POSITIVE = Bound(lambda value: value > 0, "greater than 0")
Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, Bound(lambda value: value >= 0, "0 or more")]
Smoothing = Annotated[float, Bound(lambda share: 0 <= share < 0.5, "at least 0 and less than 0.5")]


@dataclass(frozen=True)
class Algorithm(ABC):
    """Settings of a method as fields, their bounds in their types; what it needs as class attributes, or as properties
    where a setting decides."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True, "use_attribute_docstrings": True}

    paper: ClassVar[str]
    """arXiv number."""
    oracle: ClassVar[str]
    """What of TRL 1.16 the tests hold the loss against, or what else where TRL has no such loss."""
    kind: ClassVar[Kind] = PAIRED
    defaults: ClassVar[dict[str, Any]] = ADAPTER_DEFAULTS
    """Vetted recipe values of this method by dotted field, used where the recipe is silent."""
    record_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of a record, a value for each of its completions, that the loss finds in `TreeLogprobs.extras`."""
    needs_reference: ClassVar[bool] = False
    """Whether the loss compares with the log-probs of the model before training."""
    scores_prompt: ClassVar[bool] = False
    """Whether the loss needs `TreeLogprobs.prompts`."""
    needs_statistics: ClassVar[bool] = False
    """Whether the loss needs `TreeLogprobs.statistics` of the policy."""
    couples_step: ClassVar[bool] = False
    """Whether the loss of one completion depends on the others of its step, so that all must come at once."""
    iterations: ClassVar[int] = 1
    """Optimizer steps in a row on the same trees."""
    draws: ClassVar[Draws | None] = None
    """How completions are sampled, by a method of a kind that `samples`."""
    needs_advantages: ClassVar[bool] = False
    """Whether completions whose advantages are 0 add nothing to the loss and its gradient."""
    for_servers: ClassVar[tuple[str, ...]] = ()
    """Settings that only completions of servers have a use for."""
    remark: ClassVar[tuple[str, str] | None] = None
    """Where the settings are not the objective that their name is known for: that, and what to do."""

    def __post_init__(self) -> None:
        """Raises ValueError, naming the setting, for a value that the type of the setting does not allow."""
        hints = get_type_hints(type(self), include_extras=True)
        for setting in fields(self):
            value, hint = getattr(self, setting.name), hints[setting.name]
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ValueError(f"{setting.name} must be one of {', '.join(get_args(hint))}, got {value}")
            for bound in getattr(hint, "__metadata__", ()):
                if value is not None and not bound.holds(value):
                    raise ValueError(f"{setting.name} must be {bound.text}, got {value}")

    @property
    def reward_scale(self) -> float:
        """What a log-prob ratio against the reference is multiplied with to be the implicit reward of this method."""
        return float(getattr(self, "beta", 1.0))

    def advantages(self, rewards: Tensor, each: Sequence[tuple[float, Tensor]] = ()) -> Tensor:
        """`[B, G]`, of a method of a kind that `samples`: how much better each completion is than the others of its
        group.

        Args:
            rewards: `[B, G]`, the weighted sums; NaN where no reward says anything.
            each: of every reward its weight and its scores `[B, G]`; NaN where it says nothing.
        """
        raise NotImplementedError

    def trains_on(self, finished: bool) -> bool:
        """Whether a sampled completion is trained on; `finished`: it was not cut off."""
        return True

    def further_trees(self, trees: Sequence[TokenTree]) -> dict[str, list[TokenTree]]:
        """By name, trees of one completion each, made from those of a whole step: a loss that couples the step finds
        their summed log-probs, without gradient, in the `extras` of policy and reference."""
        return {}

    @abstractmethod
    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        """How much of each unit the trees hold; known before any forward pass. A unit is named by what it counts, so
        two losses that share a name share the count."""

    @abstractmethod
    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None, state: State = NO_STATE) -> LossOutput:
        """Loss sums and metrics of a batch of trees.

        Args:
            policy: with gradients.
            reference: of the same trees; None unless `needs_reference`.
            state: what the previous optimizer step returned, empty at the first. It is never changed in place, so a
                step can be done again.
        """
