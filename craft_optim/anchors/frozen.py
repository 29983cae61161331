"""Outputs of modules that do not train, such as a vision tower: constants of the anchors, recorded once and replayed.

At build time, and in the first pass of a process, the modules run:

    with recorded(model, names) as calls:
        ...a forward on anchors
    stored = leaves(calls, size)  # what goes into the cache
    forms = forms_of(calls)  # what does not: how the outputs are put together

From then on they do not:

    with replayed(model, stored, forms):
        ...a forward on the same anchors
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .names import modules_by_name, plain_name
from .passes import device_of, eager, saving_hooks

__all__ = [
    "Calls",
    "Form",
    "forms_of",
    "leaves",
    "other_forwards",
    "recorded",
    "replayed",
    "resolve_frozen",
    "trains",
]

Calls = Mapping[str, list[Any]]

_CONSTANTS = (type(None), bool, int, float, str)


class Form(NamedTuple):
    """Form of the output of one call.

    Attributes:
        tree: Tree of tuples, dicts and output classes, as torch has it.
        parts: For each leaf, a tensor's dtype or the leaf itself.
    """

    tree: pytree.TreeSpec
    parts: tuple[Any, ...]


def trains(module: nn.Module) -> bool:
    """True if the module's output may change in training, so that it must run.

    It may if a parameter requires gradients, or if a normalisation keeps running statistics: the task's forwards change
    these without gradients. Buffers that other modules change are not detected.
    """
    return any(p.requires_grad for p in module.parameters()) or any(
        isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats for m in module.modules()
    )


def resolve_frozen(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Plain name -> module.

    Raises:
        ValueError: A name names no module, or the whole model, or comes twice, or one module is within another.
    """
    named, found = modules_by_name(model), dict[str, nn.Module]()
    for name in names:
        plain = plain_name(name)
        if name not in named or not plain:
            raise ValueError(f"`frozen` must be names of modules within the model. There is no module {name!r}.")
        if plain in found:
            raise ValueError(f"`frozen` must be different modules. {name!r} comes twice.")
        found[plain] = named[name]
    for outer in found:
        if inner := [name for name in found if name.startswith(f"{outer}.")]:
            raise ValueError(f"`frozen` must not name a module and parts of it: {inner[0]!r} is within {outer!r}.")
    return found


@contextmanager
def other_forwards(modules: Mapping[str, nn.Module], make: Callable[[str, Any], Callable[..., Any]]) -> Iterator[None]:
    """Replaces each module's forward by `make(name, its own)` within the block; hooks on the module still fire."""
    before = {name: vars(module).get("forward") for name, module in modules.items()}  # some wrappers set one, too
    try:
        for name, module in modules.items():
            vars(module)["forward"] = make(name, module.forward)
        with eager():  # compiled code has the modules' own
            yield
    finally:
        for name, module in modules.items():
            vars(module).pop("forward", None)
            if before[name] is not None:
                vars(module)["forward"] = before[name]


def _refuse_gradients(name: str, args: Any) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in pytree.tree_leaves(args)):
        raise ValueError(
            f"The output of {name!r} is not a constant of the anchors: its input requires gradients, so that it "
            "depends on what trains. Leave it out of `frozen`."
        )


@contextmanager
def recorded(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Any]]]:
    """Makes forwards within the block fill the yielded dict: plain name -> one output per call.

    Outputs are copies: some models change outputs of their parts in place.

    Args:
        model: The unmodified model; each module's own forward is restored at the end, also after an error.
        names: Names of modules that are called, none within another.

    Raises:
        ValueError: See `resolve_frozen`; or, in the forward, an input of a module requires gradients.
        TypeError: In the forward: an output holds something that is neither a tensor nor a plain constant.
    """
    modules = resolve_frozen(model, names)
    calls: dict[str, list[Any]] = {name: [] for name in modules}

    def copy(name: str, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone()
        if not isinstance(leaf, _CONSTANTS):
            raise TypeError(
                f"{name!r} returns a {type(leaf).__name__}, which cannot be stored: name a module of `frozen` that "
                "returns tensors, or structures of them."
            )
        return leaf

    def make(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            _refuse_gradients(name, (args, kwargs))
            output = own(*args, **kwargs)
            calls[name].append(pytree.tree_map(lambda leaf: copy(name, leaf), output))
            return output

        return forward

    with other_forwards(modules, make):
        yield calls


def leaves(calls: Calls, size: int) -> dict[str, Tensor]:
    """The tensors of the recorded outputs, each `[size, ...]`: `frozen.<module>.<call>.<leaf>` -> tensor.

    Args:
        calls: Result of `recorded` for one forward.
        size: Number of anchors in it.

    Raises:
        ValueError: A module was not called, gave no tensor, or one whose first dimension is not the anchors.
    """
    named: dict[str, Tensor] = {}
    for name, outputs in calls.items():
        found = {
            _key(name, number, place): leaf
            for number, output in enumerate(outputs)
            for place, leaf in enumerate(pytree.tree_leaves(output))
            if isinstance(leaf, Tensor)
        }
        if not found:
            raise ValueError(
                f"The forward never calls {name!r}, or gets no tensor from it: leave it out of `frozen`, or name the "
                "module that is called."
            )
        for key, leaf in found.items():
            if leaf.ndim == 0 or len(leaf) != size:
                raise ValueError(
                    f"The first dimension of what a module of `frozen` returns must be the {size} anchors. Found "
                    f"{tuple(leaf.shape)} of {name!r} ({key}): leave it out, or name another module."
                )
        named |= found
    return named


def forms_of(calls: Calls) -> dict[str, list[Form]]:
    """Forms that `replayed` needs besides the tensors: plain name -> one for each call."""
    forms: dict[str, list[Form]] = {}
    for name, outputs in calls.items():
        forms[name] = []
        for output in outputs:
            parts, tree = pytree.tree_flatten(output)
            forms[name].append(Form(tree, tuple(x.dtype if isinstance(x, Tensor) else x for x in parts)))
    return forms


def _key(name: str, number: int, place: int) -> str:
    return f"frozen.{name}.{number}.{place}"


@contextmanager
def replayed(model: nn.Module, stored: Mapping[str, Tensor], forms: Mapping[str, list[Form]]) -> Iterator[None]:
    """Makes modules return stored outputs within the block instead of running; modules that train now still run.

    They return copies, on the device of the module's input and in the recorded dtype. A call within a non-reentrant
    activation checkpoint still runs: its second run, in the backward, must equal the first.

    Args:
        model: The unmodified model; each module's own forward is restored at the end, also after an error.
        stored: Result of `leaves` for the anchors in the forward, in any floating dtype, on any device. Other keys are
            ignored.
        forms: Forms from a forward with the same calls. A module that this forward did not reach is not replayed.

    Raises:
        ValueError: The stored tensors are not those of the forms; or, in the forward, a module is called more often
            than it was recorded, or its input requires gradients.
    """
    resolved = resolve_frozen(model, forms)
    modules = {name: module for name, module in resolved.items() if forms[name] and not trains(module)}
    for name in modules:
        expected = {
            _key(name, number, place)
            for number, form in enumerate(forms[name])
            for place, part in enumerate(form.parts)
            if isinstance(part, torch.dtype)
        }
        # A module's name may begin another's: two numbers follow it
        found = {key for key in stored if key.rsplit(".", 2)[0] == f"frozen.{name}"}
        if found != expected:
            raise ValueError(
                f"The stored outputs of {name!r} are {sorted(found)}, but this forward has {sorted(expected)}: another "
                "model or another `forward=` than in `build`."
            )

    outside = saving_hooks()

    def make(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        done = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            _refuse_gradients(name, (args, kwargs))
            if done == len(forms[name]):
                raise ValueError(
                    f"The forward calls {name!r} more often than the {done} times that were recorded: another "
                    "`forward=` than in `build`, or several forwards in one pass."
                )
            tree, parts = forms[name][done]
            done += 1
            if saving_hooks() != outside:
                return own(*args, **kwargs)
            device = next(
                (x.device for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)),
                device_of(modules[name]),
            )
            values = [
                stored[_key(name, done - 1, place)].to(device, part, non_blocking=True, copy=True)
                if isinstance(part, torch.dtype)
                else part
                for place, part in enumerate(parts)
            ]
            return pytree.tree_unflatten(values, tree)

        return forward

    with other_forwards(modules, make):
        yield
