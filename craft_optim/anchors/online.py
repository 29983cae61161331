"""Retention without a cache: the teacher runs beside the model, on the same anchors."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate

from .cache import AnchorBatch, AnchorCache
from .logit_retention import kl_term
from .masks import IGNORED, rows, valid_positions
from .passes import call, device_of, is_encoder_decoder, isolated_rng, logits_of, to_device
from .reading import AnchorMismatchError, Reading, require_functions
from .retention import AnchorRetention, Anchors, Settings
from .structure import Inputs, flatten
from .teachers import adapters_off, find_adapters

__all__ = ["Examples", "OnlineRetention", "Teacher"]

Teacher = nn.Module | Callable[[], AbstractContextManager[Any]]
Examples = AnchorCache | Dataset[Any] | Sequence[Any]


class OnlineRetention(AnchorRetention):
    """KL(teacher || model) on the anchors' logits, in nats per valid position, with the teacher computed on the fly.

        L_ret = mean over valid positions i of  sum_v p_iv (log p_iv - log q_iv)

    p is the teacher's distribution, q the model's now. With adapters (PEFT) the teacher is the model with its adapters
    switched off: no cache, no copy, nothing on disk. At the first step of LoRA both are the same, to the bit.

    Example:
        model = peft.get_peft_model(base, peft.LoraConfig(...))
        retention = OnlineRetention(model, dataset, batch_size=8, collate=collator)
        retention().backward()

    Cost: a forward of the teacher without gradients, on top of the model's forward and backward; memory for the
    teacher's logits of one batch. `LogitRetention` pays for the teacher once, and with disk. A deep copy shares the
    anchors, and a teacher that is a module.

    Args:
        model: The model in training, on its device, in either mode.
        anchors: Single examples, as a `DataLoader` takes them: a map-style dataset or a sequence; or an `AnchorCache`,
            of which the inputs are used. `labels` are not passed to models of transformers: their loss is not needed.
        batch_size: Anchors per pass (and process).
        teacher: None: the model with its adapters switched off. A module: a frozen copy, on any device. A function
            that returns a context manager: the model within that; `Snapshot(model)`, made before fine-tuning, is one
            that keeps the old weights on the CPU.
        collate: Makes a batch of a list of examples, as for a `DataLoader`; a batch is what `build` takes. None:
            torch's `default_collate`.
        reading: Its `forward`, also called with the teacher, if that is a module; its `mask`, by default
            `attention_mask` (of an encoder-decoder model `decoder_attention_mask`, else its labels that are not -100)
            where its shape fits, else all; its `autocast`. None: a cache's own.
        **settings: See `AnchorRetention`. `seed` is also of what `anchors` and `collate` draw.

    Raises:
        TypeError: `anchors` are not a sequence of examples, or `teacher` is none of the three.
        ValueError: There is no teacher (no adapters, a learned prompt), it shares trainable parameters with the model,
            or there are fewer anchors than a batch. In a call also: see `teachers.adapters_off`.
    """

    unit = "nats per position (KL)"

    def __init__(
        self,
        model: nn.Module,
        anchors: Examples,
        batch_size: int = 16,
        *,
        teacher: Teacher | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        reading: Reading | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        if reading is None and isinstance(anchors, AnchorCache):
            reading = anchors.reading
            require_functions(anchors, reading, "forward", "mask")
        self.teacher, self.collate = teacher, collate
        super().__init__(model, self._source(anchors), batch_size, reading=reading, **settings)
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
        return _Collated(anchors, default_collate if self.collate is None else self.collate)

    def _read(self, anchors: Anchors, indices: Sequence[int] | Tensor, seed: int) -> AnchorBatch:
        if isinstance(anchors, AnchorCache):
            return anchors.read(indices, features=False)
        with isolated_rng(self.device, seed), _isolated_host_rng(seed):
            return anchors.read(indices)

    def _taught(self, batch: AnchorBatch, seed: int) -> AnchorBatch:
        teacher, other = self.teacher, None
        switched: AbstractContextManager[Any] = nullcontext()
        if isinstance(teacher, nn.Module):
            self._refuse_shared(teacher)
            other = teacher
        else:
            switched = adapters_off(self.model) if teacher is None else teacher()
        with torch.no_grad(), switched, self._pass(seed, other):
            return batch._replace(features={"logprobs": self._logits(batch.inputs, other)})

    def _logits(self, inputs: Inputs, other: nn.Module | None = None) -> Tensor:
        """Logits of the model, or of a teacher that is a module of its own."""
        model, device = (self.model, self.device) if other is None else (other, device_of(other))
        output = call(model, to_device(inputs, device), self.reading.forward)
        logits = logits_of(output)
        if logits is None:
            raise ValueError(f"The model must give logits. Found {type(output).__name__}: pass `forward=`.")
        return logits

    def _terms(self, batch: AnchorBatch) -> dict[str, tuple[Tensor, int]]:
        logits, teacher = self._logits(batch.inputs), batch.features["logprobs"]
        if logits.shape != teacher.shape:
            raise AnchorMismatchError(
                f"The model gives logits of shape {tuple(logits.shape)}, its teacher {tuple(teacher.shape)}. If one of "
                "them has positions of its own, such as a learned prompt's, leave these out in `forward=`."
            )
        mask = self.reading.mask
        valid = self._default_mask(batch.inputs) if mask is None else valid_positions(batch.inputs, mask)
        if mask is None and valid is not None and valid.shape != logits.shape[:-1]:
            valid = None
        return {"kl": kl_term(rows(logits, valid), {"logprobs": rows(teacher, valid)})}

    def _default_mask(self, inputs: Inputs) -> Tensor | None:
        if not isinstance(inputs, dict):
            return None
        if not is_encoder_decoder(self.model):
            mask = inputs.get("attention_mask")
            return None if mask is None else mask.bool()
        # `attention_mask` is the encoder's there
        mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
        if mask is not None:
            return mask.bool()
        return None if labels is None else labels != IGNORED

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
        batch = self.collate([self.examples[i] for i in numbers])
        if isinstance(batch, Mapping):
            lists = [k for k, v in batch.items() if isinstance(v, list | tuple) and v and isinstance(v[0], Tensor)]
            if lists:
                raise TypeError(
                    f"`collate` must make tensors of the examples. Found lists of tensors in {lists}: the examples "
                    "hold lists of numbers. Pass a collator that stacks and pads them, such as "
                    "transformers.DataCollatorWithPadding, or turn them into tensors."
                )
        structure, named, _ = flatten(batch)
        return AnchorBatch(structure.rebuild(named), {})


@contextmanager
def _isolated_host_rng(seed: int) -> Iterator[None]:
    """Within the block Python's and NumPy's global generators start from `seed`; afterwards they are as before."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the legacy one is what datasets draw from
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
