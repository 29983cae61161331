"""How many classes are held by default, and what is said of those that are not."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from craft_optim.anchors import AnchorCache, LogitRetention, build
from craft_optim.anchors.kept import KeptMean, top_k_of
from craft_optim.anchors.losses import kl_divergence, topk_kl_divergence
from craft_optim.cli import main


class Heads(nn.Module):
    """Two softmaxes, of few and of many classes."""

    def __init__(self, few: int, many: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.few, self.many = nn.Linear(6, few), nn.Linear(6, many)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"few": self.few(x), "many": 6.0 * self.many(x)}


def points(count: int = 20) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


BOTH = {"few": "classes", "many": "classes"}


def test_of_many_classes_the_likeliest_are_held_by_default(tmp_path: Path) -> None:
    cache = build(Heads(4096, 4097), [points()], tmp_path, output=BOTH, class_dim=-1, progress=False)
    assert cache.features.describe().startswith("few: full logits of 4096")
    assert "many: the top 64 of 4097" in cache.features.describe()
    features = cache.read([0]).features
    assert features["logprobs.few"].shape == (1, 4096)
    assert features["topk_indices.many"].shape == (1, 64)
    assert AnchorCache.open(tmp_path).features == cache.features
    model = Heads(4096, 4097)
    for name in BOTH:
        assert abs(LogitRetention(model, cache, 8, output=name).loss(0).item()) < 1e-5


def test_all_are_held_if_asked_for(tmp_path: Path) -> None:
    cache = build(Heads(3, 5000), [points()], tmp_path, output=BOTH, class_dim=-1, top_k="all", progress=False)
    assert cache.read([0]).features["logprobs.many"].shape == (1, 5000)
    assert cache.kept() == {}


def test_labels_and_values_of_any_number_are_held_as_they_are(tmp_path: Path) -> None:
    wide = nn.Linear(6, 5000)
    for kind in ("labels", "values"):
        cache = build(wide, [points()], tmp_path / kind, output=kind, progress=False)
        assert cache.kept() == {}
        (found,) = (x for key, x in cache.read([0]).features.items() if key in ("logits", "values"))
        assert found.shape == (1, 5000)


@pytest.mark.parametrize("value", ["none", None, 0, True, 1.5])
def test_anything_else_is_refused(value: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="top_k"):
        build(nn.Linear(6, 3), [points()], tmp_path, class_dim=-1, top_k=value)
    assert not list(tmp_path.iterdir())


def test_what_is_kept_is_measured_at_the_valid_positions_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    head, x = nn.Linear(6, 300), torch.randn(10, 5, 6)
    mask = torch.rand(10, 5) > 0.4
    mask[:, 0] = True
    x[~mask] = 100.0  # what padding holds has no part in it
    with caplog.at_level(logging.INFO, "craft_optim"):
        cache = build(
            head, [(x, mask)], tmp_path, forward=lambda model, batch: 3.0 * model(batch[0]),
            mask=lambda batch: batch[1], top_k=20, class_dim=-1, dtype=torch.float32, progress=False,
        )  # fmt: skip
    p = F.softmax(3.0 * head(x[mask]).detach().double(), -1).sort(descending=True).values
    mass, squares = p[:, :20].sum(-1), p[:, :20].square().sum(-1)
    (kept,) = cache.kept().values()
    assert kept.k == 20
    assert kept.mass == pytest.approx(mass.mean().item(), abs=1e-6)
    assert kept.unseen == pytest.approx(((1 - mass).sum() / (1 - squares).sum()).item(), abs=1e-6)
    words = f"the 20 likeliest of 300 classes hold {kept.mass:.3f} of the probability"
    assert any(words in message for message in caplog.messages)
    assert main(["inspect", str(tmp_path)]) == 0
    assert words in capsys.readouterr().out


def test_all_classes_leave_nothing_out(tmp_path: Path) -> None:
    cache = build(nn.Linear(6, 9), [points()], tmp_path, class_dim=-1, top_k=9, dtype=torch.float32)
    (kept,) = cache.kept().values()
    assert (kept.mass, kept.unseen) == (1.0, 0.0)


def test_the_estimate_is_right_where_all_logits_move_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 2.0 * torch.randn(4000, 400, generator=generator, dtype=torch.float64)
    student = teacher + 0.05 * torch.randn(4000, 400, generator=generator, dtype=torch.float64)
    logprobs = teacher.log_softmax(-1)
    top = logprobs.topk(32)
    rest = logprobs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    total = KeptMean()
    for part in range(0, 4000, 1000):
        total.add(top.values[part : part + 1000], rest[part : part + 1000])
    seen = topk_kl_divergence(student, top.values, top.indices, None, rest)
    lost = 1.0 - (seen / kl_divergence(student, teacher)).item()
    assert total.result().unseen == pytest.approx(lost, abs=0.02)
    assert total.result().mass == pytest.approx(top.values.exp().sum(-1).mean().item())


def test_arguments_as_a_spec_has_them() -> None:
    assert top_k_of("auto") == {"logits": "auto", "top_k": 64, "full_up_to": 4096}
    assert top_k_of("all") == {"logits": "full"}
    assert top_k_of(7) == {"logits": "top_k", "top_k": 7}
