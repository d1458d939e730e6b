"""One training step run on tensors without data: what it would allocate, and what it would compute.

The real model, loss and optimizer run; a dispatch mode gives every operator meta tensors, follows every storage from its
allocation to its release, and counts FLOPs with torch's own formulas. Nothing is extrapolated.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

Batch = TypeVar("Batch")
DeviceKind = Literal["gpu", "cpu"]
OptimizerName = Literal["adamw", "sgd-momentum"]
Part = Literal["forward", "backward", "optimizer"]


_CPU = torch.device("cpu")
_ITEM = torch.ops.aten._local_scalar_dense.default
_FACTORIES = (torch.ops.aten.scalar_tensor.default,)
# What they make is known; of the second ones it depends on the shape that they are given.
_CONSTANTS = ("arange", "linspace", "zeros", "ones", "full", "scalar_tensor", "eye")
_SHAPED = ("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
_MOST_VALUES = 2**18  # a tensor of more is known by its shape only
_RMS_NORMS = (torch.rms_norm, nn.functional.rms_norm)
_NORMS = (torch.layer_norm, nn.functional.layer_norm, *_RMS_NORMS)


@dataclass(frozen=True)
class StepTrace:
    """What a step holds, in bytes, and computes, in FLOPs (a multiply-add is two).

    Args:
        weights: parameters and buffers.
        inputs: the batch.
        gradients: at the end of the backward pass.
        optimizer_state: what the optimizer keeps between steps.
        activations: held for the backward pass, at the end of the forward pass.
        peak: the most that is held at one time, in any step but the first (which starts without optimizer state).
        peak_in: the part of the step where that is.
    """

    weights: int
    inputs: int
    gradients: int
    optimizer_state: int
    activations: int
    peak: int
    peak_in: Part
    flops_forward: int
    flops_backward: int


class ShapeTensor(Tensor):
    """A tensor without data that autograd and autocast take for one on the CPU; its shape and storage are those of `meta`.

    torch's `FakeTensor` gives the same figures in four times the time; `plan` is to answer within seconds.

    Args:
        constant: what it holds, where that follows from constants alone (position ids, masks) and is small: models read such
            numbers to find their image tokens.
    """

    meta: Tensor
    constant: Tensor | None

    @staticmethod
    def __new__(cls, meta: Tensor, constant: Tensor | None = None) -> ShapeTensor:
        made = Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype, device=_CPU
        )
        made.meta, made.constant = meta, constant
        return made

    def known(self) -> Tensor | None:
        """`constant`, unless something unknown was written to it since, also through a view."""
        unknown = self.constant is None or hasattr(self.constant.untyped_storage(), "overwritten")
        return None if unknown else self.constant

    def tolist(self) -> Any:
        """As of any tensor; torch's own reads memory, which is not there."""
        if (values := self.known()) is None:
            raise RuntimeError(f"the values of {self} depend on weights or images")
        return values.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShapeTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} outside of a StepTracer")


class StepTracer(TorchDispatchMode):
    """Makes every tensor a `ShapeTensor`, and follows storages: `live` bytes now, the `peak` so far, the `flops` so far."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._storages: dict[int, weakref.ref[Any]] = {}
        self._known: dict[Any, dict[Any, tuple[int, Callable[[], Any]]] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = _computed(func, args, kwargs or {})
        if func is _ITEM:
            return 1.0 if values is None else values  # 1: of the optimizer's step counters
        if values is not None and torch.Tag.dynamic_output_shape in func.tags:
            if isinstance(values, Tensor):
                return self._wrap(values.to("meta"), [], values)
            return type(values)(self._wrap(x.to("meta"), [], x) for x in values)
        if func._overloadpacket.__name__ in _INDEXING:
            args = _places(args)
        given: list[ShapeTensor] = []
        args = [_unwrap(x, given) for x in args]
        kwargs = {key: _unwrap(x, given) for key, x in (kwargs or {}).items()}
        if "device" in kwargs or func in _FACTORIES:
            kwargs["device"] = "meta"
        out = self._run(func, args, kwargs)
        if values is None and func._schema.is_mutable:
            for tensor in given:
                if tensor.meta is out and tensor.constant is not None:
                    vars(tensor.constant.untyped_storage())["overwritten"] = True
                    tensor.constant = None
        if isinstance(out, tuple | list):
            each = values if isinstance(values, tuple | list) else [None] * len(out)
            return type(out)(self._wrap(x, given, value) for x, value in zip(out, each, strict=True))
        return self._wrap(out, given, values)

    def _run(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """`func` on meta tensors, its FLOPs counted. As blocks are alike, what shapes give is remembered."""
        known = self._known.setdefault(func, None if _aliases(func) else {})
        key = _signature([args, kwargs]) if known is not None else None
        if known is not None and key in known:
            flops, make = known[key]
            self.flops += flops
            return make()
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=out)
        self.flops += flops
        # Some views do not say that they are (_unsafe_view).
        if known is not None and self._is_new(out) and (maker := _maker(out)) is not None:
            known[key] = flops, maker
        return out

    def _is_new(self, out: Any) -> bool:
        outputs = out if isinstance(out, tuple | list) else (out,)
        return not any(isinstance(x, Tensor) and x.untyped_storage()._cdata in self._storages for x in outputs)

    def _wrap(self, out: Any, given: list[ShapeTensor], values: Any = None) -> Any:
        if not isinstance(out, Tensor):
            return out
        for tensor in given:
            if tensor.meta is out:  # changed in place
                return tensor
        storage = out.untyped_storage()
        if storage._cdata not in self._storages:
            self._follow(storage, storage.nbytes())
        return ShapeTensor(out, values if isinstance(values, Tensor) and values.numel() <= _MOST_VALUES else None)

    def _follow(self, storage: Any, size: int) -> None:
        key = storage._cdata
        # torch keeps the Python object for as long as the storage itself lives.
        self._storages[key] = weakref.ref(storage, lambda _: self._release(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int) -> None:
        del self._storages[key]
        self.live -= size


class _UnknownError(Exception):
    """A tensor whose values are not known."""


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What `func` gives, where all that it is given is known and little; else None."""
    seen: list[Tensor] = []
    name = func._overloadpacket.__name__
    if name in _SHAPED and isinstance(args[0], ShapeTensor):
        args = [torch.empty((), dtype=args[0].dtype).expand(args[0].shape), *args[1:]]
    try:
        values = [_values(x, seen) for x in args], {key: _values(x, seen) for key, x in kwargs.items()}
    except _UnknownError:
        return None
    if not seen and name not in _CONSTANTS:
        return None
    sizes = [x for x in args if isinstance(x, list | tuple) and all(isinstance(y, int) for y in x)]
    if (not seen or name in _SHAPED) and any(math.prod(size) > _MOST_VALUES for size in sizes):
        return None
    return func(*values[0], **values[1])


def _values(x: Any, seen: list[Tensor]) -> Any:
    if isinstance(x, Tensor):
        values = x.known() if isinstance(x, ShapeTensor) else x
        if values is None or values.device != _CPU or values.numel() > _MOST_VALUES:
            raise _UnknownError
        seen.append(values)
        return values
    if isinstance(x, torch.device) and x.type == "meta":
        raise _UnknownError
    return [_values(y, seen) for y in x] if isinstance(x, list | tuple) else x


def _places(args: Any) -> list[Any]:
    """Masks among the indices of `index` or `index_put`, where they are known, as the places that they select."""
    out = list(args)
    for number, x in enumerate(args):
        if isinstance(x, list | tuple) and any(isinstance(y, Tensor) and y.dtype == torch.bool for y in x):
            known = [(y.known() if isinstance(y, ShapeTensor) else y) if isinstance(y, Tensor) else y for y in x]
            each = [
                y.nonzero(as_tuple=True) if isinstance(y, Tensor) and y.dtype == torch.bool else (y,) for y in known
            ]
            out[number] = [place for places in each for place in places]
    return out


def _unwrap(x: Any, given: list[ShapeTensor]) -> Any:
    if isinstance(x, ShapeTensor):
        given.append(x)
        return x.meta
    if isinstance(x, Tensor):
        return x if x.is_meta else x.to("meta")
    if isinstance(x, list | tuple):
        return [_unwrap(y, given) for y in x]
    return x


def _aliases(func: Any) -> bool:
    return any(x.alias_info is not None for x in (*func._schema.arguments, *func._schema.returns))


def _signature(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.dtype, x.shape, x.stride()
    if isinstance(x, list):
        return tuple(map(_signature, x))
    if isinstance(x, dict):
        return tuple((key, _signature(y)) for key, y in x.items())
    return type(x), x


def _maker(out: Any) -> Callable[[], Any] | None:
    """Makes outputs like these anew; None where it would not be the same."""
    if isinstance(out, tuple):
        makers = [_maker(x) for x in out]
        return None if None in makers else lambda: tuple(make() for make in makers)  # type: ignore[misc]
    if out is None:
        return lambda: None
    if not isinstance(out, Tensor):
        return None
    make = partial(torch.empty_strided, out.shape, out.stride(), dtype=out.dtype, device="meta")
    return make if make().untyped_storage().nbytes() == out.untyped_storage().nbytes() else None


class GpuPrecision(TorchFunctionMode):
    """What a GPU does and a CPU does not, in these models: autocast computes norms in fp32, and an RMSNorm is one kernel.

    Tensors that claim to be on a GPU have no backward pass where there is none (torch 2.15), so ours claim to be on the CPU.
    The operators in question have a kernel for AutocastCUDA and none for AutocastCPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _NORMS:
            return func(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            args = [_to_fp32(x) for x in args]
            kwargs = {key: _to_fp32(x) for key, x in kwargs.items()}
        if func in _RMS_NORMS:
            return torch.ops.aten._fused_rms_norm(*args, **kwargs)[0]
        return func(*args, **kwargs)


def _to_fp32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) else x


def checkpointing(device: DeviceKind) -> Callable[..., Any]:
    """diffusers' checkpointing function, whose second computation has the precision of the first: function modes are off
    inside of `backward`."""
    again = GpuPrecision if device == "gpu" else nullcontext
    return partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), again()))


def trace_step(
    model: nn.Module,
    make_batch: Callable[[], Batch],
    compute_loss: Callable[[nn.Module, Batch], Tensor],
    *,
    dtype: torch.dtype,
    optimizer: OptimizerName = "adamw",
    device: DeviceKind = "gpu",
) -> StepTrace:
    """One step of a model on the meta device, with what trains already set. The model is of no use afterwards.

    What kernels allocate inside themselves is not seen.

    Args:
        make_batch: called where tensors have no data and count.
        compute_loss: model and batch -> scalar.
        dtype: of autocast; fp32 = no autocast.
        device: whose autocast and optimizer are meant.
    """
    with StepTracer() as tracer, GpuPrecision() if device == "gpu" else nullcontext():
        model.to_empty(device="cpu")
        weights = tracer.live
        trained = [p for p in model.parameters() if p.requires_grad]
        batch = make_batch()
        inputs = tracer.live - weights
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            loss = compute_loss(model, batch)
        activations, forward_peak, flops_forward = tracer.live - weights - inputs, tracer.peak, tracer.flops
        tracer.peak = tracer.live
        torch.autograd.backward(
            loss
        )  # `loss.backward()` would leave `GpuPrecision`, and with it what is computed again
        backward_peak, flops_backward = tracer.peak, tracer.flops - flops_forward
        gradients = _bytes(p.grad for p in trained if p.grad is not None)
        tracer.peak = tracer.live
        state = _optimizer_step(trained, optimizer, foreach=device == "gpu")
        # The first step makes the optimizer's state before it updates anything, so its peak is that of the others.
        step_peak = tracer.peak
    peaks: dict[Part, int] = {
        "forward": forward_peak + state,
        "backward": backward_peak + state,
        "optimizer": step_peak,
    }
    peak_in = max(peaks, key=lambda part: peaks[part])
    return StepTrace(
        weights=weights,
        inputs=inputs,
        gradients=gradients,
        optimizer_state=state,
        activations=activations,
        peak=peaks[peak_in],
        peak_in=peak_in,
        flops_forward=flops_forward,
        flops_backward=flops_backward,
    )


def _optimizer_step(parameters: list[nn.Parameter], name: OptimizerName, *, foreach: bool) -> int:
    """One update; the bytes of the state that it leaves. `foreach` is torch's default on a GPU, not on a CPU."""
    made: torch.optim.Optimizer
    if name == "adamw":
        made = torch.optim.AdamW(parameters, foreach=foreach)
    else:
        made = torch.optim.SGD(parameters, momentum=0.9, foreach=foreach)
    made.step()
    return _bytes(x for state in made.state.values() for x in state.values() if isinstance(x, Tensor))


def _bytes(tensors: Iterable[Any]) -> int:
    storages = (tensor.meta.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
