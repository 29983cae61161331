"""Outputs of a model: classes of one softmax, independent labels, or values; declared or detected."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from craft_optim._warn import warn

from .kinds import Output, OutputError, Question, named
from .masks import places_of, rows
from .passes import logits_of
from .pieces import LogitRows, rows_at
from .structure import Inputs

__all__ = [
    "FEATURES",
    "Outputs",
    "Rows",
    "feature",
    "if_grown",
    "rows_of",
    "rows_where",
    "whole",
]

# Names of the features that hold an output of each kind
FEATURES: dict[str, tuple[str, ...]] = {
    "classes": ("logprobs", "topk_logprobs", "topk_indices", "rest_logprob"),
    "labels": ("logits",),
    "values": ("values",),
}

_MANY = {"labels": 32, "classes": 128}  # that many logits are hardly all in [0, 1] by chance
_FORWARD = "pass a `forward=` that returns such a tensor, or output=None and `layers`."


class Rows(NamedTuple):
    """One output of a batch.

    Attributes:
        values: `[positions, V]` at the valid positions, or at all; classes may be those of a head that has not run.
        shape: Shape of all positions, the anchors first.
    """

    values: LogitRows
    shape: tuple[int, ...]


def rows_of(x: Tensor, valid: Tensor | None) -> Rows:
    """Rows of `[B, ..., V]` at the valid positions, if the mask fits their shape, else at all."""
    shape = tuple(x.shape[:-1])
    fits = valid is not None and tuple(valid.shape) == shape
    return Rows(rows(x, valid if fits else None), shape)


def rows_where(output: Rows, valid: Tensor | None) -> LogitRows:
    """Rows of an output that `valid`, on the CPU, selects among all positions; None selects all.

    Raises:
        ValueError: The mask has another shape than the positions.
    """
    places = places_of(valid, output.shape)
    return output.values if places is None else rows_at(output.values, places)


def feature(name: str, head: str) -> str:
    """Name of a feature of the named output `head`; "" is the only one."""
    return f"{name}.{head}" if head else name


class Outputs:
    """The outputs of a model that are wanted, by name; "" is the name of the only one.

    The first call detects their kinds; later outputs must be alike.

    Args:
        model: The model; its config is read if it is a model of transformers.
        kinds: "auto", a kind, or name -> kind; a name is a key or attribute of the model's output, or a place of a
            tuple.
        dims: Dimension of the classes, for all or by name; None to detect it.
        known: Outputs that were detected before.
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: str | Mapping[str, str],
        dims: int | Mapping[str, int] | None = None,
        known: Mapping[str, Output] | None = None,
    ) -> None:
        self._model = model
        self._kinds = dict(kinds) if isinstance(kinds, Mapping) else {"": kinds}
        self._dims = {name: dims.get(name) if isinstance(dims, Mapping) else dims for name in self._kinds}
        self.known: dict[str, Output] = dict(known or {})
        self._range: dict[str, tuple[int, float, float]] = {}  # count, least and largest value of the first

    @property
    def names(self) -> list[str]:
        """Names of the outputs."""
        return list(self._kinds)

    @property
    def kinds(self) -> list[str]:
        """The declared kinds of the outputs."""
        return list(self._kinds.values())

    def one_softmax(self, ndim: int) -> bool:
        """True if the only output is classes, in the dimension after `ndim` others."""
        only = self.known.get("")
        return only is not None and only.kind == "classes" and only.dim == ndim

    def __call__(self, output: Any, inputs: Inputs, size: int | None, valid: Tensor | None = None) -> dict[str, Tensor]:
        """The outputs `[B, ..., V]`, by name.

        Args:
            output: Result of the model or of a `forward`.
            inputs: Batch that it was run on.
            size: Number of anchors; None if unknown.
            valid: Mask of positions, if any.

        Raises:
            OutputError: An output is missing, is not a float tensor of that many anchors, differs in kind from before,
                or is of unclear kind.
        """
        found = {}
        for name, kind in self._kinds.items():
            x = self._picked(output, name, size)
            known = self.known.get(name)
            if known is None:
                known = Question(self._model, x, name, inputs, valid).answer(kind, self._dims[name])
                if known.kind != "values":
                    self._range[name] = 0, torch.inf, -torch.inf
            elif known.dim > x.ndim or known.arranged(x).shape[-1] != known.size:
                raise OutputError(
                    f"The model gives {named(name)}{tuple(x.shape)}, where dimension {known.dim} had "
                    f"{known.describe()} before: another model, or another `forward=`."
                    f"{if_grown(tuple(x.shape), known, inputs)}"
                )
            self.known[name] = known
            found[name] = known.arranged(x)
            if name in self._range:
                self._warn_of_probabilities(name, x, known.kind)
        return found

    def _warn_of_probabilities(self, name: str, x: Tensor, kind: str) -> None:
        if not x.numel():
            return
        count, low, high = self._range[name]
        count, low, high = count + x.numel(), min(low, float(x.detach().min())), max(high, float(x.detach().max()))
        self._range[name] = count, low, high
        if low < 0.0 or high > 1.0 or count >= _MANY[kind]:
            del self._range[name]
            # A head that is zero at first gives constants, an untrained one small numbers
            if 0.0 <= low < high <= 1.0 and high > 0.5:
                warn(
                    f"All {count} numbers of the output {named(name)}{tuple(x.shape)} are in [0, 1]. "
                    f"{kind.capitalize()} are taken for logits: if these are probabilities, pass a `forward=` that "
                    "leaves the sigmoid or softmax out.",
                )

    def _picked(self, output: Any, name: str, size: int | None) -> Tensor:
        at = _at(output, name) if name else logits_of(output)
        x = at if isinstance(at, Tensor) else None
        if x is None or not x.is_floating_point() or x.ndim == 0 or (size is not None and len(x) != size):
            what = f"its output {name!r}" if name else "its output, a tensor or `.logits`,"
            anchors = "" if size is None else f" with B = {size} anchors"
            if name and at is not None:
                instead = f"{_in_words(at)} there: {_FORWARD}"
            elif name and isinstance(output, Tensor):
                kind = self._kinds[name]
                instead = f"one tensor, {_in_words(output)}: leave its name out, output={kind!r}."
            else:
                instead = f"{_in_words(output if x is None else x)}: {_remedy_of_form(output if x is None else x)}"
            raise OutputError(f"The model must give {what} as floating numbers [B, ...]{anchors}. Found {instead}")
        return whole(x)


def whole(x: Tensor) -> Tensor:
    """The tensor itself, or all of one that tensor parallelism has split."""
    gather = getattr(x, "full_tensor", None)
    return x if gather is None else cast(Tensor, gather())


def if_grown(shape: tuple[int, ...], known: Output, inputs: Any) -> str:
    """Advice in words if an output of this shape has more classes than before."""
    if known.dim >= len(shape) or shape[known.dim] <= known.size:
        return ""
    called = "batch" if isinstance(inputs, Tensor) else "**batch" if isinstance(inputs, dict) else "*batch"
    logits = f"model({called}).logits" if isinstance(inputs, dict) else f"model({called})"
    last = known.dim == len(shape) - 1
    part = f"[..., :{known.size}]" if last else f".narrow({known.dim}, 0, {known.size})"
    return (
        " If it has grown since, by new tokens or new classes, compare those that there were: "
        f"Reading(forward=lambda model, batch: {logits}{part}, class_dim={-1 if last else known.dim})."
    )


def _at(output: Any, name: str) -> Any:
    """The model's output with that name: a key, a place or an attribute; None if there is none."""
    if isinstance(output, Tensor):  # its attributes, such as `T`, are not the model's
        return None
    if isinstance(output, Mapping):
        x = output.get(name)
    elif isinstance(output, tuple | list) and name.isdecimal():
        x = output[int(name)] if int(name) < len(output) else None
    else:
        x = None
    return getattr(output, name, None) if x is None else x


def _in_words(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    if isinstance(x, Mapping):
        return f"{type(x).__name__} of {', '.join(map(str, x))}"
    if isinstance(x, tuple | list):
        return f"{type(x).__name__} of {', '.join(map(_in_words, x))}" if len(x) < 9 else f"{len(x)} entries"
    return type(x).__name__


def _remedy_of_form(x: Any) -> str:
    parts = x if isinstance(x, Mapping) else dict(enumerate(x)) if isinstance(x, tuple | list) else {}
    heads = [str(name) for name, part in parts.items() if isinstance(part, Tensor) and part.is_floating_point()]
    if heads := [name for name in heads if _at(x, name).ndim]:
        example = ", ".join(f'"{name}": "classes"' for name in heads[:2])
        return (
            "say what its parts are, output={" + example + ', ...}, each "classes", "labels" or "values", pass a '
            "`forward=` that returns one tensor, or output=None and `layers`."
        )
    return _FORWARD
