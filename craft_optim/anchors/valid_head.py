"""Vocabulary head: run only at the positions whose logits count, or left out if its function is known."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .capture import run, tied
from .fsdp2 import fsdp2_around
from .masks import rows, select
from .passes import Forward, call, eager, logits_of, saving_hooks
from .pieces import HeadRows
from .structure import Inputs

__all__ = [
    "HeadUse",
    "LinearHead",
    "head_agrees",
    "head_at",
    "head_left_out",
    "linear_head",
    "only_scaled",
    "output_head",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass
class HeadUse:
    """Use of the head in a forward under `head_at` or `head_left_out`.

    Attributes:
        used: True if the logits are `[1, P, V]`, at the P valid positions in row-major order; `[1, 0, V]` if the head
            was left out.
        calls: Number of calls of the head. After more than one the output is useless: run again without.
        hidden: Input that a left-out head would have had, `[P, D]`.
        weight, bias: Parameters that it would have used: under FSDP2 those of its forwards.
        dtype: Dtype that it would have computed in.
        shape: Shape of all positions, `(B, T)`.
    """

    used: bool = False
    calls: int = 0
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class LinearHead:
    """Head with output y, for which the model's logits are `cap tanh(scale y / cap)`.

    Attributes:
        head: The head, a plain linear module.
        scale, cap: Scale and cap as in `HeadRows`.
        owner: FSDP2 module that gathers the head's parameters for a forward; None if they are always here.
    """

    head: nn.Linear
    scale: float = 1.0
    cap: float | None = None
    owner: Any = None

    def rows(self, seen: HeadUse, output: Any = None) -> HeadRows:
        """The logits of a forward that left the head out.

        Args:
            seen: Use of the head in it.
            output: Output of the model.
        """
        hidden, weight, empty = seen.hidden, seen.weight, logits_of(output)
        assert hidden is not None
        assert weight is not None
        if self.owner is not None and empty is not None:
            # FSDP2 gathers weights and reduces gradients in a backward that begins at the model's output. Through the
            # logits of no position the head gets zeros, too: a process without valid ones has to reduce as the others.
            hidden = tied(hidden, empty)
        return HeadRows(hidden, weight, seen.bias, seen.dtype, self.scale, self.cap, self.gathered)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gives the parameters of the last forward their values within the block; afterwards all is as before.

        A root of FSDP2 keeps its parameters gathered until the backward; others have resharded them.
        """
        away = self.owner is not None and _is_spread(self.head)
        if away:
            self.owner.unshard()
        try:
            yield
        finally:
            if away:
                self.owner.reshard()


def output_head(model: nn.Module) -> nn.Module | None:
    """The output embeddings of the model, or of a model within it; None if there are none or several."""
    getters = (getattr(module, "get_output_embeddings", None) for module in model.modules())
    heads = {id(head): head for get in getters if callable(get) and isinstance(head := get(), nn.Module)}
    return next(iter(heads.values())) if len(heads) == 1 else None


@contextmanager
def head_at(model: nn.Module, valid: Tensor, head: nn.Module | None = None) -> Iterator[HeadUse]:
    """Makes a forward within the block run the vocabulary head at the valid positions only, if it can.

    The head, `get_output_embeddings()` as in Hugging Face, is given the hidden states `[1, P, D]` of the P positions
    instead of `[B, T, D]`: time and memory of the head and of the logits shrink by P / (B T). What the model does to
    logits position by position (softcapping, a cast) it does to `[1, P, V]`; what it does along positions would be
    wrong, and labels of `[B, T]` do not fit: `head_agrees` finds out. A compiled model runs as it is written.

    Nothing happens, and `used` stays False, if there is no such head or more than one, every position or none is valid,
    the head's input is not a plain tensor `[B, T, D]` (sequence and tensor parallelism), or the head runs within an
    activation checkpoint, whose second run would differ.

    Args:
        model: The unmodified model, in any wrapper; it is not modified.
        valid: `[B, T]`, true where logits are compared. On the CPU: the host does not wait for an accelerator.
        head: The head, if known: the search walks over all modules.
    """
    seen, places = HeadUse(), valid.flatten().nonzero().flatten()
    head = head or output_head(model)
    if head is None or valid.ndim != 2 or not 0 < len(places) < valid.numel():
        yield seen
        return

    def at_valid(hidden: Tensor) -> Tensor | None:
        return select(hidden.flatten(0, 1), places).unsqueeze(0) if hidden.shape[:2] == valid.shape else None

    with _given(head, at_valid, seen):
        yield seen


@contextmanager
def head_left_out(known: LinearHead, valid: Tensor | None) -> Iterator[HeadUse]:
    """Makes a forward within the block run the head at no position, if it can; the result has the head's input.

    `LinearHead.rows` are the logits, which the comparison computes in pieces. As for `head_at`, nothing happens if the
    head's input is not a plain tensor or is given within an activation checkpoint, or if other hooks see the head's
    output.

    Args:
        known: The head.
        valid: `[B, T]` on the CPU, true where logits are compared; None for all positions.
    """
    seen = HeadUse()

    def nothing(hidden: Tensor) -> Tensor | None:
        if (valid is not None and hidden.shape[:2] != valid.shape) or not _is_plain(known.head, hooks=1):
            return None
        kind = hidden.device.type
        autocast = torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64
        seen.dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
        seen.hidden, seen.shape = rows(hidden, valid), tuple(hidden.shape[:2])
        seen.weight, seen.bias = known.head.weight, known.head.bias
        return hidden.flatten(0, 1)[:0].unsqueeze(0)

    with _given(known.head, nothing, seen):
        yield seen


@contextmanager
def _given(head: nn.Module, instead: Callable[[Tensor], Tensor | None], seen: HeadUse) -> Iterator[None]:
    """Replaces the head's first input, `[B, T, D]`, within the block."""
    outside = torch.is_grad_enabled(), saving_hooks()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.calls += 1
        seen.used = False
        name, hidden = ("", args[0]) if args else next(iter(kwargs.items()), ("", None))
        if seen.calls > 1 or hidden is None or not _is_plain_tensor(hidden) or hidden.ndim != 3:
            return None
        if (torch.is_grad_enabled(), saving_hooks()) != outside or (given := instead(hidden)) is None:
            return None
        seen.used = True
        return ((given, *args[1:]), kwargs) if args else (args, kwargs | {name: given})

    handle = head.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with eager():
            yield
    finally:
        handle.remove()


def _is_plain(head: nn.Module, hooks: int = 0) -> bool:
    """True if the head is a linear module whose output depends on its two parameters only, both whole and here.

    False with adapters, quantised or parametrised weights, or weights that a framework has split or taken away; FSDP2
    has them here in a forward. `hooks` is the number of forward hooks that are our own.
    """
    if not _is_linear(head, hooks):
        return False
    weight, bias = head.weight, head.bias
    return (
        all(
            (type(x) is nn.Parameter or _is_plain_tensor(x))
            and x.dtype in _DTYPES
            and x.untyped_storage().nbytes() >= x.nbytes
            for x in (weight, bias)
            if x is not None
        )
        and weight.ndim == 2
        and (bias is None or len(bias) == len(weight))
    )


def _is_linear(head: nn.Module, hooks: int = 0) -> TypeGuard[nn.Linear]:
    """True if the head is a linear module that only FSDP2 may have changed, wherever its parameters are."""
    kind = type(head)
    own = kind is nn.Linear or (kind.__bases__[-1] is nn.Linear and kind.__bases__[0].__name__ == "FSDPModule")
    return (
        own
        and "forward" not in vars(head)
        and not _others(head._forward_hooks.values())
        and len(_others(head._forward_pre_hooks.values())) <= hooks
    )


def _others(hooks: Iterable[Any]) -> list[Any]:
    """Hooks other than those of FSDP2, which gather and free the weights."""
    return [hook for hook in hooks if not getattr(hook, "__module__", "").startswith("torch.distributed.fsdp.")]


def _is_spread(head: nn.Linear) -> bool:
    """True if the parameters are DTensors: each process has a part."""
    return any(hasattr(p, "device_mesh") for p in head.parameters())


def _is_plain_tensor(x: Any) -> bool:
    """True for a plain tensor, or one without values that stands for it; not for a tensor in parts."""
    return type(x) is Tensor or type(x).__name__ == "FakeTensor"


def head_agrees(model: nn.Module, inputs: Inputs, valid: Tensor, *, forward: Forward | None = None) -> bool:
    """True if the model's logits under `head_at` equal its logits at the valid positions.

    Runs two forwards without gradients, one with all logits: call it once, under the conditions of the passes.

    Args:
        model: The model, as for `head_at`.
        inputs: A batch, on the model's device.
        valid: `[B, T]`, true where logits are compared.
        forward: Function to run instead of the model's call, as for `run`.
    """
    if output_head(model) is None:
        return False
    with torch.no_grad():
        whole = logits_of(run(model, inputs, forward=forward)[0])
        try:
            with head_at(model, valid) as seen:
                found = logits_of(call(model, inputs, forward))
        except Exception:  # a model may fail on logits of another shape, as in a loss over labels
            return False
    if not seen.used or whole is None or found is None or whole.shape[:-1] != valid.shape:
        return False
    expected = rows(whole, valid)
    return found.shape == (1, *expected.shape) and _alike(found[0], expected, torch.finfo(torch.bfloat16).eps)


def linear_head(model: nn.Module, inputs: Inputs, *, forward: Forward | None = None) -> LinearHead | None:
    """The head with the form of the model's logits, if that form is known; else None.

    Runs two forwards: call it once, under the conditions of the passes, with few inputs. In the first, autograd's graph
    shows the operations on the head's output: numbers alone would not show a mask that acts in other batches only.
    Scales and caps are searched among the numbers of the model's configs.

    Args:
        model, inputs, forward: Arguments as for `head_agrees`.
    """
    head = output_head(model)
    if head is None or not _is_linear(head):
        return None
    around = fsdp2_around(model, head)
    known = LinearHead(head, owner=around[-1] if around else None)
    if known.owner is not None:
        known.owner.reshard()  # for a root whose last forward had no backward: now its mesh can be read
    elif not _is_plain(head):
        return None
    mesh = getattr(head.weight, "device_mesh", None)
    whole = only_scaled(model, inputs, forward, head)
    if whole is None:
        return None
    with torch.no_grad():
        try:
            with head_left_out(known, None) as seen:
                call(model, inputs, forward)
        except Exception:  # a model may fail without logits, as in a loss over labels
            return None
        if not seen.used or seen.calls > 1 or whole.shape[:-1] != seen.shape:
            return None
        expected = rows(whole, None)
        eps = max(torch.finfo(seen.dtype).eps, torch.finfo(expected.dtype).eps)
        forms = [replace(known, scale=scale, cap=cap) for scale, cap in sorted(_forms(model), key=str)]
        with known.gathered():
            if not _is_plain(head):
                return None
            apart = [_apart(form.rows(seen).logits(), expected) for form in forms]
        apart = _largest_anywhere(apart, mesh, expected.device)
    best, *others = sorted(range(len(forms)), key=apart.__getitem__)
    # Small logits are equal with and without a cap, but they may grow
    told = all(apart[i] > apart[best] + eps for i in others)
    return forms[best] if apart[best] <= 8.0 * eps and told else None


_SCALING = ("Mul", "Div", "Tanh", "ToCopy", "Clone", "Alias", "View", "UnsafeView", "Slice", "Squeeze", "Unsqueeze")


def only_scaled(model: nn.Module, inputs: Inputs, forward: Forward | None, head: nn.Module) -> Tensor | None:
    """The model's logits, if they are the head's output up to factors and a tanh; else None. One forward.

    Args:
        model, inputs, forward: Arguments as for `head_agrees`.
        head: The model's `output_head`.
    """
    given: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        given.append(out.detach().requires_grad_())
        return given[-1].clone()

    handle = head.register_forward_hook(hook)
    try:
        with torch.enable_grad(), eager():
            logits = logits_of(call(model, inputs, forward))
    finally:
        handle.remove()
    node = None if logits is None or len(given) != 1 else logits.grad_fn
    while node is not None and not hasattr(node, "variable"):
        by = getattr(node, "_saved_other", None)
        following = [function for function, _ in node.next_functions if function is not None]
        known = node.name().partition("Backward")[0] in _SCALING
        if not known or len(following) != 1 or (isinstance(by, Tensor) and by.ndim > 0):
            return None
        node = following[0]
    return logits.detach() if node is not None and logits is not None and node.variable is given[0] else None


def _forms(model: nn.Module) -> set[tuple[float, float | None]]:
    """Possible scales and caps from a model's configs."""
    configs = {id(c): c for m in model.modules() if hasattr(c := vars(m).get("config"), "__dict__")}
    found: set[tuple[float, float | None]] = {(1.0, None)}
    for name, value in (pair for config in configs.values() for pair in vars(config).items()):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 < value < math.inf:
            continue
        if "attn" in name or "router" in name or not any(word in name for word in ("logit", "multiplier")):
            continue
        found |= {(1.0, float(value))} if "softcap" in name else {(float(value), None), (1.0 / value, None)}
    return found


def _apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    if found.shape != expected.shape:
        return math.inf
    apart = float((found.to(expected.dtype) - expected).abs().max()) / (_largest(expected) or 1.0)
    return apart if math.isfinite(apart) else math.inf


def _largest_anywhere(values: list[float], mesh: Any, device: torch.device) -> list[float]:
    """Element-wise maximum over all processes that share the weights: they must decide alike."""
    if mesh is None:
        return values
    from torch.distributed.tensor import DTensor, Partial

    mine = DTensor.from_local(torch.tensor(values, device=device), mesh, [Partial("max")] * mesh.ndim)
    found: list[float] = mine.full_tensor().tolist()
    return found


def _alike(found: Tensor, expected: Tensor, rounding: float) -> bool:
    return torch.allclose(found, expected, rtol=rounding, atol=rounding * _largest(expected), equal_nan=True)


def _largest(x: Tensor) -> float:
    return float(torch.where(x.isfinite(), x, 0.0).abs().max())
