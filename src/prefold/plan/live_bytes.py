"""How much memory operations hold at a time, counted while they are performed on tensors without contents."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While open, counts the bytes of every storage that an operation makes, until it is let go of.

    What autograd saves for the backward pass counts like any other. What a kernel allocates inside is not seen.

    Args:
        resident: tensors that were there before and are not counted.
    """

    def __init__(self, resident: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._resident = [tensor.untyped_storage() for tensor in resident]
        for storage in self._resident:
            self._sizes[storage._cdata] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return found

    def _see(self, storage: UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._sizes:
            return
        self._sizes[place] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, place)

    def _let_go(self, place: int) -> None:
        self.now -= self._sizes.pop(place)
