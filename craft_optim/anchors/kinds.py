"""Kind of a model's output: declared, or detected from its shape, its numbers and the model's config."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from craft_optim._warn import warn

from .names import base_model
from .structure import Inputs

__all__ = ["KINDS", "Kind", "Output", "OutputError", "Question", "named"]

Kind = Literal["classes", "labels", "values"]
KINDS = get_args(Kind)

# Suffixes of transformers' classes whose logits have the classes last
_CLASSES_LAST = (
    "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "ForCTC", "LMHeadModel",
)  # fmt: skip
_BY_PROBLEM = {"single_label_classification": "classes", "multi_label_classification": "labels", "regression": "values"}


class OutputError(ValueError):
    """The output is not of the declared kind, or its kind is unknown."""


@dataclass(frozen=True)
class Output:
    """One output of a model.

    Attributes:
        kind: "classes": logits of one categorical distribution; "labels": a logit for each independent label;
            "values": numbers.
        dim: Dimension of the classes, labels or channels, >= 1; one beyond the last if each position has one number.
        size: Size in that dimension.
    """

    kind: Kind
    dim: int
    size: int

    def arranged(self, x: Tensor) -> Tensor:
        """`x` with the dimension `dim` moved to the end."""
        return x.unsqueeze(-1) if self.dim == x.ndim else x.movedim(self.dim, -1)

    def describe(self) -> str:
        """The output in words: "10 classes"."""
        one, more = {"classes": ("class", "classes"), "labels": ("label", "labels"), "values": ("channel", "channels")}[
            self.kind
        ]
        return f"{self.size} {one if self.size == 1 else more}"


def named(name: str) -> str:
    """The beginning of a message about an output: its name, if it has one."""
    return f"{name!r} as " if name else ""


class Question:
    """Detects an output's kind from its shape, its numbers and the model's config."""

    def __init__(self, model: nn.Module, x: Tensor, name: str, inputs: Inputs, valid: Tensor | None) -> None:
        self.x, self.name = x, name
        self.inputs = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)]
        self.one_each = x.ndim == 1 or (valid is not None and valid.shape == x.shape)  # a number for each position?
        self.few = x.detach()[:4].float()
        self.model = base_model(model)

    def answer(self, kind: str, dim: int | None) -> Output:
        """The output of that kind; raises OutputError if it cannot be."""
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
                f"Labels must be logits. Found log-probabilities of one softmax, {named(self.name)}{tuple(x.shape)}: "
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
        """Dimension of the classes, if the kind "classes" was requested."""
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
        """Kind and dimension as transformers defines its models."""
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
        """Dimension along which the numbers are log-probabilities; None if there is none, or more than one."""
        x, rounding = self.few, 1e-3 if self.x.dtype in (torch.float32, torch.float64) else 2e-2
        if x.numel() == 0 or float(x.max()) > rounding:
            return None
        dims = [d for d in range(1, x.ndim) if x.shape[d] > 1 and float(x.logsumexp(d).abs().max()) < rounding]
        return dims[0] if len(dims) == 1 else None

    def _is_over_vocabulary(self) -> bool:
        """True if inputs are integers [B, T], and each gives as many numbers as the vocabulary has entries."""
        if self.x.ndim != 3:
            return False
        tokens = any(not x.is_floating_point() and x.shape == self.x.shape[:2] for x in self.inputs)
        sizes = {m.num_embeddings for m in self.model.modules() if isinstance(m, nn.Embedding)}
        widths = {m.embedding_dim for m in self.model.modules() if isinstance(m, nn.Embedding)}
        return tokens and self.x.shape[-1] in sizes - widths

    def _of_anchors(self) -> bool:
        """True if numbers of the mask's shape [B, T] are T per anchor, not one per position."""
        if self.x.ndim != 2 or self.x.shape[1] < 2:
            return False
        size, kind = self.x.shape[1], type(self.model).__name__
        if kind.endswith("Classification") and not kind.endswith("TokenClassification"):
            return bool(size == getattr(getattr(self.model, "config", None), "num_labels", None))
        if any(m.out_features == size for m in self.model.modules() if isinstance(m, nn.Linear)):
            raise OutputError(
                f"The model gives {named(self.name)}numbers {tuple(self.x.shape)}: one of each of the mask's "
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
                f"Dimension {dim} of the output {named(self.name)}{tuple(shape)} is taken for {shape[dim]} {what}, "
                "and has the input's size or a part of it, as have rows or columns of a picture, or times of a series. "
                f"Is it class_dim=1, {shape[1]} {what}?",
            )

    def _unclear(self, problem: str) -> str:
        return f"The model gives {named(self.name)}numbers {tuple(self.x.shape)} and {problem}. {self._remedies()}"

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
    """True if [B, C', places...] become [B, C, places...], also with fewer places, as in convolutions."""
    if not len(given) == len(found) > 2:
        return False
    if len(found) == 3:  # [B, T, D] has the same T and perhaps the same D
        return given[2] == found[2] and given[1] != found[1]
    return all(x * found[2] == y * given[2] for x, y in zip(given[2:], found[2:], strict=True))
