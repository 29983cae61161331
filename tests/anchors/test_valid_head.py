"""The vocabulary head at valid positions, beside the whole head."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craft_optim.anchors.valid_head import head_agrees, head_at

Batches = Callable[..., list[dict[str, Any]]]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def gemma2() -> nn.Module:
    """Caps its logits."""
    transformers = pytest.importorskip("transformers")
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            final_logit_softcapping=0.5,
        )
    )


def lora_on_the_head(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    return nn.DataParallel(model)  # without devices it only wraps


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "vlm", "gemma2", "lora"])
def test_the_head_runs_at_valid_positions_only(
    name: str,
    autocast: bool,
    request: pytest.FixtureRequest,
    token_batches: Batches,
    image_text_batches: list[dict[str, Tensor]],
) -> None:
    torch.manual_seed(0)
    model = gemma2() if name == "gemma2" else request.getfixturevalue("llama" if name == "lora" else name)
    model = (lora_on_the_head(model) if name == "lora" else model).eval()
    batch = image_text_batches[0] if name == "vlm" else token_batches((4, 9))[0]
    valid = batch["attention_mask"].bool().clone()
    valid[:, :4] = valid[3] = False
    given: list[tuple[int, ...]] = []
    weights = [p for p in model.parameters() if p.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with head_at(model, valid) as seen:
            (head,) = {m.get_output_embeddings() for m in model.modules() if hasattr(m, "get_output_embeddings")} - {
                None
            }
            handle = head.register_forward_hook(lambda m, args, out: given.append(tuple(out.shape)))
            found = model(**batch).logits
        handle.remove()
        whole = model(**batch).logits
        assert head_agrees(model, batch, valid)
    assert seen.used
    assert found.shape == (1, int(valid.sum()), 60)
    assert given == [tuple(found.shape)]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found[0], whole[valid], **tolerance)
    expected = torch.autograd.grad(whole[valid].float().square().mean(), weights, allow_unused=True)
    gradients = torch.autograd.grad(found.float().square().mean(), weights, allow_unused=True)
    for a, b in zip(gradients, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **(tolerance | {"atol": tolerance["atol"] * float(b.abs().max())}))
    assert hooks(head) == 0


class Head(nn.Module):
    """A model with one vocabulary head, and what models do with it."""

    def __init__(self, after: str = "") -> None:
        super().__init__()
        self.embedding, self.head, self.after = nn.Embedding(20, 8), nn.Linear(8, 20), after

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.after == "secret" else self.head

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        if self.after == "functional":
            return nn.functional.linear(hidden, self.head.weight)
        if self.after == "flat":
            return self.head(hidden.flatten(0, 1)).unflatten(0, ids.shape)
        if self.after == "shorter":
            return self.head(hidden[:, 1:])
        logits = self.head(hidden)
        if self.after == "twice":
            return logits + self.head(hidden.flip(1)).flip(1)
        if self.after == "mixed":
            return logits - logits.mean(1, keepdim=True)
        if self.after == "last":
            return logits[:, -1]
        if self.after == "labels":
            nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        return logits * 3.0


def test_a_head_that_cannot_be_run_at_some_positions_runs_at_all() -> None:
    torch.manual_seed(0)
    ids, valid = torch.randint(0, 20, (3, 5)), torch.rand(3, 5) > 0.5
    with head_at(Head(), valid) as head:
        assert not head.used  # not yet
        assert Head()(ids).shape == (3, 5, 20)  # another model
    assert not head.used
    for after in ("secret", "functional", "flat", "shorter"):
        model = Head(after)
        with head_at(model, valid) as head:
            assert torch.equal(model(ids), model(ids))
        assert not head.used
        assert not head_agrees(model, ids, valid)
    model = Head()
    for mask in (torch.ones_like(valid), torch.zeros_like(valid), valid.flatten(), valid[:, :4], valid[:2]):
        with head_at(model, mask) as head:
            assert model(ids).shape == (3, 5, 20)
        assert not head.used
    with head_at(nn.ModuleList([model, Head()]), valid) as head:
        assert model(ids).shape == (3, 5, 20)
    assert not head.used
    with head_at(model, valid) as head:
        model.head(model.embedding(ids).as_subclass(nn.Parameter))
    assert not head.used


def test_what_a_model_does_to_its_logits_is_found_out() -> None:
    torch.manual_seed(0)
    ids, valid = torch.randint(0, 20, (3, 5)), torch.rand(3, 5) > 0.5
    assert head_agrees(Head(), ids, valid)
    for after in ("twice", "mixed", "last", "labels"):
        assert not head_agrees(Head(after), ids, valid)
    model = Head("twice")
    with head_at(model, valid) as head, pytest.raises(RuntimeError, match="size of tensor"):
        model(ids)
    assert not head.used
    assert head.calls == 2
    assert hooks(model) == 0
    whole = Head("labels")
    with pytest.raises(IndexError):  # an error of the model's own is no answer
        head_agrees(whole, ids + 20, valid)
