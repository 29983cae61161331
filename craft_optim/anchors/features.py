"""The teacher's outputs for a batch of anchors, in the form in which a cache keeps them."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .capture import Layer, default_spans, pool, positions
from .forwards import AnchorForward, Outcome
from .manifest import FeatureSpec, tap_key
from .masks import IGNORED, valid_positions
from .passes import autocast_to, isolated_rng, to_device
from .reading import Reading
from .sampling import mixed_seed
from .structure import Inputs

__all__ = ["Extractor", "Taught"]


class Taught(NamedTuple):
    """One batch with the teacher's outputs.

    Attributes:
        inputs: Inputs that the model was run on: the batch, or the batch continued by generating.
        features: By name, on the CPU.
        joined: Names of those that hold the positions of their mask only, one after another.
        classes: Size of the logits' last dimension; None without logits.
    """

    inputs: Inputs
    features: dict[str, Tensor]
    joined: frozenset[str]
    classes: int | None


class Extractor:
    """Runs the teacher as `reading` says and keeps what `spec` asks for.

    Not in inference mode: it saves 2 % of a forward, and what a model makes in it and keeps, such as tables of
    positions, cannot be used in training.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, spec: FeatureSpec, dtype: torch.dtype, reading: Reading
    ) -> None:
        self.model, self.device, self.spec, self.dtype, self.reading = model, device, spec, dtype, reading
        self.generate = reading.generate
        self._wants_output = spec.logits is not None or self.generate is not None
        self._run = AnchorForward(model, reading.forward, spec.layers, self._wants_output, spec.frozen)

    def __call__(self, inputs: Inputs, size: int, first: int) -> Taught:
        """The features of `size` anchors, of which the first has the number `first`. Within `steady(model)`."""
        inputs, labels = to_device(inputs, self.device), None
        features: dict[str, Tensor] = {}
        joined: set[str] = set()
        classes = None
        with torch.no_grad(), isolated_rng(self.device, mixed_seed(0, first)):
            with autocast_to(self.device, self.reading.autocast):
                if self.generate is not None:
                    inputs, labels = self.generate(self.model, inputs)
                valid = self._valid(inputs, labels) if self._wants_output else None
                outcome = self._run(inputs, size, valid)
                if torch.is_autocast_enabled(self.device.type):
                    # Older torch keeps weights cast without gradients for later forwards (pytorch/pytorch#158232)
                    torch.clear_autocast_cache()
            if self._wants_output:
                logits = self._checked(outcome, size)
                classes = logits.shape[-1] if self.spec.logits is not None else None
                features |= self._of_output(logits, outcome.shape, valid, labels, first, joined)
            if outcome.hidden:
                features |= self._hidden(outcome.hidden, inputs, size, first, joined)
            for name, x in outcome.frozen.items():
                features[name] = self._round(x, f"output {name!r}") if x.is_floating_point() else x
            features = {key: x.cpu() for key, x in features.items()}
        return Taught(inputs, features, frozenset(joined), classes)

    def _round(self, values: Tensor, what: str) -> Tensor:
        """`values` in the storage dtype, checked."""
        rounded = values.to(self.dtype)
        low, high = (float(x) for x in torch.aminmax(rounded)) if rounded.numel() else (0.0, 0.0)  # NaN if there is one
        if math.isfinite(low) and math.isfinite(high):
            return rounded
        largest = float(values.abs().max())
        if not math.isfinite(largest):
            raise ValueError(
                f"The teacher's {what} are not finite. Check the model and the anchors on their own; classes that "
                "are masked with -inf must be left out, or clamped, by `forward=`."
            )
        raise ValueError(
            f"The teacher's {what} reach {largest:.3g}, beyond the range of dtype={self.dtype}: pass "
            "dtype=torch.bfloat16 or torch.float32."
        )

    def _checked(self, outcome: Outcome, size: int) -> Tensor:
        logits = outcome.logits
        if logits is None or not logits.is_floating_point() or not outcome.shape or outcome.shape[0] != size:
            shape = None if logits is None else (*outcome.shape, logits.shape[-1])
            found = type(outcome.output).__name__ if logits is None else f"{logits.dtype} of shape {shape}"
            raise ValueError(
                f"The model must give logits [B, ..., V] with B = {size} anchors, as a tensor or as `.logits`. "
                f"Found {found}: pass `forward=`, or logits=False and `layers`."
            )
        return logits

    def _valid(self, inputs: Inputs, labels: Tensor | None) -> Tensor | None:
        return valid_positions(inputs, self.reading.mask) if labels is None else (labels != IGNORED).cpu()

    def _of_output(
        self,
        logits: Tensor,
        shape: tuple[int, ...],
        valid: Tensor | None,
        labels: Tensor | None,
        first: int,
        joined: set[str],
    ) -> dict[str, Tensor]:
        """The part of the logits that is kept: at the valid positions, if these fit; else all."""
        features: dict[str, Tensor] = {}
        if valid is not None and tuple(valid.shape) != shape:
            if self.reading.mask is not None or labels is not None:
                source = self.spec.mask or self.spec.tokens
                raise ValueError(f"The logits' mask must have shape {shape}. {source!r} has {tuple(valid.shape)}.")
            valid = None
        if valid is not None:
            _require_positions(valid.flatten(1), first, "the logits' mask")
            features["mask"] = valid
        else:
            logits = logits.reshape(*shape, -1)
        logprobs = F.log_softmax(logits.float(), dim=-1)
        kept = {} if self.spec.logits is None else self._logits(logprobs)
        if labels is not None:
            tokens = labels[labels != IGNORED]
            kept["tokens"] = tokens.int()
            kept["token_logprobs"] = self._round(logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1), "logits")
        if valid is not None:
            joined.update(kept)
        return features | kept

    def _logits(self, logprobs: Tensor) -> dict[str, Tensor]:
        classes, k = logprobs.shape[-1], self.spec.top_k
        if k is None:
            return {"logprobs": self._round(logprobs, "logits")}
        if k > classes:
            raise ValueError(f"`top_k` must not exceed the number of classes. Found top_k={k}, {classes} classes.")
        top = logprobs.topk(k, dim=-1)
        kept = {"topk_logprobs": self._round(top.values, "logits"), "topk_indices": top.indices.int()}
        if k < classes:  # stored, because one minus rounded probabilities is mostly rounding
            rest = logprobs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
            kept["rest_logprob"] = self._round(rest, "logits")
        return kept

    def _hidden(
        self, hidden: Mapping[Layer, Tensor], inputs: Inputs, size: int, first: int, joined: set[str]
    ) -> dict[str, Tensor]:
        features: dict[str, Tensor] = {}
        told = (self.reading.spans or default_spans)(self.model, inputs)
        spans = {span: x.to(self.device).bool() for span, x in told.items()}
        for layer, value in hidden.items():
            states = positions(value, self.spec.batch_dim)
            if len(states) != size:
                raise ValueError(
                    f"Layer {layer!r} gives {tuple(value.shape)}, but the first dimension must be the {size} anchors."
                )
            for span, mode in self.spec.pooling.items():
                what, key = f"hidden states of layer {layer!r}", tap_key(layer, span)
                if states.ndim == 2:
                    features[key] = self._round(states, what)
                    continue
                # A feature map's positions are not those of the tokens
                mask = spans.get(span) if value.ndim == 3 else None
                if mask is None and span != "all":
                    raise ValueError(
                        f"`pooling` names the span {span!r}, but layer {layer!r} has "
                        f"{sorted({*spans, 'all'}) if value.ndim == 3 else 'only all'} in this batch."
                    )
                if mask is not None and mask.shape != states.shape[:2]:
                    raise ValueError(
                        f"Span {span!r} has a mask of shape {tuple(mask.shape)}, layer {layer!r} has positions "
                        f"{tuple(states.shape[:2])}: pass `spans=` with masks that fit."
                    )
                if mask is not None:
                    if f"span.{span}" not in features:
                        _require_positions(mask, first, f"span {span!r}")
                    features[f"span.{span}"] = mask
                if mode == "none" and mask is not None:
                    features[key] = self._round(states[mask], what)
                    joined.add(key)
                else:
                    features[key] = self._round(pool(states, mask, mode), what)
        return features


def _require_positions(mask: Tensor, first: int, what: str) -> None:
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        numbers = ", ".join(str(first + i) for i in empty[:5])
        raise ValueError(f"{what} selects no position of anchor {numbers}: leave such anchors out of `batches`.")
