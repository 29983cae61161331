"""Structure of a batch: named tensors from a batch, and back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Flat", "Inputs", "Lengths", "Structure", "anchors_of", "cut", "flatten", "map_tensors", "model_inputs"]

Inputs = Tensor | tuple[Tensor | None, ...] | dict[str, Tensor]
Lengths = Callable[[Any], Mapping[str, Tensor | Sequence[int]]]

_TOKENIZE = 'tokenize texts first, such as tokenizer(texts, return_tensors="pt", padding=True)'


@dataclass(frozen=True)
class Structure:
    """Form of a batch: its kind, and the names of its tensors.

    Attributes:
        kind: "tensor", "tuple" or "mapping".
        names: One per stored tensor: "0", "1", ... by place, or the mapping's keys.
        skipped: Places of None in a tuple, or keys of values in a mapping that are not tensors.
        ragged: Names of tensors that hold the rows of all anchors, one anchor after another.
    """

    kind: str
    names: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    ragged: tuple[str, ...] = ()

    def rebuild(self, tensors: Mapping[str, Tensor]) -> Inputs:
        """The batch in its original structure; skipped entries are None in a tuple and absent from a mapping.

        So are tensors without rows, as when no anchor of a batch has a picture.
        """
        if self.kind == "tensor":
            return tensors[self.names[0]]
        if self.kind == "tuple":
            return tuple(tensors.get(str(i)) for i in range(len(self.names) + len(self.skipped)))
        return {name: tensors[name] for name in self.names if name not in self.ragged or len(tensors[name])}


@dataclass(frozen=True)
class Flat:
    """A batch taken apart.

    Attributes:
        structure: Form of the batch.
        tensors: Tensors by name. The first dimension is the anchors, except in tensors with lengths.
        count: Number of anchors.
        lengths: Name -> rows of each anchor, int64 `[count]`, on the CPU.
        categories: Text of each anchor in a mapping's entry "category"; empty without one.
    """

    structure: Structure
    tensors: dict[str, Tensor]
    count: int
    lengths: dict[str, Tensor]
    categories: tuple[str, ...] = ()

    def anchors(self, first: int, last: int) -> "Flat":
        """The anchors from `first` to `last`, in the same memory."""
        lengths = {name: x[first:last] for name, x in self.lengths.items()}
        tensors = cut(self.tensors, first, last, self.lengths)
        return Flat(self.structure, tensors, last - first, lengths, self.categories[first:last])


def flatten(batch: Any, lengths: Lengths | Mapping[str, Tensor] | None = None) -> Flat:
    """Structure, named tensors and number of anchors of a batch.

    A batch is a tensor, a tuple or list of tensors, or a mapping from names to tensors. Entries of a mapping that are
    not tensors (task strings, None) are skipped and recorded; a tuple may hold None besides tensors. A mapping's entry
    "category" has a text for each anchor, or None for one without a category.

    Args:
        batch: The batch.
        lengths: Function as in `Reading`, or its result.

    Raises:
        TypeError: The batch, or an entry of it, has another type.
        ValueError: The tensors do not share a first dimension of at least 1, the anchors; lengths do not add up; or
            categories are not texts.
    """
    if isinstance(batch, Tensor):
        kind, entries = "tensor", [("0", batch)]
    elif isinstance(batch, Mapping):
        kind, entries = "mapping", [entry for entry in batch.items() if not _names_categories(*entry)]
    elif isinstance(batch, tuple | list):
        kind, entries = "tuple", [(str(i), value) for i, value in enumerate(batch)]
    else:
        raise _no_batch(batch)
    named: dict[str, Tensor] = {}
    skipped: list[str] = []
    for key, value in entries:
        if not isinstance(key, str):
            raise TypeError(f"The keys of a batch must be strings. Found {key!r} of type {type(key).__name__}.")
        if isinstance(value, Tensor):
            named[key] = value
        elif kind == "mapping" and _has_numbers(value):
            raise TypeError(
                f"The entries of a batch must be tensors. Found {type(value).__name__} of numbers in {key!r}: make it "
                "a tensor; of a tokenizer ask for return_tensors='pt' with padding=True."
            )
        elif kind == "mapping" or value is None:
            skipped.append(key)
        else:
            raise _not_in_a_tuple(key, value)
    if not named:
        hint = f": {_TOKENIZE}" if any(_is_text(value) for _, value in entries) else ""
        raise TypeError(f"A batch must hold at least one tensor. Found a {kind} with entries {skipped}{hint}.")
    for name, tensor in named.items():
        if tensor.ndim == 0 or tensor.layout != torch.strided:
            raise ValueError(
                f"Input {name!r} must be dense with the anchors as first dimension. Found shape "
                f"{tuple(tensor.shape)}, layout {tensor.layout}."
            )
    told = _told(_called(lengths, named if kind == "mapping" else batch) if callable(lengths) else lengths or {}, named)
    sizes = {name: len(x) for name, x in named.items() if name not in told} | {
        f"lengths of {name}": len(x) for name, x in told.items()
    }
    count = next(iter(sizes.values()))
    if count == 0 or any(size != count for size in sizes.values()):
        raise ValueError(
            f"All inputs must have the same first dimension, the anchors, and at least one of them. Found {sizes}: "
            "leave other tensors out of the batch and recreate them in `forward=`. If one holds the rows of all "
            "anchors one after another, as processors give pictures, pass Reading(lengths=...)."
        )
    structure = Structure(kind, tuple(named), tuple(skipped), tuple(x for x in named if x in told))
    return Flat(structure, named, count, told, _categories(batch, count))


def _names_categories(key: object, value: object) -> bool:
    """True for the entry "category" of a batch, unless it is a model input."""
    return key == "category" and not isinstance(value, Tensor)


def _categories(batch: Any, count: int) -> tuple[str, ...]:
    """Category of each anchor, an empty text if it has none; an empty tuple if the batch has none."""
    found = batch.get("category") if isinstance(batch, Mapping) else None
    if found is None or isinstance(found, Tensor) or (isinstance(found, list | tuple) and not any(found)):
        return ()
    texts = ["" if x is None else x for x in found] if not isinstance(found, str) else [found]
    if len(texts) != count or not all(isinstance(x, str) for x in texts):
        raise ValueError(
            f'The entry "category" of a batch must have a text for each of its {count} anchors, or None. Found '
            f"{found!r:.80}: rename it if it is something else."
        )
    return tuple(map(str, texts))


def _called(lengths: Lengths, batch: Any) -> Mapping[str, Tensor | Sequence[int]]:
    try:
        return lengths(batch)
    except KeyError as error:
        raise ValueError(
            f"`lengths` looks for {error}, and the batch has {[*batch]}: begin with a batch that has every input. "
            "Later ones may lack those of which they have no rows, such as pictures."
        ) from error


def _told(lengths: Mapping[str, Tensor | Sequence[int]], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The lengths, checked. All are zero for an input that the batch lacks, such as pictures."""
    told = {name: torch.as_tensor(x, device="cpu").long() for name, x in lengths.items()}
    for name, x in told.items():
        rows = len(named[name]) if name in named else 0
        if x.ndim != 1 or bool((x < 0).any()) or int(x.sum()) != rows:
            raise ValueError(
                f"`lengths` must give the numbers of rows of each anchor, in all the {rows} of input {name!r}. Found "
                f"{x.tolist()!s:.80}."
            )
    return told


def _no_batch(batch: Any) -> TypeError:
    hint = f": {_TOKENIZE}" if isinstance(batch, str) else ""
    return TypeError(f"A batch must be a tensor, a tuple or a mapping of tensors. Found {type(batch).__name__}{hint}.")


def _not_in_a_tuple(place: str, value: Any) -> TypeError:
    if _is_text(value):
        hint = _TOKENIZE
    elif isinstance(value, Mapping) or _has_numbers(value):
        hint = (
            "these look like single examples. Batch them, such as with DataLoader(examples, batch_size, collate_fn=...)"
        )
    else:
        hint = "use a mapping, where such entries are left out, or flatten it and pass `forward=`"
    return TypeError(f"A tuple batch must hold tensors or None. Found {type(value).__name__} at place {place}: {hint}.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and bool(value) and _is_text(value[0]))


def _has_numbers(value: Any) -> bool:
    """True for lists and arrays of numbers, which a model would miss."""
    if isinstance(value, np.ndarray):
        return bool(value.dtype.kind in "biufc")
    return isinstance(value, list | tuple) and any(
        isinstance(x, int | float | Tensor) or _has_numbers(x) for x in value
    )


def model_inputs(batch: Any) -> Any:
    """A collated batch as the model's arguments: unchanged, without texts and None in a mapping.

    Raises:
        TypeError: A model cannot be called with it.
    """
    if isinstance(batch, Mapping):
        inputs = {name: x for name, x in batch.items() if not (x is None or _is_text(x) or _names_categories(name, x))}
        if not inputs:
            hint = f": {_TOKENIZE}" if any(_is_text(x) for x in batch.values()) else ""
            raise TypeError(f"A batch must hold at least one tensor. Found a mapping with entries {[*batch]}{hint}.")
        return inputs
    if isinstance(batch, tuple | list):
        for place, value in enumerate(batch):
            if _is_text(value) or isinstance(value, Mapping):
                raise _not_in_a_tuple(str(place), value)
        return tuple(batch)
    if not callable(getattr(batch, "to", None)):  # a tensor, or a library's own batch, such as of graphs
        raise _no_batch(batch)
    return batch


def cut(
    tensors: Mapping[str, Tensor], first: int, last: int, lengths: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The anchors from `first` to `last`; their rows in tensors with `lengths`."""
    parts = {}
    for key, x in tensors.items():
        begin, end = first, last
        if lengths and key in lengths:
            begin, end = int(lengths[key][:first].sum()), int(lengths[key][:last].sum())
        parts[key] = x[begin:end]
    return parts


def anchors_of(inputs: Inputs, first: int, last: int, lengths: Mapping[str, Tensor]) -> Inputs:
    """The anchors from `first` to `last` of a batch in its structure."""
    if not lengths:
        part: Inputs = map_tensors(lambda x: x[first:last], inputs)
        return part
    flat = flatten(inputs, lengths)
    return flat.structure.rebuild(flat.anchors(first, last).tensors)


def map_tensors(function: Callable[[Any], Any], inputs: Any) -> Any:
    """The batch with `function` applied to each tensor, and to library objects that can be moved."""
    return pytree.tree_map(lambda x: function(x) if callable(getattr(x, "to", None)) else x, inputs)
