"""Floats: the optimizer's own state, named `craft_*` in every parameter group of the base; any checkpoint keeps it.

A base with floats of another CraftOptimizer of this process starts anew when it is wrapped again: they belong to a run
that has ended. `load_state_dict` restores state, and makes other groups.
"""

import weakref
from collections.abc import Iterable, Mapping
from operator import is_
from typing import Any

import torch

__all__ = ["are_complete", "begin_anew", "check_owner", "complete", "write"]

# Base -> the groups that have all floats.
_WRITTEN: "weakref.WeakKeyDictionary[torch.optim.Optimizer, list[dict[str, Any]]]" = weakref.WeakKeyDictionary()


# Base -> the CraftOptimizer that was made around it last.
_OWNERS: "weakref.WeakKeyDictionary[torch.optim.Optimizer, weakref.ref[Any]]" = weakref.WeakKeyDictionary()


def begin_anew(base: torch.optim.Optimizer, owner: object) -> None:
    """Removes the floats of an earlier CraftOptimizer of this process, which may not step from now on."""
    _OWNERS[base] = weakref.ref(owner)
    # Groups passed on to another base are known, too
    known = {id(group) for written in _WRITTEN.values() for group in written}
    if any(id(group) in known for group in base.param_groups):
        for group in base.param_groups:
            _remove(group, [key for key in group if key.startswith("craft_")])


def check_owner(base: torch.optim.Optimizer, owner: object) -> None:
    """Raises RuntimeError if the base has been wrapped again: two would share step, multiplier and position."""
    last = _OWNERS[base]() if base in _OWNERS else None
    if last is None:  # a copy, unpickled, or the other is deleted
        _OWNERS[base] = weakref.ref(owner)
    elif last is not owner:
        raise RuntimeError(
            "Another CraftOptimizer has been made around this base optimizer since, with a state of its own. Step "
            "that one, or make a base of its own for each."
        )


def are_complete(base: torch.optim.Optimizer) -> bool:
    """True unless the base has other groups than the completed ones."""
    groups, written = base.param_groups, _WRITTEN.get(base, [])
    same = len(groups) == len(written) and all(map(is_, groups, written))
    return same and all("craft_step" in group for group in groups)


def complete(base: torch.optim.Optimizer, initial: Mapping[str, float], *, keep_named: bool) -> None:
    """Gives every group all floats: each from the first group that has it, else its initial value.

    A base restored from our checkpoint before it is wrapped thus continues from there.

    Args:
        base: The base.
        initial: All floats before the first step.
        keep_named: True to keep floats of constraints whose names are unknown now.
    """
    groups = base.param_groups
    # torch.distributed.checkpoint restores nothing of an empty group, though it may be the first
    present = {key: float(group[key]) for group in reversed(groups) for key in initial if key in group}
    for group in groups:
        ours = [key for key in group if key.startswith("craft_") and not ("/" in key and keep_named)]
        _remove(group, set(ours) - set(initial))
        if not group["params"]:  # nor the base's own settings, which the base still reads
            for name, value in base.defaults.items():
                group.setdefault(name, value)
    write(base, {**initial, **present})
    _WRITTEN[base] = list(groups)


def write(base: torch.optim.Optimizer, state: Mapping[str, float]) -> None:
    """Writes floats into every group."""
    for group in base.param_groups:
        group.update(state)


def _remove(group: dict[str, Any], keys: Iterable[str]) -> None:
    for key in keys:
        del group[key]
