"""The teacher's outputs for a batch of anchors, in the form in which a cache keeps them."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .capture import Layer, default_spans, pool, positions
from .forwards import AnchorForward
from .kinds import Output
from .manifest import FeatureSpec, tap_key
from .masks import IGNORED, valid_positions
from .outputs import Outputs, Rows, feature
from .passes import autocast_to, isolated_rng, to_device
from .pieces import LogitRows, gathered, pieces_of
from .reading import Reading
from .sampling import mixed_seed
from .structure import Inputs
from .variance import ChannelVariance, scales_of

__all__ = ["Extractor", "Taught"]

_COARSE = 1e-5  # share of the variance that may be rounding; float16 has 1e-7 where mean and deviation are alike


class Taught(NamedTuple):
    """One batch with the teacher's outputs.

    Attributes:
        inputs: Inputs that the model was run on: the batch, or the batch continued by generating.
        features: Features by name, on the CPU.
        joined: Names of features that hold the positions of their mask only, one after another.
        outputs: Outputs of the model that are kept.
    """

    inputs: Inputs
    features: dict[str, Tensor]
    joined: frozenset[str]
    outputs: dict[str, Output]


class Extractor:
    """Runs the teacher as `reading` says and keeps the outputs that `spec` names.

    Not in inference mode: it would save 2 % of a forward, but tensors that a model makes in it and keeps, such as
    tables of positions, cannot be used in training.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, spec: FeatureSpec, dtype: torch.dtype, reading: Reading
    ) -> None:
        self.model, self.device, self.spec, self.dtype, self.reading = model, device, spec, dtype, reading
        self.generate = reading.generate
        self._outputs: Outputs | None = None
        self._seen: dict[str, ChannelVariance] = {}  # for each output of kind "values"
        if spec.logits is not None:
            certain = self.generate is not None or spec.logits == "top_k"
            kinds = "classes" if certain and reading.output == "auto" else reading.output or "auto"
            self._outputs = Outputs(model, kinds, reading.class_dim)
        elif self.generate is not None:
            self._outputs = Outputs(model, "classes", -1)
        self._run = AnchorForward(model, reading.forward, spec.layers, self._outputs, spec.frozen)

    def __call__(self, inputs: Inputs, size: int, first: int, lengths: Mapping[str, Tensor]) -> Taught:
        """The features of `size` anchors, numbered from `first`. Call it within `steady(model)`.

        Args:
            inputs: The batch.
            size: Number of anchors.
            first: Number of the first.
            lengths: Rows of each anchor in ragged inputs.
        """
        inputs, labels = to_device(inputs, self.device), None
        features: dict[str, Tensor] = {}
        joined: set[str] = set()
        with torch.no_grad(), isolated_rng(self.device, mixed_seed(0, first)), ExitStack() as stack:
            with autocast_to(self.device, self.reading.autocast):
                if self.generate is not None:
                    inputs, labels = self.generate(self.model, inputs)
                valid = None if self._outputs is None else self._valid(inputs, labels)
                outcome = self._run(inputs, size, valid, lengths=lengths)
                for rows in outcome.outputs.values():  # before any error that only one process may have
                    stack.enter_context(gathered(rows.values))
                if torch.is_autocast_enabled(self.device.type):
                    # Older torch keeps weights cast without gradients for later forwards (pytorch/pytorch#158232)
                    torch.clear_autocast_cache()
            if self._outputs is not None:
                features |= self._of_outputs(self._outputs, outcome.outputs, valid, labels, first, joined)
            if outcome.hidden:
                features |= self._hidden(outcome.hidden, inputs, size, first, joined)
            for name, x in outcome.frozen.items():
                features[name] = self._round(x, f"output {name!r}") if x.is_floating_point() else x
            features = {key: x.cpu() for key, x in features.items()}
        kept = {} if self._outputs is None or self.spec.logits is None else self._outputs.known
        return Taught(inputs, features, frozenset(joined), kept)

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

    def _valid(self, inputs: Inputs, labels: Tensor | None) -> Tensor | None:
        return valid_positions(self.model, inputs, self.reading.mask) if labels is None else (labels != IGNORED).cpu()

    def _of_outputs(
        self,
        outputs: Outputs,
        found: Mapping[str, Rows],
        valid: Tensor | None,
        labels: Tensor | None,
        first: int,
        joined: set[str],
    ) -> dict[str, Tensor]:
        """The features of the outputs, at the valid positions if the mask fits, else at all."""
        features: dict[str, Tensor] = {}
        fits = {name for name, output in found.items() if valid is not None and tuple(valid.shape) == output.shape}
        if valid is not None and not fits and (self.reading.mask is not None or labels is not None):
            shapes = ", ".join(str(output.shape) for output in found.values())
            source = self.spec.mask or self.spec.tokens
            raise ValueError(f"The output's mask must have shape {shapes}. {source!r} has {tuple(valid.shape)}.")
        if valid is not None and fits:
            _require_positions(valid.flatten(1), first, "the output's mask")
            features["mask"] = valid
        for name, output in found.items():
            kept = {} if self.spec.logits is None else self._kept(name, outputs.known[name], output.values)
            if labels is not None:
                tokens = labels[labels != IGNORED]
                kept["tokens"] = tokens.int()
                kept["token_logprobs"] = self._round(_logprobs_of(output.values, tokens), "logits")
            if name not in fits:
                kept = {key: x.reshape(*output.shape, *x.shape[1:]) for key, x in kept.items()}
            kept = {feature(key, name): x for key, x in kept.items()}
            if name in fits:
                joined.update(kept)
            features |= kept
        return features

    def _kept(self, name: str, known: Output, values: LogitRows) -> dict[str, Tensor]:
        kind = known.kind
        if kind == "classes":
            k = self.spec.top_k_of(known)
            parts = [self._logits(F.log_softmax(logits.float(), dim=-1), k) for _, logits in pieces_of(values)]
            with torch.autocast(values.device.type, enabled=False):  # it does not take every storage dtype
                return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        assert isinstance(values, Tensor)
        if self.spec.logits == "top_k":
            raise ValueError(f"`top_k` needs classes. Found top_k={self.spec.top_k} and an output of {kind}.")
        of = f" of {name!r}" if name else ""
        if kind == "labels":
            return {"logits": self._round(values, f"logits{of}")}
        what = f"values{of}"
        self._check_rounding(values, what)
        return {"values": self._round(values, what)}

    def _check_rounding(self, values: Tensor, what: str) -> None:
        """Raises if the storage dtype is too coarse for the variation of a channel's values so far."""
        flat = values.flatten(0, -2).cpu()
        self._seen.setdefault(what, ChannelVariance()).add(flat)
        apart = (flat.double() - flat.to(self.dtype).double()).square().mean(0)
        scales = scales_of(self._seen[what].result())
        drift = float((apart / scales).mean()) if bool((scales > 0.0).all()) else 0.0
        if drift > _COARSE:
            raise ValueError(
                f"The teacher's {what} vary so little around their mean that rounding to dtype={self.dtype} alone is a "
                f"drift of {drift:.2g} of their variance: pass dtype=torch.float32."
            )

    def _logits(self, logprobs: Tensor, k: int | None) -> dict[str, Tensor]:
        classes = logprobs.shape[-1]
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


def _logprobs_of(rows: LogitRows, tokens: Tensor) -> Tensor:
    """log softmax of each position's token, `[P]`."""
    found = [
        F.log_softmax(logits.float(), dim=-1).gather(1, tokens[at].unsqueeze(1)).squeeze(1)
        for at, logits in pieces_of(rows)
    ]
    return torch.cat(found)


def _require_positions(mask: Tensor, first: int, what: str) -> None:
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        numbers = ", ".join(str(first + i) for i in empty[:5])
        raise ValueError(f"{what} selects no position of anchor {numbers}: leave such anchors out of `batches`.")
