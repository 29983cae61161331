"""A retention pass over many classes, in pieces of positions, over the same distance as autograd takes it apart.

make bench GROUP=head
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peak_memory import peak_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from craft_optim.anchors import AnchorCache, LogitRetention, build, losses

Compare = Callable[..., None]
Note = Callable[..., None]

POSITIONS, WIDTH, TOP_K = 512, 256, 64
CLASSES = {257_152: 5, 49_152: 9, 1_000: 31}
"""Classes of PaliGemma, of SmolLM2 and of a classifier; rounds"""


class Head(nn.Module):
    """Hidden states that train, and a head that does not; it may be found, or not."""

    def __init__(self, classes: int, found: bool) -> None:
        super().__init__()
        self.found = found
        self.hidden = nn.Parameter(torch.randn(POSITIONS, WIDTH))
        self.head = nn.Linear(WIDTH, classes, bias=False).requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.head if self.found else None

    def forward(self, places: Tensor) -> Tensor:
        logits: Tensor = self.head(self.hidden[places])
        return logits


def prepared(classes: int, device: torch.device, path: Path, given: bool) -> tuple[Head, AnchorCache, Tensor]:
    """A model that has moved, and its cache."""
    torch.manual_seed(0)
    model, places = Head(classes, not given).to(device), torch.arange(POSITIONS).view(8, -1)
    cache = build(model, [places], path, top_k=TOP_K, class_dim=-1, progress=False)
    with torch.no_grad():
        model.hidden.add_(torch.randn_like(model.hidden), alpha=0.1)
    return model, cache, places


def by_formula(model: Head, cache: AnchorCache, places: Tensor, device: torch.device) -> Callable[[], None]:
    """The pass as it was before: the distance of `losses`, and autograd's backward."""
    teacher = {name: x.to(device).flatten(0, 1) for name, x in cache.read(range(8)).features.items()}

    def run() -> None:
        logits = model(places.to(device)).flatten(0, 1)
        losses.topk_kl_divergence(
            logits, teacher["topk_logprobs"], teacher["topk_indices"], teacher_rest_logprob=teacher["rest_logprob"]
        ).backward()  # type: ignore[no-untyped-call]

    return run


def plain_kl(model: Head, device: torch.device) -> Callable[[], None]:
    """A KL penalty as one writes it, from logits of all classes that are there."""
    with torch.no_grad():
        teacher = model.head(model.hidden).log_softmax(-1)

    def run() -> None:
        student = model.head(model.hidden).log_softmax(-1)
        F.kl_div(student, teacher, log_target=True, reduction="batchmean").backward()  # type: ignore[no-untyped-call]

    return run


@pytest.mark.benchmark(group="head")
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("given", [False, True], ids=["left out", "given"])
def test_pass(compare: Compare, note: Note, device: torch.device, tmp_path: Path, classes: int, given: bool) -> None:
    model, cache, places = prepared(classes, device, tmp_path, given)
    retention = LogitRetention(model, cache, 8, strict=False, workers=0)

    def ours() -> None:
        retention().backward()  # type: ignore[no-untyped-call]

    formula = by_formula(model, cache, places, device)
    ours()
    what = f"pass over {classes} classes{', logits given' if given else ''}"
    compare(what, ours, formula, rounds=CLASSES[classes])
    copy = 4 * POSITIONS * classes
    note(f"memory, {what}", peak_bytes(ours, device) / copy, "copies")
    if not given:
        note(f"memory, the formula's {what}", peak_bytes(formula, device) / copy, "copies")
        note(f"memory, plain KL's {what}", peak_bytes(plain_kl(model, device), device) / copy, "copies")
