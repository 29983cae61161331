"""Anchors: inputs from the domain to keep, and what the model said about them before it was fine-tuned."""

from .build import build
from .cache import AnchorBatch, AnchorCache, AnchorCacheError
from .combined import CombinedRetention
from .fingerprint import fingerprint
from .hidden_retention import HiddenRetention
from .importers import convert
from .logit_retention import LogitRetention
from .online import OnlineRetention
from .reading import AnchorMismatchError, Reading
from .retention import AnchorRetention
from .sampling import AnchorSampler
from .teachers import Snapshot
from .token_retention import TokenRetention

__all__ = [
    "AnchorBatch",
    "AnchorCache",
    "AnchorCacheError",
    "AnchorMismatchError",
    "AnchorRetention",
    "AnchorSampler",
    "CombinedRetention",
    "HiddenRetention",
    "LogitRetention",
    "OnlineRetention",
    "Reading",
    "Snapshot",
    "TokenRetention",
    "build",
    "convert",
    "fingerprint",
]
