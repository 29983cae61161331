"""Anchors: inputs from the domain to keep, and what the model said about them before it was fine-tuned."""

from .build import build
from .cache import AnchorBatch, AnchorCache, AnchorCacheError
from .fingerprint import fingerprint
from .online import OnlineRetention
from .retention import AnchorMismatchError, AnchorRetention, HiddenRetention, LogitRetention
from .sampling import AnchorSampler

__all__ = [
    "AnchorBatch",
    "AnchorCache",
    "AnchorCacheError",
    "AnchorMismatchError",
    "AnchorRetention",
    "AnchorSampler",
    "HiddenRetention",
    "LogitRetention",
    "OnlineRetention",
    "build",
    "fingerprint",
]
