"""Retention with the teacher beside the model: a frozen copy, or the model within a context. Adapters: test_peft.py."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from craft_optim import CraftOptimizer
from craft_optim.anchors import AnchorMismatchError, LogitRetention, OnlineRetention, Reading, build

CLASSES = Reading(class_dim=-1)
Batches = Callable[..., list[dict[str, Any]]]


def disturb(model: nn.Module, scale: float = 0.05) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


def examples(batches: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    return [{name: x[i] for name, x in batch.items()} for batch in batches for i in range(len(batch["input_ids"]))]


@pytest.mark.parametrize("source", ["list", "tensor", "dataset", "cache"])
def test_it_is_logit_retention_without_the_cache(
    source: str, classifier: nn.Module, points: Tensor, tmp_path: Path
) -> None:
    teacher = copy.deepcopy(classifier)
    cache = build(classifier, points.split(7), tmp_path, dtype=torch.float32, class_dim=-1)
    anchors = {"list": list(points), "tensor": points, "dataset": TensorDataset(points), "cache": cache}[source]
    online = OnlineRetention(classifier, anchors, 16, teacher=teacher, reading=CLASSES)
    cached = LogitRetention(classifier, cache, 16)
    for _ in range(4):
        gradients = []
        for retention in (online, cached):
            classifier.zero_grad()
            loss = retention()
            loss.backward()
            gradients.append([loss.detach(), *(p.grad.clone() for p in classifier.parameters())])
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
        disturb(classifier)
    assert gradients[0][0] > 1e-3
    assert online.position == cached.position == 4
    assert online.drift() == pytest.approx(cached.drift(), rel=1e-5)
    assert online.drift(batch_size=50) == pytest.approx(online.drift(batch_size=7), rel=1e-5)
    assert online.drift(points[:20]) == pytest.approx(cached.drift([cache.read(range(20))]), rel=1e-5)
    assert online.drift(cache) == pytest.approx(cached.drift(), rel=1e-5)
    assert all(p.grad is None for p in teacher.parameters())
    assert online.parameters() == list(classifier.parameters())


def test_at_the_start_there_is_no_drift_to_the_bit(llama: nn.Module, token_batches: Batches) -> None:
    retention = OnlineRetention(llama, examples(token_batches((6, 9))), 4, teacher=copy.deepcopy(llama))
    assert retention().item() == 0.0
    assert retention.drift() == 0.0


def test_a_function_that_returns_a_context_is_a_teacher(classifier: nn.Module, points: Tensor) -> None:
    inside: list[bool] = []

    @contextmanager
    def original() -> Iterator[None]:
        now = {k: v.clone() for k, v in classifier.state_dict().items()}
        classifier.load_state_dict(before)
        try:
            inside.append(torch.is_grad_enabled())
            yield
        finally:
            classifier.load_state_dict(now)

    before = copy.deepcopy(classifier.state_dict())
    frozen = copy.deepcopy(classifier)
    disturb(classifier)
    retention = OnlineRetention(classifier, points, 16, teacher=original, strict=False, reading=CLASSES)
    expected = OnlineRetention(classifier, points, 16, teacher=frozen, strict=False, reading=CLASSES)
    assert retention().item() == expected().item() > 1e-3
    assert retention.drift() == expected.drift()
    assert not any(inside)


def test_the_teacher_is_steady_and_keeps_its_mode(noisy: Any, points: Tensor) -> None:
    teacher = copy.deepcopy(noisy).train()
    statistics = teacher.body[1].running_mean.clone()
    retention = OnlineRetention(noisy, points, 16, teacher=teacher, reading=CLASSES)
    assert retention().item() < 1e-6
    assert all(m.training for m in teacher.modules())
    assert torch.equal(statistics, teacher.body[1].running_mean)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_around_a_pass_notices(fails: bool, noisy: Any, points: Tensor) -> None:
    teacher = copy.deepcopy(noisy)

    class Drawing(Dataset[Tensor]):
        """Augments with every generator there is."""

        def __len__(self) -> int:
            return len(points)

        def __getitem__(self, i: int) -> Tensor:
            noise = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
            drawn.append(noise)
            return points[i] + noise

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = model(x + torch.rand_like(x))
        if fails and model is noisy:
            raise RuntimeError("out of memory")
        return out

    def generators() -> list[Any]:
        return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002

    drawn: list[float] = []
    retention = OnlineRetention(noisy, Drawing(), 16, teacher=teacher, reading=Reading(forward, class_dim=-1))
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = generators()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = [[m.training for m in model.modules()] for model in (noisy, teacher)]
    for run in (retention, retention.drift):
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                run()
        else:
            assert abs(torch.as_tensor(run()).item()) < 1e-5, "teacher and model see the same noise"
    assert generators() == expected
    assert before == [[m.training for m in model.modules()] for model in (noisy, teacher)]
    assert retention.position == (0 if fails else 1)
    if not fails:
        again = drawn[:16]
        drawn.clear()
        retention.position = 0
        retention()
        assert drawn == again


def test_which_positions_count(llama: nn.Module, token_batches: Batches) -> None:
    batches = token_batches((4, 6))
    teacher = copy.deepcopy(llama)
    disturb(llama, 0.02)
    with torch.no_grad():
        p, q = (m.eval()(**batches[0]).logits.double().log_softmax(-1) for m in (teacher, llama))
    kl = (p.exp() * (p - q)).sum(-1)

    def drift(rows: list[Any], mask: Any = None, collate: Any = None) -> float:
        settings: dict[str, Any] = {"reading": Reading(mask=mask), "collate": collate, "strict": False}
        return OnlineRetention(llama, rows, 3, teacher=teacher, **settings).drift()

    rows = examples(batches)
    attended = batches[0]["attention_mask"].bool()
    assert not attended.all()
    assert drift(rows) == pytest.approx(float(kl[attended].mean()), rel=1e-4)
    assert drift(rows, "attention_mask") == pytest.approx(float(kl[attended].mean()), rel=1e-4)
    assert drift(rows, lambda b: b["input_ids"] > 20) == pytest.approx(
        float(kl[batches[0]["input_ids"] > 20].mean()), rel=1e-4
    )
    bare = [{"input_ids": row["input_ids"]} for row in rows]
    with torch.no_grad():
        p, q = (m(input_ids=batches[0]["input_ids"]).logits.double().log_softmax(-1) for m in (teacher, llama))
    assert drift(bare) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    with pytest.raises(ValueError, match="selects none"):
        drift(rows, lambda b: b["input_ids"] < 0)
    with pytest.raises(ValueError, match=r"must have shape \(3, 6\)\. Found \(3, 5\)"):
        drift(rows, lambda b: b["input_ids"][:, 1:] > 0)


def test_a_collator_of_transformers(llama: nn.Module) -> None:
    """Ragged examples, padded by the collator; its labels make nobody compute a loss, and can be the mask."""
    transformers = pytest.importorskip("transformers")

    class Tokenizer:
        """What the collator needs of one."""

        padding_side = "right"

        def pad(self, rows: Any, **_: Any) -> dict[str, Tensor]:
            width = max(len(row["input_ids"]) for row in rows)
            ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
            return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    collate = transformers.DataCollatorForSeq2Seq(Tokenizer(), label_pad_token_id=-100)
    rows = [{"input_ids": list(range(1, n)), "labels": [-100, *range(2, n)]} for n in (4, 9, 6, 7, 5)]
    seen: list[set[str]] = []
    llama.register_forward_pre_hook(lambda m, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    teacher = copy.deepcopy(llama)
    disturb(llama, 0.02)
    masks = {"attended": None, "answers": lambda batch: batch["labels"] != -100}
    drifts = {}
    for name, mask in masks.items():
        settings: dict[str, Any] = {"reading": Reading(mask=mask), "collate": collate, "strict": False}
        retention = OnlineRetention(llama, rows, 2, teacher=teacher, **settings)
        assert retention().requires_grad
        drifts[name] = retention.drift()
    assert all("labels" not in names and "input_ids" in names for names in seen)
    total, counted = dict.fromkeys(masks, 0.0), dict.fromkeys(masks, 0)
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            p, q = (m.eval()(input_ids=ids).logits.double().log_softmax(-1) for m in (teacher, llama))
        kl = (p.exp() * (p - q)).sum(-1)[0]
        for name in masks:
            kept = kl if name == "attended" else kl[torch.tensor(row["labels"]) != -100]
            total[name], counted[name] = total[name] + float(kept.sum()), counted[name] + len(kept)
    for name, drift in drifts.items():
        assert drift == pytest.approx(total[name] / counted[name], rel=1e-4)
    with pytest.raises(TypeError, match=r"lists of tensors in \['input_ids', 'labels'\].*Pass a collator.*collate="):
        OnlineRetention(llama, [rows[0]] * 3, 2, teacher=teacher)()
    tensors = [{name: torch.tensor(x) for name, x in row.items()} for row in rows]
    for ragged in (rows, tensors):
        with pytest.raises(TypeError, match=r"tensors of the examples.*differ in length.*Pass a collator.*collate="):
            OnlineRetention(llama, ragged, 2, teacher=teacher)()
    for texts in (["a", "b", "c"], [{"text": "a"}] * 3):
        with pytest.raises(TypeError, match="tokenize texts first"):
            OnlineRetention(llama, texts, 2, teacher=teacher)()


def test_an_encoder_decoder_keeps_the_labels_that_it_needs() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )
    ids, labels = torch.randint(1, 40, (4, 5)), torch.randint(1, 40, (4, 5))
    labels[1:, -2:] = -100
    teacher = copy.deepcopy(model)
    disturb(model)
    rows = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)
    ]
    drift = OnlineRetention(model, rows, 4, teacher=teacher, strict=False).drift()
    with torch.no_grad():
        p, q = (m.eval()(input_ids=ids, labels=labels).logits.double().log_softmax(-1) for m in (teacher, model))
    assert drift == pytest.approx(float((p.exp() * (p - q)).sum(-1)[labels != -100].mean()), rel=1e-4)


@pytest.mark.parametrize("use_autocast", [False, True])
def test_autocast_leaves_the_model_its_graph(use_autocast: bool, classifier: nn.Module, points: Tensor) -> None:
    """Weights that the teacher's pass cast without a graph must not serve the model's."""

    @contextmanager
    def original() -> Iterator[None]:
        yield

    reading = Reading(autocast=torch.bfloat16 if use_autocast else None, class_dim=-1)
    retention = OnlineRetention(classifier, points, 16, teacher=original, reading=reading)
    with torch.autocast("cpu", torch.bfloat16, enabled=not use_autocast):
        retention().backward()
    assert all(p.grad is not None for p in classifier.parameters())


def test_with_the_optimizer_it_holds_epsilon(classifier: nn.Module, points: Tensor) -> None:
    start = copy.deepcopy(classifier.state_dict())
    drifts = {}
    for name in ("adam", "craft"):
        classifier.load_state_dict(start)
        retention = OnlineRetention(classifier, points, 25, teacher=copy.deepcopy(classifier), reading=CLASSES)
        optimizer: torch.optim.Optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3)
        if name == "craft":
            optimizer = CraftOptimizer(optimizer, retention, epsilon=0.02)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(classifier(points + 1.0), torch.zeros(50, dtype=torch.long)).backward()
            optimizer.step()
        drifts[name] = retention.drift()
    assert drifts["adam"] > 0.2
    assert drifts["craft"] < 0.03


# What is refused


@pytest.mark.parametrize("kind", ["none", "shared", "itself", "string", "weights"])
def test_a_teacher_that_does_not_serve(kind: str, classifier: nn.Sequential, points: Tensor) -> None:
    teacher: Any = {
        "none": None,
        "shared": nn.Sequential(nn.Linear(6, 16), nn.Tanh(), classifier[2]),
        "itself": classifier,
        "string": "base",
        "weights": nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)),
    }[kind]
    error: tuple[type[Exception], str] = {
        "none": (ValueError, r"Sequential has no adapters.*Pass teacher="),
        "shared": (ValueError, r"shares 2 trainable parameters with the model, such as 2\.weight"),
        "itself": (ValueError, "shares 4 trainable parameters"),
        "string": (TypeError, "Found str"),
        "weights": (AnchorMismatchError, "does not reproduce its teacher.*other weights"),
    }[kind]
    with pytest.raises(error[0], match=error[1]):
        OnlineRetention(classifier, points, 16, teacher=teacher, reading=CLASSES)()


def test_a_teacher_that_becomes_trainable_with_the_model_is_refused(classifier: nn.Sequential, points: Tensor) -> None:
    teacher = nn.Sequential(copy.deepcopy(classifier[0]), nn.Tanh(), classifier[2])
    classifier[2].requires_grad_(False)
    retention = OnlineRetention(classifier, points, 16, teacher=teacher, reading=CLASSES)
    retention()
    classifier[2].requires_grad_(True)
    with pytest.raises(ValueError, match="shares 2 trainable parameters"):
        retention()
    assert retention.position == 1


def test_outputs_that_do_not_fit(classifier: nn.Module, points: Tensor) -> None:
    wide = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    with pytest.raises(AnchorMismatchError, match=r"\(16, 4\).*5 classes"):
        OnlineRetention(classifier, points, 16, teacher=wide, reading=CLASSES)()
    with pytest.raises(ValueError, match=r"must give its output.*Found NoneType"):
        OnlineRetention(classifier, points, 16, teacher=wide, reading=Reading(lambda m, x: None, class_dim=-1))()


def test_anchors_that_are_not_examples(classifier: nn.Module, points: Tensor) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(points)

    teacher = copy.deepcopy(classifier)
    for anchors in (DataLoader(TensorDataset(points)), Stream(), {"0": points}, iter(points)):
        with pytest.raises(TypeError, match="map-style dataset"):
            OnlineRetention(classifier, anchors, 16, teacher=teacher, reading=CLASSES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size <= 50"):
        OnlineRetention(classifier, points, 51, teacher=teacher, reading=CLASSES)
    with pytest.raises(ValueError, match="at least one batch"):
        OnlineRetention(classifier, points, 5, teacher=teacher, reading=CLASSES).drift([])
