"""What a model gives: classes of one softmax, labels of their own, or values. Found out, or asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from craft_optim._warn import warn

from .masks import rows
from .names import base_model
from .passes import logits_of
from .structure import Inputs

__all__ = [
    "FEATURES",
    "KINDS",
    "Kind",
    "Output",
    "OutputError",
    "Outputs",
    "Rows",
    "feature",
    "if_grown",
    "rows_of",
    "whole",
]

Kind = Literal["classes", "labels", "values"]
KINDS = get_args(Kind)

# Names of the features that hold an output of each kind
FEATURES: dict[str, tuple[str, ...]] = {
    "classes": ("logprobs", "topk_logprobs", "topk_indices", "rest_logprob"),
    "labels": ("logits",),
    "values": ("values",),
}

# Ends of the names of transformers' classes whose logits have the classes last
_CLASSES_LAST = (
    "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForCTC", "LMHeadModel",
)  # fmt: skip
_MANY = 16  # so many logits are hardly in [0, 1] by chance
_FORWARD = "pass a `forward=` that returns such a tensor, or output=None and `layers`."
_BY_PROBLEM = {"single_label_classification": "classes", "multi_label_classification": "labels", "regression": "values"}


class OutputError(ValueError):
    """The output is not what was said of it, or nobody has said what it is."""


@dataclass(frozen=True)
class Output:
    """One output of a model.

    Attributes:
        kind: "classes": logits of one categorical distribution; "labels": a logit for each independent label;
            "values": numbers.
        dim: Dimension of its classes, labels or channels, >= 1; one beyond the last where each position has one number.
        size: Its size in that dimension.
    """

    kind: Kind
    dim: int
    size: int

    def arranged(self, x: Tensor) -> Tensor:
        """`x` with that dimension as the last."""
        return x.unsqueeze(-1) if self.dim == x.ndim else x.movedim(self.dim, -1)

    def describe(self) -> str:
        """In words: "10 classes"."""
        one, more = {"classes": ("class", "classes"), "labels": ("label", "labels"), "values": ("channel", "channels")}[
            self.kind
        ]
        return f"{self.size} {one if self.size == 1 else more}"


class Rows(NamedTuple):
    """One output of a batch.

    Attributes:
        values: `[positions, V]`: those of the valid positions, or of all.
        shape: Shape of all positions, the anchors first.
    """

    values: Tensor
    shape: tuple[int, ...]


def rows_of(x: Tensor, valid: Tensor | None) -> Rows:
    """`[B, ..., V]` at the valid positions, if the mask has their shape; else at all."""
    shape = tuple(x.shape[:-1])
    fits = valid is not None and tuple(valid.shape) == shape
    return Rows(rows(x, valid if fits else None), shape)


def feature(name: str, head: str) -> str:
    """Name of a feature of an output that has a name of its own; "" is the only one."""
    return f"{name}.{head}" if head else name


class Outputs:
    """The outputs of a model that are wanted, by name; "" is the name of the only one.

    The first call finds out what they are; later ones must be alike.

    Args:
        model: As given; its config is asked, where it is a model of transformers.
        kinds: "auto", a kind, or name -> kind: a key or attribute of what the model returns, or a place of a tuple.
        dims: Dimension of the classes, for all or by name; None to find out.
        known: Those that were found out before.
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
        self._range: dict[str, tuple[int, float, float]] = {}  # count, least and largest of the first

    @property
    def names(self) -> list[str]:
        """Names of the outputs."""
        return list(self._kinds)

    @property
    def kinds(self) -> list[str]:
        """What they were said to be."""
        return list(self._kinds.values())

    def one_softmax(self, ndim: int) -> bool:
        """True if the only output is classes, which come after that many dimensions."""
        only = self.known.get("")
        return only is not None and only.kind == "classes" and only.dim == ndim

    def __call__(self, output: Any, inputs: Inputs, size: int | None, valid: Tensor | None = None) -> dict[str, Tensor]:
        """The outputs `[B, ..., V]`, by name.

        Args:
            output: What the model, or a `forward`, returned.
            inputs: What it was run on.
            size: Number of anchors; None if it is not known.
            valid: The mask of positions, if there is one.

        Raises:
            OutputError: One is missing, is no float tensor of that many anchors, is another than before, or cannot be
                told.
        """
        found = {}
        for name, kind in self._kinds.items():
            x = self._picked(output, name, size)
            known = self.known.get(name)
            if known is None:
                known = _Question(self._model, x, name, inputs, valid).answer(kind, self._dims[name])
                if known.kind != "values":
                    self._range[name] = 0, torch.inf, -torch.inf
            elif known.dim > x.ndim or known.arranged(x).shape[-1] != known.size:
                raise OutputError(
                    f"The model gives {_named(name)}{tuple(x.shape)}, where dimension {known.dim} had "
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
        if low < 0.0 or high > 1.0 or count >= _MANY:
            del self._range[name]
            # Constant is a head that is zero at first; small numbers are an untrained one's
            if 0.0 <= low < high <= 1.0 and high > 0.5:
                warn(
                    f"All {count} numbers of the output {_named(name)}{tuple(x.shape)} are in [0, 1]. "
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
    """The tensor itself; of one that tensor parallelism has split, all of it."""
    gather = getattr(x, "full_tensor", None)
    return x if gather is None else cast(Tensor, gather())


def if_grown(shape: tuple[int, ...], known: Output, inputs: Any) -> str:
    """What to do if an output of this shape has more classes than before, in words."""
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
    """What the model returned by that name: a key, a place or an attribute; None if there is nothing."""
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


def _named(name: str) -> str:
    return f"{name!r} as " if name else ""


class _Question:
    """What an output is, as far as its shape, its numbers and the model's config tell."""

    def __init__(self, model: nn.Module, x: Tensor, name: str, inputs: Inputs, valid: Tensor | None) -> None:
        self.x, self.name = x, name
        self.inputs = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
        self.one_each = x.ndim == 1 or (valid is not None and valid.shape == x.shape)  # a number for each position?
        self.few = x.detach()[:4].float()
        self.model = base_model(model)

    def answer(self, kind: str, dim: int | None) -> Output:
        """Raises OutputError if there is none."""
        x, told = self.x, dim is not None
        if kind == "auto":
            kind, dim = ("classes", dim) if told else self._found()
        if kind == "classes":
            dim = self._class_dim() if dim is None else self._in_range(dim)
            self._check_classes(dim)
            if told:
                self._warn_of_places(dim, "classes")
        elif told and dim is not None:
            dim = dim if self.one_each and dim == x.ndim else self._in_range(dim)
        elif self.one_each and not self._of_anchors():
            dim = x.ndim
        elif kind == "labels":
            dim = x.ndim - 1
        else:  # channels stand where torch has them
            dim = 2 if x.ndim == 3 else 1
            self._warn_of_places(dim, "channels")
        if kind == "labels" and self._normalised() is not None:
            raise OutputError(
                f"Labels must be logits. Found log-probabilities of one softmax, {_named(self.name)}{tuple(x.shape)}: "
                'say output="classes", or pass a `forward=` that returns the logits.'
            )
        return Output(cast(Kind, kind), dim, 1 if dim == x.ndim else x.shape[dim])

    def _in_range(self, dim: int) -> int:
        ndim = self.x.ndim
        if not -ndim < dim < ndim or dim == 0:
            raise OutputError(
                f"`class_dim` must be a dimension of the output {tuple(self.x.shape)} other than the first, the "
                f"anchors. Found class_dim={dim}."
            )
        return dim % ndim

    def _class_dim(self) -> int:
        """Of classes that were asked for by that name."""
        by_values = self._normalised()
        if by_values is not None:
            return by_values
        found = self._by_config()
        if found is not None and found[0] == "classes" and found[1] is not None:
            return self._in_range(found[1])
        if self.x.ndim > 3:
            raise OutputError(self._unclear("does not say which dimension has the classes"))
        return max(self.x.ndim - 1, 1)

    def _found(self) -> tuple[str, int | None]:
        found = self._by_config()
        if found is None and (dim := self._normalised()) is not None:
            found = "classes", dim
        if found is None and self._is_over_vocabulary():
            found = "classes", -1
        if found is None:
            raise OutputError(self._unclear("does not say what they are"))
        return found

    def _by_config(self) -> tuple[str, int | None] | None:
        """Kind and dimension by what transformers knows of its models."""
        config, kind = getattr(self.model, "config", None), type(self.model).__name__
        if config is None or not hasattr(config, "to_dict"):
            return None
        last, labels = self.x.shape[-1], getattr(config, "num_labels", None)
        if kind.endswith("ForSemanticSegmentation"):
            return ("classes", 1) if self.x.ndim == 4 and self.x.shape[1] == labels else None
        if kind.endswith("ForTokenClassification"):
            return ("classes", -1) if last == labels and last > 1 else None
        if kind.endswith("Classification"):
            problem = _BY_PROBLEM.get(str(getattr(config, "problem_type", None)))
            if last != labels or self.x.ndim != 2:
                return None
            if problem is None and last > 1:  # so do transformers' pipelines
                problem = "classes"
            return None if problem is None else (problem, -1 if problem == "classes" else None)
        if any(kind.endswith(end) for end in _CLASSES_LAST):
            vocabulary = getattr(config.get_text_config(), "vocab_size", None)
            return ("classes", -1) if self.x.ndim == 3 and last == vocabulary else None
        return None

    def _normalised(self) -> int | None:
        """The dimension along which the numbers are log-probabilities; None if there is none, or more than one."""
        x, rounding = self.few, 1e-3 if self.x.dtype in (torch.float32, torch.float64) else 2e-2
        if x.numel() == 0 or float(x.max()) > rounding:
            return None
        dims = [d for d in range(1, x.ndim) if x.shape[d] > 1 and float(x.logsumexp(d).abs().max()) < rounding]
        return dims[0] if len(dims) == 1 else None

    def _is_over_vocabulary(self) -> bool:
        """True if integers [B, T] go in, and as many numbers come out of each as there are different ones."""
        if self.x.ndim != 3:
            return False
        tokens = any(not x.is_floating_point() and x.shape == self.x.shape[:2] for x in self.inputs)
        sizes = {m.num_embeddings for m in self.model.modules() if isinstance(m, nn.Embedding)}
        widths = {m.embedding_dim for m in self.model.modules() if isinstance(m, nn.Embedding)}
        return tokens and self.x.shape[-1] in sizes - widths

    def _of_anchors(self) -> bool:
        """True if numbers of the mask's shape [B, T] are T of each anchor, and not one of each position."""
        if self.x.ndim != 2 or self.x.shape[1] < 2:
            return False
        size, kind = self.x.shape[1], type(self.model).__name__
        if kind.endswith("Classification") and not kind.endswith("TokenClassification"):
            return bool(size == getattr(getattr(self.model, "config", None), "num_labels", None))
        if any(m.out_features == size for m in self.model.modules() if isinstance(m, nn.Linear)):
            raise OutputError(
                f"The model gives {_named(self.name)}numbers {tuple(self.x.shape)}: one of each of the mask's "
                f"positions, or {size} of each anchor? Pass a `forward=` that returns {(*self.x.shape, 1)} in the "
                f"first case, {(len(self.x), 1, size)} in the second."
            )
        return False

    def _check_classes(self, dim: int) -> None:
        shape, few = tuple(self.x.shape), self.few
        if dim == len(shape) or shape[dim] < 2:
            raise OutputError(
                f"Classes must be two or more. Found one in the output {shape}: its softmax is 1 whatever the model "
                f"does, and a drift of 0 would say nothing. {self._remedies()}"
            )
        if float(few.min()) >= 0.0 and bool(((few.sum(dim) - 1.0).abs() < 1e-2).all()):
            raise OutputError(
                f"Classes must be logits or log-probabilities. Found probabilities: the output {shape} sums to 1 along "
                f"dimension {dim}. Pass a `forward=` that leaves the softmax out, or takes the logarithm."
            )

    def _warn_of_places(self, dim: int, what: str) -> None:
        shape = self.x.shape
        if dim > 1 and any(x.is_floating_point() and _same_places(x.shape, shape) for x in self.inputs):
            warn(
                f"Dimension {dim} of the output {_named(self.name)}{tuple(shape)} is taken for {shape[dim]} {what}, "
                "and has the input's size or a part of it, as have rows or columns of a picture, or times of a series. "
                f"Is it class_dim=1, {shape[1]} {what}?",
            )

    def _unclear(self, problem: str) -> str:
        return f"The model gives {_named(self.name)}numbers {tuple(self.x.shape)} and {problem}. {self._remedies()}"

    def _remedies(self) -> str:
        shape, ndim = self.x.shape, self.x.ndim
        one = 'output="labels"' if not self.name else f'output={{"{self.name}": "labels", ...}}'
        ways = []
        dim = 1 if ndim > 3 else -1
        if ndim > 1 and shape[dim] > 1:
            ways.append(f"class_dim={dim} if its {shape[dim]} entries are classes of one softmax (cross-entropy)")
        ways.append(f"{one} if every number is the logit of a label of its own (binary cross-entropy)")
        ways.append(f"{one.replace('labels', 'values')} if they are values: a regression, a denoiser, an embedding")
        return f"Pass to `build`, or set in the Reading: {'; '.join(ways)}."


def _same_places(given: Sequence[int], found: Sequence[int]) -> bool:
    """True if [B, C, places...] come out of [B, C', places...], also of fewer places, as convolutions make them."""
    if not len(given) == len(found) > 2:
        return False
    if len(found) == 3:  # [B, T, D] has the same T and perhaps the same D
        return given[2] == found[2] and given[1] != found[1]
    return all(x * found[2] == y * given[2] for x, y in zip(given[2:], found[2:], strict=True))
