"""The real PI0FastPolicy as the anchors see it."""

import pytest
import torch
from torch.nn import functional as F

from craft_optim import CraftOptimizer, anchors
from craft_optim.lerobot.adapters import adapter_for
from craft_optim.lerobot.pi0_fast import action_logits, action_mask, anchor_inputs, prefix_spans, run_prefix

POOLING = {"image": "masked_mean", "text": "masked_mean"}


@pytest.fixture
def batch(shipped):
    return shipped[2].train_batch(torch.arange(8))


@pytest.fixture
def old_batches(shipped):
    return [anchor_inputs(shipped[2].train_batch(rows)) for rows in torch.arange(48).split(16)]


def train_on_new(policy, shipped, optimizer, steps):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        rows = shipped[3].train_indices[torch.randint(len(shipped[3].train_indices), (8,), generator=generator)]
        loss, _ = policy.forward(shipped[3].train_batch(rows))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_logits_are_those_of_the_policys_own_loss(policy, batch):
    expected, _ = policy.forward(batch)
    logits = action_logits(policy, anchor_inputs(batch))
    mask = action_mask(batch)
    assert logits.shape[:2] == mask.shape
    loss = F.cross_entropy(logits[mask], batch["action.tokens"][:, 1:][mask])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def test_only_what_the_network_reads_is_an_anchor_input(batch):
    kept = anchor_inputs(batch | {"task": ["a"] * 8, "index": torch.arange(8)})
    assert {k for k in kept if not k.startswith("observation.image")} == {
        "observation.language.tokens",
        "observation.language.attention_mask",
        "action.tokens",
        "action.token_mask",
    }
    assert any(k.startswith("observation.image") for k in kept)


def test_a_batch_without_actions_says_what_it_has(policy, batch):
    del batch["action.tokens"]
    with pytest.raises(KeyError, match=r"observation\.language\.tokens"):
        action_logits(policy, batch)


def test_prefix_states_are_those_of_the_full_forward(policy, batch):
    from craft_optim.anchors.capture import resolve_layers, run

    layers = resolve_layers(policy, (0, 2, -1))
    _, prefix = run(policy, batch, forward=run_prefix, layers=layers, output=False)
    _, full = run(policy, batch, forward=action_logits, layers=layers)
    valid = prefix_spans(policy, batch)["all"]
    for layer in layers:
        n = prefix[layer].shape[1]
        torch.testing.assert_close(prefix[layer][valid], full[layer][:, :n][valid], rtol=1e-5, atol=1e-5)


def test_spans_count_every_camera_and_leave_padding_out(policy, batch):
    spans = prefix_spans(policy, batch)
    vision = policy.model.paligemma_with_expert.paligemma.config.vision_config
    per_image = (vision.image_size // vision.patch_size) ** 2
    text = batch["observation.language.attention_mask"].bool()
    assert spans["image"][:, :per_image].all()
    assert not spans["image"][:, per_image:].any()
    assert torch.equal(spans["text"][:, per_image:], text)
    assert not spans["text"][:, :per_image].any()
    assert torch.equal(spans["all"], spans["image"] | spans["text"])
    assert not text.all(), "the prompts here are padded, or this test shows nothing"


def build(policy, batches, path, kind):
    if kind == "logits":
        cache = anchors.build(policy, batches, path, anchors.Reading(action_logits, action_mask), class_dim=-1)
        return anchors.LogitRetention(policy, cache, batch_size=16)
    cache = anchors.build(
        policy,
        batches,
        path,
        anchors.Reading(run_prefix, spans=prefix_spans, pooling=POOLING),
        output=None,
        layers=(2, -1),
    )
    return anchors.HiddenRetention(policy, cache, batch_size=16)


@pytest.mark.parametrize("kind", ["logits", "hidden"])
def test_drift_is_zero_then_grows_and_is_held(policy, shipped, old_batches, tmp_path, kind):
    retention = build(policy, old_batches, tmp_path, kind)
    start = retention.drift()
    assert abs(start) < 1e-4
    weights = {name: tensor.clone() for name, tensor in policy.state_dict().items()}

    train_on_new(policy, shipped, torch.optim.AdamW(policy.parameters(), lr=1e-3), 40)
    unconstrained = retention.drift()

    policy.load_state_dict(weights)
    epsilon = unconstrained / 10
    base = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    optimizer = CraftOptimizer(base, retention, epsilon=epsilon)
    train_on_new(policy, shipped, optimizer, 40)
    assert optimizer.param_groups[0]["craft_anchor_position"] == 40
    assert retention.drift() < 0.5 * unconstrained


def test_images_are_cached_as_bytes_without_loss(policy, old_batches, tmp_path):
    retention = build(policy, old_batches, tmp_path, "logits")
    read = retention.cache.read(range(16)).inputs
    for name, tensor in old_batches[0].items():
        assert torch.equal(read[name], tensor), name
    image = next(name for name in read if name.startswith("observation.image"))
    assert retention.cache.shards[0].entries[f"inputs.{image}"].dtype == torch.uint8


def test_the_policys_own_actions_are_anchors_without_demonstrated_ones(policy, shipped, old_batches, tmp_path):
    prompts = [{key: x for key, x in batch.items() if not key.startswith("action")} for batch in old_batches]
    adapter = adapter_for(policy, keep="tokens")
    cache = adapter.build(policy, prompts, tmp_path, dtype=torch.float32)
    inputs, features = cache.read(range(48))
    policy.eval()
    with torch.no_grad():
        expected = policy.predict_action_chunk(prompts[0])
    policy.train()
    # what is stored is what the policy acts on
    written = torch.where(inputs["action.token_mask"], inputs["action.tokens"], 0)[:16, 1:]
    actions = policy.detokenize_actions(written, policy.config.n_action_steps, expected.shape[-1])
    torch.testing.assert_close(actions, expected)
    # each label is the next token; the marker is the last
    end = policy.model._paligemma_tokenizer.convert_tokens_to_ids("|")
    assert (features["tokens"] == end).sum() == 48
    assert torch.equal(features["tokens"].long(), inputs["action.tokens"][:, 1:][features["mask"]])
    agree = (action_logits(policy, inputs)[features["mask"]].argmax(-1) == features["tokens"]).float().mean()
    assert agree > 0.9

    retention = adapter.retention(policy, cache, batch_size=16)
    assert abs(retention().item()) < 1e-4
    train_on_new(policy, shipped, torch.optim.AdamW(policy.parameters(), lr=1e-3), 40)
    assert retention.drift() > 0.1
