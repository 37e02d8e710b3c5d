"""What every algorithm is: settings, what it needs, and a loss that returns sums.

A loss is never divided in an algorithm. It returns sums over what it was given, named by what they are to be divided by
(`pairs`, ...); the training step divides by the count over the whole optimizer step. That is why splitting a step into
micro-batches, or over ranks, changes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from prefold.trees.logprobs import TreeLogprobs
    from prefold.trees.packing import TokenTree


class Mean(NamedTuple):
    """A metric on its way to being a mean: the sum of its values and how many they were."""

    total: Tensor
    number: int


@dataclass(frozen=True)
class LossOutput:
    """`loss`: scalar sums by the unit that each is divided by; `metrics`: by TRL's names."""

    loss: dict[str, Tensor]
    metrics: dict[str, Mean] = field(default_factory=dict)


@dataclass(frozen=True)
class Algorithm(ABC):
    """Settings of a method as fields; what it needs as class attributes."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True, "use_attribute_docstrings": True}

    data: ClassVar[Literal["pairs", "unpaired", "prompts"]] = "pairs"
    """What a row must hold."""

    needs_reference: ClassVar[bool]
    """Whether the loss compares with the log-probs of the model before training."""

    defaults: ClassVar[dict[str, Any]]
    """Vetted recipe values of this method by dotted field, used where the recipe is silent."""

    @property
    def reward_scale(self) -> float:
        """What a log-prob ratio against the reference is multiplied with to be the implicit reward of this method."""
        return 1.0

    @abstractmethod
    def units(self, trees: Sequence[TokenTree]) -> dict[str, int]:
        """How much of each unit the trees hold; known before any forward pass."""

    @abstractmethod
    def loss(self, policy: TreeLogprobs, reference: TreeLogprobs | None) -> LossOutput:
        """Loss sums and metrics of a batch of trees; `reference` is None unless `needs_reference`."""
