"""Compiled: one pass of C++ over gradients in host memory; see compiled.cpp, and `loading`."""

import ctypes
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..decision import Weights
from .loading import library
from .pairs import Vectors, common_length, cut, share_memory

__all__ = ["DTYPES", "CompiledPairs", "library"]

# Kinds that compiled.cpp knows. Half precision is missing: it is rare in training on a CPU, and would need its own
# conversions.
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# Elements per piece, and least number per thread: starting a thread takes as long as a hundred thousand.
_PIECE = 1 << 18
_PER_THREAD = 1 << 23

# Address of a buffer from some byte on, as an argument
_At: Any = ctypes.c_char * 0


class CompiledPairs:
    """Pairs of contiguous gradients in host memory.

    Args:
        functions: Functions from `library`.
        of_t: Task gradients, of `DTYPES`. The caller keeps the tensors alive.
        of_r: Retention gradients, each with as many elements as its partner.
        segments: Segment number of each pair; None if there is one segment.

    Attributes:
        share_memory: True if the gradients of any pair lie in the same place.

    Raises:
        ValueError: If partners differ in their number of elements.
    """

    def __init__(
        self, functions: ctypes.CDLL, of_t: Vectors, of_r: Vectors, segments: Sequence[int] | None = None
    ) -> None:
        self._functions = functions
        length = common_length(of_t, of_r)
        self.share_memory = share_memory(of_t, of_r)
        self._t, self._r, self._length = of_t.address, of_r.address, length
        self._kinds = of_t.kind, of_r.kind
        self._segment = None if segments is None else np.asarray(segments, np.int64)
        if np.count_nonzero((length < 1) | (length > _PIECE)):  # a quarter of the time of `any`
            owner, start = cut(length, _PIECE)
            self._t, self._r = of_t.at(owner, start), of_r.at(owner, start)
            self._length = np.minimum(length[owner] - start, _PIECE)
            self._kinds = of_t.kind[owner], of_r.kind[owner]
            self._segment = None if self._segment is None else self._segment[owner]

        self._elements = int(self._length.sum())
        self._every = len(self._length) == np.count_nonzero(self._r)
        self._columns = [self._t, self._r, self._length, *self._kinds]

    def sums(self, n_segments: int) -> NDArray[np.float64]:
        """<g_t, g_t>, <g_r, g_r> and <g_t, g_r> per segment, `[3, n_segments]`, formed in float64."""
        of_pieces = np.empty((3, len(self._length)))
        self._run(self._functions.craft_dots, *of_pieces)
        if self._segment is None:  # in sequence, as in a bin
            return np.add.accumulate(of_pieces, axis=1)[:, -1:] if len(self._length) else np.zeros((3, 1))
        return np.array([np.bincount(self._segment, row, minlength=n_segments) for row in of_pieces])

    def merge_(self, coefficients: Sequence[Weights]) -> None:
        """Writes a g_t + w g_r into every retention gradient with w != 0, with the coefficients of its segment."""
        if self._segment is not None:
            a, w = (np.array(column)[self._segment] for column in zip(*coefficients, strict=True))
        else:
            a, w = (np.full(len(self._length), c) for c in coefficients[0])
        chosen = None
        if not self._every or any(c.retention == 0.0 for c in coefficients):
            chosen = (self._r != 0) & (w != 0.0)
        self._run(self._functions.craft_merge, a, w, chosen=chosen)

    def _run(
        self, function: Callable[..., None], *arrays: NDArray[np.float64], chosen: NDArray[np.bool_] | None = None
    ) -> None:
        columns = [*self._columns, *arrays]
        if chosen is not None:
            columns = [column[chosen] for column in columns]
        n = len(columns[0])
        if not n:
            return

        def work(begin: int, end: int) -> None:
            function(ctypes.c_int64(end - begin), *(_At.from_buffer(x, begin * x.itemsize) for x in columns))

        threads = min(torch.get_num_threads(), self._elements // _PER_THREAD)
        if threads <= 1:
            work(0, n)
            return
        done = np.cumsum(columns[2])
        bounds = [0, *np.searchsorted(done, done[-1] * np.arange(1, threads) / threads).tolist(), n]
        # Own threads for this call: a pool would not survive a fork, and OpenMP's would be a second one beside torch's.
        # ctypes releases the interpreter's lock.
        others = [threading.Thread(target=work, args=part) for part in list(pairwise(bounds))[1:]]
        for thread in others:
            thread.start()
        work(bounds[0], bounds[1])
        for thread in others:
            thread.join()
