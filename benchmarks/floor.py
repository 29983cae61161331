"""What surgery is measured by: the memory traffic that it cannot do without.

Both lists are read for the three inner products, both are read and one is written for the merge: 5N elements. An axpy
over one flat vector reads two and writes one; its time counts 5/3 times.
"""

from collections.abc import Callable, Sequence
from typing import Any

from shapes import elements, tensors
from torch import Tensor

__all__ = ["AXPY_COUNTS", "axpy"]

AXPY_COUNTS = 5 / 3


def axpy(like: Sequence[Tensor]) -> Callable[[], Any]:
    """y += alpha x over as many elements as these tensors have, of their dtype and on their device, in one vector."""
    total = [(elements(like),)]
    (x,), (y,) = (tensors(total, like[0].device, like[0].dtype, seed) for seed in (2, 3))
    return lambda: y.add_(x, alpha=1e-3)
