"""One forward on two ranges of rows, whose backward gives each range's gradient of the parameters apart.

    aliases = Aliases()
    with rows_apart(model, parts, aliases, size=12, cut=8):
        output = model(rows)  # rows 0..7 and rows 8..11, say of two batches
    output.sum().backward()
    # p.grad has what rows 0..7 give, aliases.take_gradients()[p] what rows 8..11 give

The modules that own trainable parameters run otherwise meanwhile; all others, attention and activations among them, see
one batch. Aliases are leaves that share the parameters' memory: autograd adds up what tied and repeated uses give.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from ..frozen import other_forwards

__all__ = ["Aliases", "RowsError", "parts_with_parameters", "rows_apart"]

Part = tuple[nn.Module, Callable[..., Any]]


class RowsError(ValueError):
    """It cannot be told which rows of a module's input belong to which range."""


class Aliases:
    """Parameter -> a leaf of the same memory that takes the second range's gradient; made when they are asked for."""

    def __init__(self) -> None:
        self._of: dict[Tensor, Tensor] = {}

    def __call__(self, parameter: Tensor | None) -> Tensor | None:
        if parameter is None or not parameter.requires_grad:
            return parameter
        if parameter not in self._of:
            self._of[parameter] = parameter.detach().requires_grad_()
        return self._of[parameter]

    def items(self) -> list[tuple[Tensor, Tensor]]:
        """Pairs of parameter and alias."""
        return list(self._of.items())

    def take_gradients(self) -> dict[Tensor, Tensor]:
        """Parameter -> gradient, of those that have one; nothing else holds them then: autograd need not copy them."""
        found = {p: alias.grad for p, alias in self._of.items() if alias.grad is not None}
        for alias in self._of.values():
            alias.grad = None  # the graph, which holds the alias, lives as long as the user's loss
        return found


class _Linear(torch.autograd.Function):
    """`F.linear` on all rows; its backward gives the gradients of the rows before and after `cut` apart."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, cut: int, weight: Tensor, other: Tensor, bias: Tensor | None, _: Any, transposed: bool
    ) -> Tensor:
        weight = weight.to(x.dtype)  # another one under autocast only
        ctx.save_for_backward(x, weight)
        ctx.cut, ctx.transposed = cut, transposed
        return F.linear(x, weight.t() if transposed else weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x, _, of_weight, of_other, of_bias, of_other_bias, _ = ctx.needs_input_grad
        flat, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        cut = ctx.cut * (len(flat) // len(grad))

        def of(wanted: bool, rows: slice) -> Tensor | None:
            if not wanted:
                return None
            left, right = (inputs[rows], flat[rows]) if ctx.transposed else (flat[rows], inputs[rows])
            return left.t().mm(right)

        first, second = slice(cut), slice(cut, None)
        return (
            grad.matmul(weight.t() if ctx.transposed else weight) if of_x else None,
            None,
            of(of_weight, first),
            of(of_other, second),
            flat[first].sum(0) if of_bias else None,
            flat[second].sum(0) if of_other_bias else None,
            None,
        )


def parts_with_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, of the outermost modules that own trainable parameters themselves: each runs as one part.

    Raises:
        RowsError: The model itself is one of them: everything in it would run twice.
    """
    found: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            if module not in found.values():
                found[name] = module
            return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    if "" in found and any(True for _ in model.children()):
        own = [name for name, p in model.named_parameters(recurse=False) if p.requires_grad]
        raise RowsError(
            f"{type(model).__name__} itself owns trainable parameters, {', '.join(own[:3])}: all of it would run once "
            "per range of rows. Put them into a module of their own, or freeze them."
        )
    return found


@contextmanager
def rows_apart(parts: Mapping[str, nn.Module], alias: Aliases, size: int, cut: int) -> Iterator[None]:
    """Within the block a forward on `size` rows keeps the parameters' gradients of rows before and after `cut` apart.

    Linear layers run once, and only their weights' gradients are computed per range. RMS norms of any library run once
    with one weight per row. Every other module with parameters of its own runs once per range. Rows are the first
    dimension of every tensor that such a module is given, alone or flattened with those after it; a tensor with a first
    dimension of 1 belongs to all rows. Within a range the result is what the model gives, row by row; what the model
    does *across* rows goes across the ranges, too.

    Args:
        parts: As from `parts_with_parameters`. Each module's own forward is back at the end, whatever happens.
        alias: Takes the gradients of the second range.
        size: Number of rows, at least 2.
        cut: Number of rows in the first range.

    Raises:
        RowsError: In the forward: the first dimension of a part's input is not a multiple of `size`.
    """

    def cut_of(name: str, x: Tensor) -> int:
        if len(x) % size:
            raise RowsError(
                f"The module {name!r} is given a tensor of shape {tuple(x.shape)} where {size} rows run: which of it "
                "belongs to which row cannot be told."
            )
        return len(x) // size * cut

    def make(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        module = parts[name]
        if is_linear(module):
            return _linear(module, alias, size, lambda x: cut_of(name, x))
        if is_rms_norm(module):
            return _rms_norm(module, own, alias, size, lambda x: cut_of(name, x))
        return _twice(name, module, own, alias, size, lambda x: cut_of(name, x))

    with other_forwards(parts, make):
        yield


def is_linear(module: nn.Module) -> bool:
    """Whether its forward is that of `nn.Linear`, or of GPT-2's Conv1D, whose weight is the other way round."""
    kind, weight = type(module), module._parameters.get("weight")
    known = kind.forward is nn.Linear.forward or (
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    )
    return known and "forward" not in vars(module) and weight is not None and not weight.is_complex()


def is_rms_norm(module: nn.Module) -> bool:
    """Whether it multiplies its normalised input by its one parameter, `weight`, or by 1 + `weight`, by hand."""
    names = [name for name, p in module._parameters.items() if p is not None]
    by_hand = "RMSNorm" in type(module).__name__ and not isinstance(module, nn.RMSNorm)
    return (
        by_hand and names == ["weight"] and not any(p.requires_grad for c in module.children() for p in c.parameters())
    )


def _linear(module: nn.Module, alias: Aliases, size: int, cut_of: Callable[[Tensor], int]) -> Callable[..., Any]:
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    transposed = not isinstance(module, nn.Linear)

    def forward(input: Tensor) -> Tensor:
        x, device = _all_rows(input, size), input.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # as autocast does
            x = x.to(torch.get_autocast_dtype(device))
        output: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            x, cut_of(x), weight, alias(weight), bias, alias(bias), transposed
        )
        return output

    return forward


def _rms_norm(
    module: nn.Module, own: Callable[..., Any], alias: Aliases, size: int, cut_of: Callable[[Tensor], int]
) -> Callable[..., Any]:
    weight = module._parameters["weight"]
    assert weight is not None
    other = alias(weight)
    assert other is not None

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = _all_rows(x, size)
        cut, ones = cut_of(x), [1] * (x.ndim - 2)
        vars(module)["weight"] = torch.cat(  # found before the parameter of that name
            [weight.expand(cut, *ones, -1), other.expand(len(x) - cut, *ones, -1)]
        )
        try:
            return own(x, *args, **kwargs)
        finally:
            del vars(module)["weight"]

    return forward


def _twice(
    name: str, module: nn.Module, own: Callable[..., Any], alias: Aliases, size: int, cut_of: Callable[[Tensor], int]
) -> Callable[..., Any]:
    """Runs the module once per range; the second time on the aliases of all parameters within it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.ndim]
        with_rows = [i for i in tensors if len(leaves[i]) != 1]
        if not tensors:
            raise RowsError(f"The module {name!r} is given no tensor: what it returns belongs to no row.")
        if not with_rows:
            with_rows = tensors
            for i in tensors:
                leaves[i] = _all_rows(leaves[i], size)
        first, second = list(leaves), list(leaves)
        for i in with_rows:
            cut = cut_of(leaves[i])
            first[i], second[i] = leaves[i].split([cut, len(leaves[i]) - cut])
        args, kwargs = pytree.tree_unflatten(first, structure)
        one = own(*args, **kwargs)
        args, kwargs = pytree.tree_unflatten(second, structure)
        with _aliased(module, alias):
            other = own(*args, **kwargs)
        return pytree.tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else a, one, other)

    return forward


def _all_rows(x: Tensor, size: int) -> Tensor:
    """The tensor with its rows; what has a first dimension of 1 belongs to all of them."""
    return x.expand(size, *x.shape[1:]) if len(x) == 1 else x


@contextmanager
def _aliased(module: nn.Module, alias: Aliases) -> Iterator[None]:
    """Within the block the trainable parameters within the module are their aliases."""
    found = [(m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None]
    try:
        for owner, name, parameter in found:
            vars(owner)[name] = alias(parameter)
        yield
    finally:
        for owner, name, _ in found:
            vars(owner).pop(name, None)
