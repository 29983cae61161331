"""Live memory: bytes of live tensors at every moment, and floating-point operations, real or with stand-ins."""

import weakref
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveMemory"]


@cache
def _flops() -> Mapping[Any, Callable[..., int]]:
    """Operation -> function that counts its floating-point operations: torch's own, and ones that torch lacks."""
    # Imports Triton if installed: a fraction of a second
    from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
        flops: int = sdpa_flop_count(q.shape, *_with_heads_of(q, k, v))  # type: ignore[no-untyped-call]
        return flops

    def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
        shapes = grad.shape, q.shape, *_with_heads_of(q, k, v)
        flops: int = sdpa_backward_flop_count(*shapes)  # type: ignore[no-untyped-call]
        return flops

    aten = torch.ops.aten
    return {
        **flop_registry,
        aten.addmm_: flop_registry[aten.addmm],
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }


def _with_heads_of(q: Tensor, *others: Tensor) -> list[tuple[int, ...]]:
    """Shapes of keys and values; heads shared by several queries count once for each."""
    return [(*q.shape[:-2], *x.shape[-2:]) for x in others]


_COPIES_INPUT = {torch.ops.aten.logsumexp.default}
"""Operations of torch that copy their input, on every device"""


class LiveMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks every operation within it: results are alive until their storage is freed.

    Views share a storage, which counts once. Memory inside an operation is not seen, except for known operations.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes since `begin`.
        rest: Most bytes since `begin` without tensors that were set aside.
        flops: Operations of matrix products, convolutions and attention since `begin`.
        read: Count of reads of numbers from tensors without values, answered with 1; see `plan`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.rest = self.flops = self.read = 0
        self._aside = 0
        self._storages: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._set_aside: set[int] = set()

    def begin(self) -> int:
        """Restarts counting; returns the bytes alive."""
        self.peak, self.rest, self.flops = self.live, self.live - self._aside, 0
        return self.live

    def set_aside(self, x: Tensor) -> None:
        """Leaves the storage of `x` out of `rest` from now on."""
        key = x.untyped_storage()._cdata
        if key in self._storages and key not in self._set_aside:
            self._set_aside.add(key)
            self._aside += self._storages[key][0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # reads a property, and often
            return func(*args, **(kwargs or {}))
        out = self._run(func, args, kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.layout == torch.strided:
                self._add(x)
        if func in _COPIES_INPUT:
            self._note(args[0].nbytes)
        if (count := _flops().get(func._overloadpacket)) is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out

    def _run(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if func is not torch.ops.aten._local_scalar_dense.default or not args[0].is_floating_point():
            return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if type(error).__name__ != "DataDependentOutputException":
                raise
        self.read += 1  # models usually log such a number
        return 1.0

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = (size, weakref.ref(storage, lambda _: self._freed(key)))
        self.live += size
        self._note()

    def _note(self, more: int = 0) -> None:
        self.peak = max(self.peak, self.live + more)
        self.rest = max(self.rest, self.live + more - self._aside)

    def _freed(self, key: int) -> None:
        size, _ = self._storages.pop(key)
        self.live -= size
        if key in self._set_aside:
            self._set_aside.discard(key)
            self._aside -= size
