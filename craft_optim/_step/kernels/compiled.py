"""One pass of C++ over gradients in host memory; see compiled.cpp, and `loading` for how it comes to run."""

import ctypes
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import attrgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..decision import Weights
from .loading import library
from .pairs import cut

__all__ = ["KINDS", "PLAIN", "CompiledPairs", "Vectors", "library"]

# What compiled.cpp calls the kinds of elements. Half precision is not among them: gradients of models that train in it
# on a CPU are rare, and it would need conversions of its own.
KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}

# Elements per piece, and per thread at least: to start a thread takes the time of a hundred thousand.
_PIECE = 1 << 18
_PER_THREAD = 1 << 23

# Others keep what they hold elsewhere than where `data_ptr` says. These too may hold it with another sign, as the
# imaginary part of a conjugate does: `is_neg`.
PLAIN = {Tensor, torch.nn.Parameter}

_DTYPE, _IS_CPU = attrgetter("dtype"), attrgetter("is_cpu")


class Vectors:
    """Addresses (0 for None), lengths and kinds of tensors.

    Found without a line of Python per tensor: there may be thousands of small ones.

    Args:
        tensors: In host memory, of the dtypes in `KINDS`, without gaps; entries may be None.
        given: The tensors that are not None, if the caller has them.
    """

    def __init__(self, tensors: Sequence[Tensor | None], given: Sequence[Tensor] | None = None) -> None:
        given = [x for x in tensors if x is not None] if given is None else given
        dtypes = list(map(_DTYPE, given))
        n = len(tensors)
        here = slice(None) if len(given) == n else np.array([x is not None for x in tensors])
        self.address, self.length, self.kind = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int32)
        self.address[here] = np.fromiter(map(Tensor.data_ptr, given), np.int64, len(given))
        self.length[here] = np.fromiter(map(Tensor.numel, given), np.int64, len(given))
        if len(set(dtypes)) == 1:
            self.kind[here] = KINDS[dtypes[0]]
        else:
            self.kind[here] = np.fromiter(map(KINDS.__getitem__, dtypes), np.int32, len(given))

    @classmethod
    def of_plain(cls, tensors: Sequence[Tensor | None]) -> "Vectors | None":
        """The addresses of contiguous tensors of these kinds; None if there is another among them."""
        given = [x for x in tensors if x is not None]
        try:
            if not (
                set(map(type, given)) <= PLAIN
                and all(map(_IS_CPU, given))
                and all(map(Tensor.is_contiguous, given))  # sparse ones raise
                and not any(map(Tensor.is_neg, given))
            ):
                return None
            return cls(tensors, given)
        except (RuntimeError, KeyError):  # of another layout, of another dtype
            return None

    def at(self, owner: NDArray[np.int64], start: NDArray[np.int64]) -> NDArray[np.int64]:
        """Addresses of the elements `start` of the tensors `owner`."""
        size = np.array([dtype.itemsize for dtype in KINDS], np.int64)[self.kind]
        address = self.address[owner]
        return np.where(address == 0, 0, address + start * size[owner])


class CompiledPairs:
    """Pairs of contiguous gradients in host memory.

    Args:
        functions: From `library`.
        of_t: Task gradients. Whoever has made these keeps the tensors.
        of_r: Retention gradients; as many elements as their partner's.
        segments: Number of each pair's sums; None if there is one.

    Raises:
        ValueError: If partners differ in their number of elements.
    """

    def __init__(
        self, functions: ctypes.CDLL, of_t: Vectors, of_r: Vectors, segments: Sequence[int] | None = None
    ) -> None:
        self._functions = functions
        length = np.maximum(of_t.length, of_r.length)
        if ((of_t.length != length) & (of_t.address != 0) | (of_r.length != length) & (of_r.address != 0)).any():
            raise ValueError("`task` and `retention` must have the same shapes.")
        owner: NDArray[np.int64] = np.arange(len(length))
        start: NDArray[np.int64] = np.zeros(len(length), np.int64)
        if not ((length > 0) & (length <= _PIECE)).all():
            owner, start = cut(length, _PIECE)
        self._length = np.minimum(length[owner] - start, _PIECE)
        self._t, self._r = of_t.at(owner, start), of_r.at(owner, start)
        self._kinds = of_t.kind[owner], of_r.kind[owner]
        self._segment = np.zeros(len(owner), np.int64) if segments is None else np.asarray(segments)[owner]

    def sums(self, n_segments: int) -> NDArray[np.float64]:
        """<g_t, g_t>, <g_r, g_r> and <g_t, g_r> per segment, `[3, n_segments]`, formed in float64."""
        of_pieces = np.empty((3, len(self._length)))
        self._run(self._functions.craft_dots, *of_pieces)
        return np.stack([np.bincount(self._segment, row, minlength=n_segments) for row in of_pieces])

    def merge_(self, coefficients: Sequence[Weights]) -> None:
        """Writes a g_t + w g_r into every retention gradient with w != 0, with the coefficients of its segment."""
        a, w = np.array([(c.task, c.retention) for c in coefficients]).T
        a, w = a[self._segment], w[self._segment]
        chosen = (self._r != 0) & (w != 0.0)
        self._run(self._functions.craft_merge, a, w, chosen=None if chosen.all() else chosen)

    def _run(
        self, function: Callable[..., None], *arrays: NDArray[np.float64], chosen: NDArray[np.bool_] | None = None
    ) -> None:
        columns = [self._t, self._r, self._length, *self._kinds, *arrays]
        if chosen is not None:
            columns = [column[chosen] for column in columns]
        columns = [np.ascontiguousarray(column) for column in columns]
        done = np.cumsum(columns[2])
        if not len(done):
            return
        threads = int(max(1, min(torch.get_num_threads(), done[-1] // _PER_THREAD)))
        bounds = [0, *np.searchsorted(done, done[-1] * np.arange(1, threads) / threads).tolist(), len(done)]

        def work(begin: int, end: int) -> None:
            at = [ctypes.c_void_p(column.ctypes.data + begin * column.itemsize) for column in columns]
            function(ctypes.c_int64(end - begin), *at)

        # Threads of its own, for this call: a pool would not survive a fork, and OpenMP's would be a second one beside
        # torch's. ctypes lets go of the interpreter's lock.
        others = [threading.Thread(target=work, args=part) for part in list(pairwise(bounds))[1:]]
        for thread in others:
            thread.start()
        work(bounds[0], bounds[1])
        for thread in others:
            thread.join()
