"""Devices that this machine lacks: tensors of the CPU that say to be elsewhere, and refuse what cannot be done there.

Tensors of two devices do not meet, but as indices on the CPU; MPS has no float64; products of half precision that leave
float32 are CUDA's alone. Tensors made by autograd's own code belong to any device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
WRITES = ("__set__", "__setitem__", "copy_")
MOVES = ("to", "cpu", "type_as", *WRITES)


class Elsewhere(Tensor):
    """`located` is the device that it says to be on."""

    located: torch.device

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _performed(function, args, kwargs or {})


class _Factories(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _performed(function, args, kwargs or {})


@contextmanager
def emulated() -> Iterator[None]:
    """While open, tensors can be made on any device."""
    with _Factories():
        yield


def put(model: Any, devices: Mapping[str, str]) -> Any:
    """Modules by name, "" for all others, to devices, as accelerate dispatches a model before PEFT wraps its layers."""
    for name, module in model.named_modules():
        inside = (each for each in devices if f"{name}.".startswith(f"{each}.") or not each)
        device = torch.device(devices[max(inside, key=len)])
        for group in (module._parameters, module._buffers):
            for key, value in group.items():
                if value is not None:
                    there = on(value.data, device)
                    group[key] = nn.Parameter(there, value.requires_grad) if isinstance(value, nn.Parameter) else there
        of_peft = type(module).__module__.startswith("peft.")
        if len({*devices.values()}) > 1 and not of_peft and (module._parameters or name in devices):
            add_hook_to_module(module, _Hook(device, io_same_device=not name))
    model.tie_weights()
    model.hf_device_map = dict(devices)
    return model


class _Hook(AlignDevicesHook):  # type: ignore[misc]
    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def on(tensor: Tensor, device: torch.device) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        there = tensor.as_subclass(Elsewhere)
    there.located = device
    if device.type == "mps" and there.dtype == torch.float64:
        raise TypeError("the MPS framework doesn't support float64")
    return there


def _performed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if function is torch.device:
        return function(*args, **kwargs)
    name = getattr(function, "__name__", "")
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    placed = [each for each in tensors if isinstance(each, Elsewhere)]
    if function == Tensor.device.__get__:  # type: ignore[attr-defined]
        return args[0].located if placed else CPU
    given = {each for each in map(_device, (*args[1:], *kwargs.values())) if each} if name == "to" else set()
    target = CPU if name == "cpu" else next(iter(given), _device(kwargs.get("device")))
    devices = {each.located for each in placed if each.dim()} - ({CPU} if name == "__getitem__" else set())
    if len(devices) > 1 and name not in MOVES:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, and they are on {devices}")
    first = args[0].located if args and isinstance(args[0], Elsewhere) else CPU
    where = target or (first if name in WRITES else next(iter(devices), first))
    args, kwargs = tree_map(_on_cpu, (args, kwargs))
    if name == "bmm" and "out_dtype" in kwargs:
        if where.type != "cuda":
            raise NotImplementedError("Could not run 'aten::bmm.dtype'")
        out = torch.bmm(args[0].float(), args[1].float())
    else:
        out = function(*args, **kwargs)
    if tensors and not placed and target is None:
        return out
    own = [] if target else tensors  # as operations in place give them back

    def placed_there(each: Any) -> Any:
        return on(each, where) if isinstance(each, Tensor) and all(each is not given for given in own) else each

    return tree_map(placed_there, out)


def _device(given: Any) -> torch.device | None:
    if isinstance(given, Tensor):
        return given.located if isinstance(given, Elsewhere) else CPU
    if isinstance(given, str) and given.split(":")[0] in ("cpu", "cuda", "mps"):
        return torch.device(given)
    return given if isinstance(given, torch.device) else None


def _on_cpu(given: Any) -> Any:
    return CPU if not isinstance(given, Tensor) and _device(given) else given
