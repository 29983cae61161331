"""Forward on anchors at the least cost: no head where nothing is compared, no module whose output is known."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .capture import Layer, run
from .frozen import Form, forms_of, leaves, recorded, replayed
from .kinds import OutputError
from .outputs import Outputs, Rows, rows_of, whole
from .passes import Forward, device_of, is_compiled, isolated_rng, logits_of
from .structure import Inputs, anchors_of
from .valid_head import HeadUse, LinearHead, head_agrees, head_at, head_left_out, linear_head, output_head

__all__ = ["AnchorForward", "FrozenMismatchError", "Outcome"]

_log = logging.getLogger("craft_optim")


class FrozenMismatchError(ValueError):
    """A module that is declared frozen gives another output than the recorded one."""


class Outcome(NamedTuple):
    """Results of a forward on anchors.

    Attributes:
        outputs: Outputs by name, at the valid positions or at all; empty if only hidden states are wanted.
        hidden: Layer -> hidden states.
        frozen: Outputs of the frozen modules, if they ran.
    """

    outputs: dict[str, Rows]
    hidden: dict[Layer, Tensor]
    frozen: dict[str, Tensor]


class AnchorForward:
    """Runs a model on batches of anchors.

    The first call finds out, with a few forwards of one anchor, whether the comparison of the logits can run the
    vocabulary head itself (`valid_head.head_left_out`), or else the head can run at the valid positions only
    (`head_at`); and what frozen modules return. Later calls rely on that.

    Args:
        model: The model, in a state that the caller sets (`passes.steady`).
        forward: Function to run instead of the model's call, or None.
        layers: Layers whose hidden states are wanted.
        outputs: Outputs that are wanted; None for none.
        frozen: Names of modules that do not train.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Forward | None,
        layers: tuple[Layer, ...],
        outputs: Outputs | None,
        frozen: tuple[str, ...] = (),
    ) -> None:
        self._model, self._forward, self._layers, self._outputs = model, forward, layers, outputs
        self._frozen = frozen
        self._forms: dict[str, list[Form]] | None = None
        self._asked = False  # True once the head's use is known
        self._linear: LinearHead | None = None
        self._head: nn.Module | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forms": None}  # another process finds out for itself

    def __call__(
        self,
        inputs: Inputs,
        size: int,
        valid: Tensor | None = None,
        stored: Mapping[str, Tensor] | None = None,
        lengths: Mapping[str, Tensor] | None = None,
    ) -> Outcome:
        """Runs one forward on `size` anchors.

        Args:
            inputs: A batch on the model's device.
            size: Number of anchors.
            valid: Mask of the logits' positions that count, on the CPU; None: all.
            stored: Outputs of the frozen modules from a cache; the modules run if None or empty.
            lengths: Rows of each anchor in ragged inputs.

        Raises:
            FrozenMismatchError: In the first call: frozen modules return other outputs than the stored ones.
            OutputError: The outputs are not of the declared kind, or differ from earlier ones.
        """
        if self._outputs is not None:
            self._ask_about_head(inputs, valid, self._outputs, lengths or {})
        known = {key: x for key, x in (stored or {}).items() if key.startswith("frozen.")}
        if not self._frozen or (stored is not None and not known):
            return self._run(inputs, size, valid)
        if known and self._forms is not None:
            with replayed(self._model, known, self._forms):
                return self._run(inputs, size, valid)
        with recorded(self._model, self._frozen) as calls:
            outcome = self._run(inputs, size, valid)
        called = {name: outputs for name, outputs in calls.items() if outputs}
        found = leaves(called if known else calls, size)
        if known:
            _compare(found, known)
            self._forms = forms_of(called)
        return outcome._replace(frozen=found)

    def _run(self, inputs: Inputs, size: int, valid: Tensor | None) -> Outcome:
        wanted = self._outputs is not None
        with self._using_head(valid) as head:
            output, hidden = run(self._model, inputs, forward=self._forward, layers=self._layers, output=wanted)
        if self._outputs is None:
            return Outcome({}, hidden, {})
        if head is not None and head.used and self._linear is not None:
            return Outcome({"": Rows(self._linear.rows(head, output), head.shape)}, hidden, {})
        if head is not None and head.used and valid is not None and (logits := logits_of(output)) is not None:
            return Outcome({"": Rows(whole(logits)[0], tuple(valid.shape))}, hidden, {})
        found = self._outputs(output, inputs, size, valid)
        return Outcome({name: rows_of(x, valid) for name, x in found.items()}, hidden, {})

    def _using_head(self, valid: Tensor | None) -> AbstractContextManager[HeadUse | None]:
        if self._linear is not None:
            return head_left_out(self._linear, valid)
        if self._head is None or valid is None:
            return nullcontext()
        return head_at(self._model, valid, self._head)

    def _ask_about_head(
        self, inputs: Inputs, valid: Tensor | None, outputs: Outputs, lengths: Mapping[str, Tensor]
    ) -> None:
        if self._asked or (head := output_head(self._model)) is None:
            self._asked = True
            return
        device = device_of(self._model)
        one = anchors_of(inputs, 0, 1, lengths)
        if not outputs.known:
            # Errors are raised for the whole batch, in its own forward
            with isolated_rng(device, None), torch.no_grad(), suppress(OutputError):
                outputs(run(self._model, one, forward=self._forward)[0], one, 1, None if valid is None else valid[:1])
        self._asked = True
        if is_compiled(self._model) or not outputs.one_softmax(2) or (valid is not None and valid.ndim != 2):
            return
        agrees = False
        with isolated_rng(device, None):  # the pass' random numbers must not depend on this
            linear = linear_head(self._model, one, forward=self._forward)
            if valid is not None:
                # On one anchor, whatever its mask and the head's use: forwards may need all processes
                probe = torch.ones((1, *valid.shape[1:]), dtype=torch.bool)
                probe.flatten()[-1] = False
                agrees = head_agrees(self._model, one, probe, forward=self._forward)
        self._linear, self._head = linear, head if agrees else None
        if linear is None:
            _log.info(
                "The logits are computed as a whole%s: the model's head is not a plain linear module, its weights are "
                "split over processes by something else than FSDP2, or something else looks at its logits.",
                " at the valid positions" if agrees else "",
            )


def _compare(found: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    for key, x in found.items():
        module = key.removeprefix("frozen.").rsplit(".", 2)[0]
        known = stored.get(key)
        if known is None or known.shape != x.shape:
            raise FrozenMismatchError(
                f"The frozen module {module!r} gives {tuple(x.shape)} where the cache has "
                f"{'nothing' if known is None else tuple(known.shape)}: another model or another `forward=` than in "
                "`build`."
            )
        if x.is_floating_point():
            coarse = max(torch.finfo(x.dtype).eps, torch.finfo(known.dtype).eps)
            scale = float(x.abs().max()) if x.numel() else 0.0
            apart = float((x.float() - known.to(x.device).float()).abs().max()) if x.numel() else 0.0
            same = apart <= 32 * coarse * scale
        else:
            same = torch.equal(x, known.to(x.device))
        if not same:
            raise FrozenMismatchError(
                f"The frozen module {module!r} does not return what the cache holds of it: other weights, or it has "
                "trained. Load the weights that the cache was built with, or build it without `frozen`."
            )
