"""Kept classes: how many a cache holds, and how much drift the likeliest ones and the mass of the rest miss."""

from typing import Any, Literal, NamedTuple

from torch import Tensor

from craft_optim._numbers import whole

__all__ = ["Kept", "KeptMean", "TopK", "top_k_of"]

TopK = int | Literal["auto", "all"]

# 8 kB per position, against 386 bytes
_FULL_UP_TO, _K = 4096, 64


def top_k_of(value: TopK) -> dict[str, Any]:
    """`logits`, `top_k` and `full_up_to` of a `FeatureSpec` from the argument `top_k` of `build`.

    Raises:
        TypeError, ValueError: The argument is invalid.
    """
    if isinstance(value, str) and value in ("auto", "all"):
        auto = {"logits": "auto", "top_k": _K, "full_up_to": _FULL_UP_TO}
        return auto if value == "auto" else {"logits": "full"}
    if value is None or isinstance(value, str):
        raise ValueError(f"`top_k` must be 'auto', 'all' or a whole number. Found top_k={value!r}.")
    return {"logits": "top_k", "top_k": whole("top_k", value)}


class Kept(NamedTuple):
    """Share of an output that its likeliest classes hold; means over valid positions.

    Attributes:
        k: Number of classes held.
        mass: Probability of these classes.
        unseen: Share of the KL over all classes that the KL over k classes and the rest misses, estimated for logits
            that have all moved alike, see `KeptMean`.
    """

    k: int
    mass: float
    unseen: float

    def describe(self, classes: int) -> str:
        """One line for people, for an output with that many classes."""
        return (
            f"the {self.k} likeliest of {classes:,} classes hold {self.mass:.3f} of the probability; they and the rest "
            f"show all of a drift but about {100 * self.unseen:.0f} %"
        )


class KeptMean:
    """Accumulates `Kept` over batches of positions.

    With p the teacher, q the model, r and s their mass outside the k classes,

        KL over all classes - KL over k + 1  =  r KL(p / r, q / s)        within the rest.

    If all logits moved by independent noise of a small variance v, the mean KL over all classes would be v / 2 (1 - sum
    of p^2), and the missed part v / 2 (r - sum of the rest's p^2 / r). The rest's squares are not held; without them

        unseen  =  sum of r / sum of (1 - sum of p^2 over the k classes),        the sums over positions.
    """

    def __init__(self) -> None:
        self._k = self._count = 0
        self._rest = self._moves = 0.0

    def add(self, logprobs: Tensor, rest: Tensor | None = None) -> None:
        """Adds log-probabilities of the k likeliest classes, `[..., k]`, and of the rest, `[...]`; None: no rest."""
        p = logprobs.double().exp()
        self._k, self._count = p.shape[-1], self._count + p.shape[:-1].numel()
        self._rest += 0.0 if rest is None else float(rest.double().exp().sum())
        self._moves += float((1.0 - p.square().sum(-1)).clamp_min(0.0).sum())

    def result(self) -> Kept:
        """The means over the positions added, at least one."""
        return Kept(self._k, 1.0 - self._rest / self._count, self._rest / self._moves if self._moves else 0.0)
