"""Anchors: inputs from the domain to keep, and the model's outputs on them before it was fine-tuned."""

from .bernoulli_retention import BernoulliRetention
from .build import build
from .cache import AnchorBatch, AnchorCache, AnchorCacheError
from .combined import CombinedRetention
from .fingerprint import fingerprint
from .hidden_retention import HiddenRetention
from .importers import convert
from .logit_retention import LogitRetention
from .online import OnlineRetention
from .output_retention import OutputRetention
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
    "BernoulliRetention",
    "CombinedRetention",
    "HiddenRetention",
    "LogitRetention",
    "OnlineRetention",
    "OutputRetention",
    "Reading",
    "Snapshot",
    "TokenRetention",
    "build",
    "convert",
    "fingerprint",
]
