"""Wrapper: a torch optimizer around a base, which keeps its own groups, state and defaults. Knows no retention."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from craft_optim._tensors import copies_of

__all__ = ["Arguments", "Wrapper"]

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Arguments of a `step` besides the closure: by place, and by name"""

# By name: none of these libraries need be installed.
_WRAPPERS_OF_FRAMEWORKS = {
    "AcceleratedOptimizer": "Wrap before Accelerate does, `accelerator.prepare(model, CraftOptimizer(base, ...))`: it "
    "decides which micro-batches step, and retention would run on all of them",
    "LightningOptimizer": "Return CraftOptimizer(base, ...) from `configure_optimizers`",
    "DeepSpeedOptimizer": "DeepSpeed ZeRO keeps flattened copies of the parameters, which no retention backward "
    "reaches. Use DDP or FSDP2",
}


class Wrapper(torch.optim.Optimizer):
    """The `torch.optim.Optimizer` contract, kept on behalf of a base optimizer.

    Attributes:
        base_optimizer: The wrapped optimizer.

    Raises:
        TypeError: If `base_optimizer` is not an optimizer, or is wrapped already.
        ValueError: If two groups share a parameter.
    """

    # A GradScaler hands unscaling to an optimizer that says True; a fused base says it, but unscales too late for us.
    _step_supports_amp_scaling = False

    def __init__(self, base_optimizer: torch.optim.Optimizer) -> None:
        # `Optimizer.__init__` would copy the groups; they, the state and the defaults stay the base's own objects.
        _check_base(base_optimizer)
        self.base_optimizer = base_optimizer
        self._make_hooks()

    def _groups_changed(self) -> None:
        """Called when the base has other groups than before."""

    def _each_parameter(self) -> Iterator[Tensor]:
        return chain.from_iterable(group["params"] for group in self.base_optimizer.param_groups)

    def _step_base(self, closure: Callable[[], Any] | None, more: Arguments) -> Any:
        # `self.base_optimizer.step` and not its class's: a scheduler built on the base patches the instance.
        arguments = () if closure is None and not more[0] else (closure, *more[0])
        if not any(_global_hooks()):
            return self.base_optimizer.step(*arguments, **more[1])
        with _without_global_hooks():
            return self.base_optimizer.step(*arguments, **more[1])

    def _make_hooks(self) -> None:
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()
        self._optimizer_state_dict_pre_hooks = OrderedDict()
        self._optimizer_state_dict_post_hooks = OrderedDict()
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        self._patch_step_function()

    # torch declares these as attributes; here they are the base's own, also after frameworks rebind them.
    @property  # type: ignore[override]
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property  # type: ignore[override]
    def state(self) -> Any:
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    @property  # type: ignore[override]
    def defaults(self) -> dict[str, Any]:
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base_optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        # Only attributes that schedule-free bases and transformers' AdafactorSchedule need: a GradScaler would trust
        # the base's answers.
        if name in ("train", "eval", "_get_lr") and "base_optimizer" in self.__dict__:
            method = getattr(self.base_optimizer, name)
            return method if name == "_get_lr" else partial(self._switched, method)
        said = f"{type(self).__name__!r} object has no attribute {name!r}"
        base = self.__dict__.get("base_optimizer")
        if not name.startswith("_") and hasattr(base, name):
            said += (
                f". Its `base_optimizer` has, which knows nothing of retention. If {type(base).__name__} wraps an "
                "optimizer, let that be the CraftOptimizer: pass it `CraftOptimizer.bind(...)`, or an instance"
            )
        raise AttributeError(said)

    def _switched(self, train_or_eval: Callable[[], Any]) -> Any:
        """Switches the mode; removes the empty state entries that schedule-free bases make before a first step.

        torch's distributed checkpoint takes any entry for a complete state, and would load nothing into it.
        """
        result = train_or_eval()
        for p in [p for p, entry in self.state.items() if not entry]:
            del self.state[p]
        return result

    def _prime_base(self) -> Any:
        """Does a step on zeros, by which the base makes its state; schedule-free bases refuse it in eval mode."""
        base: Any = self.base_optimizer
        in_eval = any(group.get("train_mode") is False for group in self.param_groups)
        if in_eval:
            base.train()
        try:
            return self._step_base(None, ((), {}))
        except Exception as error:
            error.add_note(
                f"{type(base).__name__} cannot do a step on gradients that are zero. If this is torch's distributed "
                "checkpoint, which makes an optimizer's state by one and has set the learning rates to 0 for it: save "
                "optimizer.state_dict() with torch.save, and make the optimizer anew."
            )
            raise
        finally:
            if in_eval:
                base.eval()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients as the base does."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base; it takes part in retention from the next step."""
        self.base_optimizer.add_param_group(param_group)
        self._groups_changed()

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with the floats `craft_*` in every param group."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.base_optimizer.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, or a plain one of the base (lambda and step then start anew)."""
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        self.base_optimizer.load_state_dict(state_dict)
        self._groups_changed()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks and a scheduler's patch of `step` stay behind, as they do with torch's own optimizers.
        return _without_hooks(self.__dict__) | {"_of_base": _without_hooks(vars(self.base_optimizer))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's own optimizers leave attributes behind that some of them, such as LBFGS, cannot do without.
        of_base = state.get("_of_base", {})
        self.__dict__.update({name: value for name, value in state.items() if name != "_of_base"})
        for name in of_base.keys() - vars(self.base_optimizer).keys():
            setattr(self.base_optimizer, name, of_base[name])
        self._make_hooks()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Wrapper":
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        memo |= copies_of(x for entry in self.state.values() if isinstance(entry, dict) for x in entry.values())
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


def _without_hooks(attributes: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in attributes.items() if k != "step" and not k.startswith("_optimizer_")}


def _global_hooks() -> list[dict[int, Any]]:
    return [
        cast(dict[int, Any], torch_optimizer._global_optimizer_pre_hooks),
        cast(dict[int, Any], torch_optimizer._global_optimizer_post_hooks),
    ]


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Suspends hooks for all optimizers: they fire for the wrapper, not a second time for the base's step."""
    tables = _global_hooks()
    kept = [OrderedDict(table) for table in tables]
    for table in tables:
        table.clear()
    try:
        yield
    finally:
        for table, entries in zip(tables, kept, strict=True):
            added = OrderedDict(table)
            table.clear()
            table.update(entries)
            table.update(added)


def _check_base(base: object) -> None:
    for kind in type(base).__mro__:
        if kind.__name__ in _WRAPPERS_OF_FRAMEWORKS:
            remedy = _WRAPPERS_OF_FRAMEWORKS[kind.__name__]
            raise TypeError(f"`base_optimizer` must be a plain optimizer. Found {type(base).__name__}. {remedy}.")
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(
            "`base_optimizer` must be a torch.optim.Optimizer, such as torch.optim.AdamW(model.parameters()). "
            f"Found {type(base).__name__}."
        )
    if isinstance(base, Wrapper):
        raise TypeError(f"`base_optimizer` is a {type(base).__name__} already: wrap its `base_optimizer` instead.")
    seen: dict[int, int] = {}
    for i, group in enumerate(base.param_groups):
        for p in group["params"]:
            if seen.setdefault(id(p), i) != i:
                raise ValueError(
                    f"`base_optimizer` has a parameter of shape {tuple(p.shape)} in the groups {seen[id(p)]} and {i}: "
                    "it would be stepped twice. Put each parameter into one group."
                )
