"""Retention without a cache: the teacher runs in every pass, on the same anchors as the model."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from .bernoulli_retention import BernoulliRetention, bernoulli_term
from .cache import AnchorBatch, AnchorCache
from .kinds import OutputError
from .logit_retention import LogitRetention, kl_term
from .masks import valid_positions
from .output_retention import UNITS, values_term
from .outputs import Outputs, Rows, rows_of, rows_where
from .passes import call, device_of, is_compiled, isolated_rng, to_device
from .pieces import gathered, pieces_of
from .reading import AnchorMismatchError, Reading, require_functions, with_fields
from .retention import AnchorRetention, Anchors, Settings
from .sampling import mixed_seed, spread
from .structure import Inputs, model_inputs
from .teachers import adapters_off, find_adapters
from .valid_head import LinearHead, head_left_out, linear_head
from .variance import ChannelVariance, scales_of

__all__ = ["Examples", "OnlineRetention", "Teacher"]

_UNITS = {"classes": LogitRetention.unit, "labels": BernoulliRetention.unit, "values": UNITS["mse"]}
_SOME = 256  # anchors that variances are measured on
_NOT_FINITE = (
    "Check the model and the anchors on their own; numbers that are masked with -inf must be left out, or clamped, by "
    "`forward=`."
)

Teacher = nn.Module | Callable[[], AbstractContextManager[Any]]
Examples = AnchorCache | Dataset[Any] | Sequence[Any]


class OnlineRetention(AnchorRetention):
    """Drift of the model's output from that of a teacher that runs in every pass, on the same anchors.

    The distance depends on the output (`Reading.output`): KL(teacher || model) in nats per valid position for classes,
    as in `LogitRetention`; as in `BernoulliRetention` for labels; as in `OutputRetention` with "mse" for values, whose
    variances are measured once, on at most 256 anchors. With adapters (PEFT) the teacher is the model with its adapters
    switched off: no cache, no copy, nothing on disk. At the first step of LoRA both are equal bit for bit.

    Example:
        model = peft.get_peft_model(base, peft.LoraConfig(...))
        retention = OnlineRetention(model, dataset, batch_size=8, collate=collator)
        retention().backward()

    Cost: a forward of the teacher without gradients, besides the model's forward and backward; memory for the teacher's
    logits of one batch, if they are not computed in pieces. `LogitRetention` pays for the teacher once, and with disk.
    A deep copy shares the anchors, and a teacher module.

    Args:
        model: The model in training, on its device, in either mode.
        anchors: Single examples, as a `DataLoader` takes them (a map-style dataset or a sequence), or an `AnchorCache`,
            for its inputs. `labels` are not passed to models of transformers: their loss is not needed.
        batch_size: Anchors per pass (and process).
        teacher: The teacher. None: the model with its adapters switched off. A module: a frozen copy, on any device. A
            function that returns a context manager: the model within it, such as `Snapshot(model)`, made before
            fine-tuning, which keeps the old weights on the CPU.
        collate: Function that makes a batch from a list of examples, as for a `DataLoader`. The model is called with
            the batch on its device: tensors need not be `[B, ...]`. Texts and None in a mapping are left out. None:
            torch's `default_collate`.
        reading: The `Reading`. Used are its `forward`, also called with a teacher module; `output` and `class_dim`;
            `mask`, by default `attention_mask` (for an encoder-decoder model `decoder_attention_mask`, else its labels
            that are not -100) if its shape fits, else all; and `autocast`. None: a cache's own.
        **settings: Arguments of `AnchorRetention`; `seed` also sets the random numbers of `anchors` and `collate`. And
            fields of `Reading` by keyword, instead of those of `reading`: `class_dim`, `output`, `mask` and so on.

    Raises:
        TypeError: `anchors` are not a sequence of examples, `teacher` is none of the three, or an argument is unknown.
        ValueError: There is no teacher (no adapters, a learned prompt), it shares trainable parameters with the model,
            there are fewer anchors than a batch, or `reading` names several outputs: make a closure for each. In a
            call: the kind of the output is unknown or wrong; also see `teachers.adapters_off`.
    """

    def __init__(
        self,
        model: nn.Module,
        anchors: Examples,
        batch_size: int = 16,
        *,
        teacher: Teacher | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        reading: Reading | None = None,
        **settings: Any,
    ) -> None:
        own = {name: settings.pop(name) for name in list(settings) if name not in Settings.__annotations__}
        if reading is None and isinstance(anchors, AnchorCache):
            reading = anchors.reading
            require_functions(anchors, with_fields(reading, own, "OnlineRetention"), "forward", "mask")
        reading = with_fields(Reading() if reading is None else reading, own, "OnlineRetention")
        self.teacher, self.collate = teacher, collate
        super().__init__(model, self._source(anchors), batch_size, reading=reading, **settings)
        self._scales: Tensor | None = None
        self._heads: dict[nn.Module, LinearHead | None] = {}
        self._outputs = Outputs(model, self.reading.output or "auto", self.reading.class_dim)
        if len(names := self._outputs.names) > 1:
            raise ValueError(
                f"OnlineRetention compares one output. Found {names}: make one closure of each, "
                f"Reading(output={{{names[0]!r}: ...}})."
            )
        if teacher is None:
            find_adapters(model)
        elif isinstance(teacher, nn.Module):
            self._refuse_shared(teacher)
        elif not callable(teacher):
            raise TypeError(
                "`teacher` must be a module, a function that returns a context manager, or None. Found "
                f"{type(teacher).__name__}."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> AnchorRetention:
        if isinstance(self.teacher, nn.Module):
            memo[id(self.teacher)] = self.teacher
        return super().__deepcopy__(memo)

    def _source(self, anchors: Examples) -> Anchors:
        if isinstance(anchors, AnchorCache):
            return anchors
        return _Collated(anchors, _stacked if self.collate is None else self.collate)

    def _read(self, anchors: Anchors, indices: Sequence[int] | Tensor, seed: int) -> AnchorBatch:
        if isinstance(anchors, AnchorCache):
            return anchors.read(indices, features=False)
        with isolated_rng(self.device, seed), _isolated_host_rng(seed):
            return anchors.read(indices)

    @property
    def unit(self) -> str:  # type: ignore[override]
        """Unit of L_ret, in words; that of classes until the first pass has detected the kind of the output."""
        return _UNITS[self._kind]

    def _taught(self, batch: AnchorBatch, seed: int) -> AnchorBatch:
        taught = self._by_teacher(batch, seed)
        if self._kind == "values" and self._scales is None:
            self._scales = self._measured_scales()
        return _TaughtBatch.of(batch, taught)

    def _measured_scales(self) -> Tensor:
        places, found = spread(len(self._anchors), _SOME), ChannelVariance()
        for number, start in enumerate(range(0, len(places), self.batch_size)):
            seed = mixed_seed(self.seed, number)
            batch = self._read(self._anchors, places[start : start + self.batch_size], seed)
            taught, valid = self._by_teacher(batch, seed), self._valid(batch.inputs)
            values = rows_where(taught, valid if valid is not None and tuple(valid.shape) == taught.shape else None)
            assert isinstance(values, Tensor)
            found.add(values.cpu())
        scales = scales_of(found.result())
        if not bool((scales > 0.0).all()):
            if not bool(scales.isfinite().all()):
                raise ValueError(f"The teacher's output is not finite. {_NOT_FINITE}")
            raise ValueError(
                "The drift of values is measured in units of their variance over the anchors, and the teacher's do not "
                f"vary over {len(places)} of them: use more, and more varied, anchors."
            )
        return scales

    def _by_teacher(self, batch: AnchorBatch, seed: int) -> Rows:
        teacher, other = self.teacher, None
        switched: AbstractContextManager[Any] = nullcontext()
        if isinstance(teacher, nn.Module):
            self._refuse_shared(teacher)
            other = teacher
        else:
            switched = adapters_off(self.model) if teacher is None else teacher()
        with torch.no_grad(), switched, self._pass(seed, other):
            # The kind of the output is detected once; a mask function need not run for that again
            valid = None if self._outputs.known else self._valid(batch.inputs)
            return self._output(batch.inputs, valid, other, taught=True)

    def _output(
        self, inputs: Inputs, valid: Tensor | None, other: nn.Module | None = None, *, taught: bool = False
    ) -> Rows:
        """Output of the model, or of a teacher module, at all positions."""
        model, device = (self.model, self.device) if other is None else (other, device_of(other))
        inputs = to_device(inputs, device)
        head = self._head_of(model, inputs, taught) if self._outputs.known else None
        with nullcontext() if head is None else head_left_out(head, None) as seen:
            output = call(model, inputs, self.reading.forward)
        if head is not None and seen is not None and seen.used:
            return Rows(head.rows(seen, output), seen.shape)
        (found,) = self._outputs(output, inputs, None, valid).values()
        return rows_of(found, None)

    def _head_of(self, model: nn.Module, inputs: Inputs, taught: bool) -> LinearHead | None:
        """The head of the model or teacher, if the comparison can compute its logits."""
        beside = taught and model is not self.teacher  # the model itself, within a context
        if beside and self.teacher is not None:
            return None  # its weights outside of the context are unknown
        if model not in self._heads:
            head = None
            if self._outputs.one_softmax(2) and not is_compiled(model):
                with isolated_rng(device_of(model), None):  # the pass' random numbers must not depend on this
                    head = linear_head(model, inputs, forward=self.reading.forward)
            self._heads[model] = head
        head = self._heads[model]
        # Its weights when logits are compared must be the teacher's
        trains = head is not None and any(p.requires_grad for p in head.head.parameters())
        return None if beside and trains else head

    def _valid(self, inputs: Inputs) -> Tensor | None:
        return valid_positions(self.model, inputs, self.reading.mask)

    @property
    def _kind(self) -> str:
        known, (asked,) = list(self._outputs.known.values()), self._outputs.kinds
        return known[0].kind if known else "classes" if asked == "auto" else asked

    def _terms(self, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        assert isinstance(batch, _TaughtBatch)
        taught, valid = batch.taught, self._valid(batch.inputs)
        try:
            output = self._output(batch.inputs, valid)
        except OutputError as error:
            raise AnchorMismatchError(str(error)) from error
        mine, its = ((*x.shape, x.values.shape[-1]) for x in (output, taught))
        if mine != its:
            raise AnchorMismatchError(
                f"The model gives {mine}, its teacher {its}. If one of them has positions of its own, such as a "
                "learned prompt's, leave these out in `forward=`."
            )
        if self.reading.mask is None and valid is not None and tuple(valid.shape) != output.shape:
            valid = None
        student, teacher = rows_where(output, valid), rows_where(taught, valid)
        if self._kind == "classes":
            return {"classes": kl_term(student, {"logprobs": teacher})}
        assert isinstance(student, Tensor)
        assert isinstance(teacher, Tensor)
        if self._kind == "labels":
            return {"labels": bernoulli_term(student, teacher)}
        return {"values": values_term(student, teacher, "mse", self._scales)}

    def _refuse_shared(self, teacher: nn.Module) -> None:
        trainable = {id(p): name for name, p in self.model.named_parameters() if p.requires_grad}
        if shared := [trainable[id(p)] for p in teacher.parameters() if id(p) in trainable]:
            raise ValueError(
                f"`teacher` shares {len(shared)} trainable parameters with the model, such as {shared[0]}: it would "
                "move along, and the drift stay zero. Pass a frozen copy, copy.deepcopy(model), made before training; "
                "for a model with adapters, leave `teacher` out."
            )

    def _precisions(self) -> list[torch.dtype]:
        others = self.teacher.parameters() if isinstance(self.teacher, nn.Module) else ()
        return [*super()._precisions(), *(p.dtype for p in others if p.is_floating_point())]

    def _cause(self, batch: AnchorBatch) -> str:
        assert isinstance(batch, _TaughtBatch)
        with gathered(batch.taught.values):
            finite = all(bool(values.isfinite().all()) for _, values in pieces_of(batch.taught.values))
        if not finite:
            return f"Cause: the teacher's output is not finite. {_NOT_FINITE}"
        if self.teacher is None:
            return (
                "Likely: adapters that are not new, adapters whose initialisation changes the base weights (PiSSA, "
                "OLoRA, LoftQ), or further adapters that belong to what shall be kept. Pass teacher=: a frozen copy of "
                "what to keep, or a function that returns a context manager."
            )
        return (
            "Likely: the teacher has other weights or another precision than the model before its first step, or "
            "outputs are random in a place that is not recognised as dropout."
        )


class _TaughtBatch(AnchorBatch):
    """A batch, and the teacher's output at all of its positions."""

    taught: Rows

    @classmethod
    def of(cls, batch: AnchorBatch, taught: Rows) -> "_TaughtBatch":
        found = cls(*batch)
        found.taught = taught
        return found


class _Collated:
    """Batches of single examples."""

    def __init__(self, examples: Any, collate: Callable[[list[Any]], Any]) -> None:
        sized = hasattr(examples, "__len__") and hasattr(examples, "__getitem__")
        if not sized or isinstance(examples, Mapping | str | IterableDataset):
            raise TypeError(
                "`anchors` must be single examples in a map-style dataset or a sequence, or an AnchorCache. Found "
                f"{type(examples).__name__}: of a DataLoader pass `.dataset`, and its `.collate_fn` as `collate=`; of "
                "an iterable dataset a list."
            )
        self.examples, self.collate = examples, collate

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, indices: Sequence[int] | Tensor) -> AnchorBatch:
        numbers = indices.tolist() if isinstance(indices, Tensor) else indices
        return AnchorBatch(model_inputs(self.collate([self.examples[i] for i in numbers])), {})


def _stacked(examples: list[Any]) -> Any:
    """A batch by torch's `default_collate`, its tensors only."""
    hint = (
        "Pass a collator that stacks and pads them, such as collate=transformers.DataCollatorWithPadding(tokenizer), "
        "or turn them into tensors."
    )
    try:
        batch = default_collate(examples)
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            "`collate` must make tensors of the examples. Found examples that differ in length, or hold something else "
            f"({str(error).splitlines()[0]}). {hint}"
        ) from error
    if isinstance(batch, Mapping):
        lists = [k for k, v in batch.items() if isinstance(v, list | tuple) and v and isinstance(v[0], Tensor)]
        if lists:
            raise TypeError(
                f"`collate` must make tensors of the examples. Found lists of tensors in {lists}: the examples hold "
                f"lists of numbers. {hint}"
            )
    return batch


@contextmanager
def _isolated_host_rng(seed: int) -> Iterator[None]:
    """Starts Python's and NumPy's global generators from `seed` in the block; afterwards they are as before."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the legacy one is what datasets draw from
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
