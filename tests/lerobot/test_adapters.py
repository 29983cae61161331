"""lerobot's real pi0, pi05, SmolVLA, ACT and diffusion policy, and pi0_fast by the same entry, as anchors see them."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import small
import torch
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from torch import nn

from craft_optim import anchors
from craft_optim.anchors.capture import resolve_layers, run
from craft_optim.anchors.passes import steady
from craft_optim.lerobot import act, adapter_for, anchor_batches, diffusion, freeze_statistics, pi0, smolvla
from craft_optim.lerobot._shared import observed

ABSENT, TOP, WRIST = small.ABSENT, small.TOP, small.WRIST
FLOW = {"pi0": pi0, "pi05": pi0, "smolvla": smolvla}
TRAINED = {"smolvla": {"train_expert_only": False}}
KEPT = [
    ("pi0", "actions"),
    ("pi0", "prefix"),
    ("pi05", "actions"),
    ("pi05", "prefix"),
    ("smolvla", "actions"),
    ("smolvla", "prefix"),
    ("diffusion", "actions"),
    ("act", "actions"),
]

PALIGEMMA = "model.paligemma_with_expert.paligemma."
SMOLVLM = "model.vlm_with_expert.vlm.model."
HEADS = ("model.action_in_proj", "model.action_out_proj")
MIXER = ("model.action_time_mlp_in", "model.action_time_mlp_out")
SEEN = ("vision_tower", "multi_modal_projector", "language_model.layers.0", "language_model.embed_tokens")
PI_PREFIX = tuple(f"{PALIGEMMA}model.{part}" for part in SEEN)
SMOL_PREFIX = tuple(f"{SMOLVLM}{part}" for part in ("connector", "text_model.layers.0", "text_model.embed_tokens"))
PI_EXPERT = ("model.paligemma_with_expert.gemma_expert", *HEADS)
CAMERAS = tuple(f"diffusion.rgb_encoder.{part}" for part in ("backbone", "pool", "out"))
PARTS = ("diffusion_step_encoder", "down_modules.0", "mid_modules", "up_modules", "final_conv")
UNET = tuple(f"diffusion.unet.{part}" for part in PARTS)
# (policy, what is kept) -> modules that its gradient reaches, and modules that it does not
REACHED = {
    ("pi0", "actions"): (PI_PREFIX + PI_EXPERT + MIXER + ("model.state_proj",), (f"{PALIGEMMA}lm_head",)),
    ("pi0", "prefix"): (PI_PREFIX, PI_EXPERT + MIXER + ("model.state_proj", f"{PALIGEMMA}lm_head")),
    ("pi05", "actions"): (PI_PREFIX + PI_EXPERT + ("model.time_mlp_in",), (f"{PALIGEMMA}lm_head",)),
    ("pi05", "prefix"): (PI_PREFIX, (*PI_EXPERT, "model.time_mlp_in", f"{PALIGEMMA}lm_head")),
    ("smolvla", "actions"): (
        ("model.vlm_with_expert.lm_expert", "model.state_proj", *HEADS, *MIXER),
        ("model.vlm_with_expert.vlm",),
    ),
    ("smolvla", "prefix"): (
        SMOL_PREFIX,
        # Images and text do not attend to the state; the vision tower is frozen.
        ("model.vlm_with_expert.lm_expert", "model.state_proj", *HEADS, *MIXER, f"{SMOLVLM}vision_model"),
    ),
    ("diffusion", "actions"): ((*CAMERAS, *UNET), ()),
    ("act", "actions"): (
        tuple(f"model.{part}" for part in ("backbone", "encoder.", "encoder_robot_state", "decoder.", "action_head")),
        ("model.vae_encoder",),
    ),
}


@pytest.fixture
def make(tmp_path):
    """Policy name and settings -> the policy at toy size."""
    return lambda name, **settings: small.build(name, tmp_path, **settings)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """Policy name -> eight frames, two cameras, after the policy's own preprocessor."""
    batches = {}

    def frames(name):
        if name not in batches:
            policy = small.build(name, tmp_path_factory.mktemp(name))
            dataset = small.TwoCameras(policy.config)
            collect = replace(adapter_for(policy), inputs=dict)
            prepare = small.preprocessor(policy, dataset.stats)
            # The last frames of the second episode are among them: of their actions some are padding.
            rows = [0, 31, 62, 93, 124, 155, 184, 185]
            (batches[name],) = anchor_batches(dataset, prepare, collect, batch_size=8, indices=rows)
        return dict(batches[name])

    return frames


def perturb(policy, scale=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += scale * parameter.std(correction=0) * noise.to(parameter.dtype)


def gradients(policy, retention):
    policy.zero_grad()
    retention().backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize(("name", "keep"), KEPT)
def test_drift_is_zero_then_grows_and_its_gradient_reaches_what_is_held(make, prepared, tmp_path, name, keep):
    policy = make(name, **TRAINED.get(name, {}) if keep == "prefix" else {})
    adapter = adapter_for(policy, keep)
    batch = adapter.inputs(prepared(name))
    cache = adapter.build(policy, [batch], tmp_path / "anchors")
    retention = adapter.retention(policy, cache, batch_size=8, strict=False)
    modes = [module.training for module in policy.modules()]
    assert 0.0 <= retention.drift() < 1e-4
    assert retention().item() == pytest.approx(retention.drift(), abs=1e-6)
    perturb(policy)
    assert retention.drift() > 1e-3
    reached = gradients(policy, retention)
    inside, outside = REACHED[name, keep]
    for module in inside:
        assert any(key.startswith(module) for key in reached), f"{module} gets no gradient"
    for module in outside:
        assert any(key.startswith(module) for key, _ in policy.named_parameters())
        assert not [key for key in reached if key.startswith(module)]
    assert [module.training for module in policy.modules()] == modes


@pytest.mark.parametrize("keep", ["logits", "prefix"])
def test_pi0_fast_by_the_same_entry(policy, shipped, tmp_path, keep):
    adapter = adapter_for(policy, None if keep == "logits" else keep)
    assert (adapter.keep, adapter.kind) == (keep, "logits" if keep == "logits" else "hidden")
    batch = adapter.inputs(shipped[2].train_batch(torch.arange(8)))
    assert ("action.tokens" in batch) == (keep == "logits")
    retention = adapter.retention(policy, adapter.build(policy, [batch], tmp_path), batch_size=8)
    assert 0.0 <= retention().item() < 1e-4
    perturb(policy)
    assert retention.drift() > 1e-3


@pytest.mark.parametrize("name", FLOW)
def test_prefix_states_are_those_of_the_training_forward(make, prepared, name):
    policy, batch = make(name), prepared(name)
    layers = resolve_layers(policy, (0, 1, -1))
    inputs = FLOW[name].prefix_inputs(policy, batch)
    _, prefix = run(policy, inputs, forward=FLOW[name].run_prefix, layers=layers, output=False)
    _, full = run(policy, {**batch, **inputs}, forward=lambda policy, batch: policy.forward(batch), layers=layers)
    valid = FLOW[name].prefix_spans(policy, inputs)["all"]
    assert not valid.all(), "something here is padded, or this test shows nothing"
    for layer in layers:
        assert prefix[layer].shape[:2] == valid.shape
        torch.testing.assert_close(prefix[layer][valid], full[layer][:, : valid.shape[1]][valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FLOW)
def test_velocities_are_those_of_the_policys_own_loss(make, prepared, name):
    policy = make(name)
    batch = prepared(name)
    batch.pop("action_is_pad")
    adapter = adapter_for(policy)
    inputs = adapter.inputs(batch)
    _, hidden = run(policy, inputs, forward=adapter.reading.forward, layers=adapter.layers, output=False)
    drawn = {"sample_noise": inputs["anchor.noise"], "sample_time": inputs["anchor.time"]}
    with mock.patch.multiple(policy.model, **{key: mock.Mock(return_value=value) for key, value in drawn.items()}):
        expected, _ = policy.forward(batch | inputs)
    target = inputs["anchor.noise"][..., :4] - inputs["action"]
    errors = (target - hidden[adapter.layers[0]]) ** 2
    torch.testing.assert_close(errors.mean(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FLOW)
def test_padded_action_dimensions_are_not_held(make, prepared, tmp_path, name):
    policy = make(name)
    adapter = adapter_for(policy)
    inputs = adapter.inputs(prepared(name))
    cache = adapter.build(policy, [inputs], tmp_path / "anchors")
    kept = cache.read(range(8)).features[f"hidden.module:{adapter.layers[0]}.all"]
    assert kept.shape[-1] == inputs["action"].shape[-1] < policy.config.max_action_dim
    retention = adapter.retention(policy, cache, batch_size=8)
    before = retention.drift()
    head = policy.model.action_out_proj
    with torch.no_grad():
        head.weight[4:] += 1.0
    assert retention.drift() == before
    retention().backward()
    assert head.weight.grad[:4].any()
    assert not head.weight.grad[4:].any()


@pytest.mark.parametrize("name", FLOW)
def test_a_forward_to_its_end_gives_the_same(make, prepared, name):
    policy = make(name)
    adapter = adapter_for(policy)
    inputs = adapter.inputs(prepared(name))
    short, whole = (
        run(policy, inputs, forward=adapter.reading.forward, layers=adapter.layers, output=output)[1]
        for output in (False, True)  # as under FSDP: the policy goes on with velocities of all dimensions
    )
    assert torch.equal(short[adapter.layers[0]], whole[adapter.layers[0]])


def test_what_hooks_observe_is_not_what_the_caller_gets():
    module, seen, x = nn.Linear(2, 3), [], torch.ones(4, 2)
    module.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = module(x)
    with observed(module, lambda output: output[:, :1]):
        assert torch.equal(module(x), expected)
        assert torch.equal(module(x), expected)
    assert [tuple(output.shape) for output in seen] == [(4, 3), (4, 1), (4, 1)]
    with pytest.raises(IndexError), observed(module, lambda output: output[..., 0, 0, 0]):
        module(x)
    assert torch.equal(module(x), expected)
    assert seen[-1].shape == (4, 3)
    assert len(module._forward_hooks) == 1


@pytest.mark.parametrize("name", FLOW)
def test_an_absent_camera_is_masked_and_without_influence(make, prepared, name):
    policy = make(name)
    module = FLOW[name]
    inputs = module.prefix_inputs(policy, {key: x for key, x in prepared(name).items() if key != TOP})

    def text_states():
        spans = module.prefix_spans(policy, inputs)
        _, hidden = run(policy, inputs, forward=module.run_prefix, layers=(1,), output=False)
        return spans, hidden[1][spans["text"]]

    spans, with_absent = text_states()
    per_image = (small.IMAGE // small.PATCH) ** 2
    # The cameras of the batch come first, whatever the policy's order.
    assert spans[f"image.{WRIST}"][:, :per_image].all()
    assert torch.equal(spans["image"], spans[f"image.{WRIST}"])
    assert not spans[f"image.{TOP}"].any()
    policy.config.input_features = {WRIST: policy.config.input_features[WRIST]}
    alone, without_absent = text_states()
    assert alone["all"].shape[1] < spans["all"].shape[1]
    torch.testing.assert_close(with_absent, without_absent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FLOW)
def test_spans_part_the_prefix_by_camera_and_text(make, prepared, name):
    policy = make(name)
    inputs = FLOW[name].prefix_inputs(policy, prepared(name))
    spans = FLOW[name].prefix_spans(policy, inputs)
    per_image = (small.IMAGE // small.PATCH) ** 2
    assert spans[f"image.{TOP}"][:, :per_image].all()
    assert spans[f"image.{WRIST}"][:, per_image : 2 * per_image].all()
    assert spans["image"].sum() == len(inputs[TOP]) * 2 * per_image
    start = 3 * per_image  # one camera is absent
    mask = inputs["observation.language.attention_mask"]
    assert torch.equal(spans["text"][:, start : start + mask.shape[1]], mask)
    parts = [spans[part] for part in ("image", "text", "state") if part in spans]
    assert torch.equal(torch.stack(parts).sum(0), spans["all"].long())
    assert ("state" in spans) == (name == "smolvla")


def test_smolvlas_marks_around_images_and_its_fixed_length(make, prepared):
    policy = make("smolvla", add_image_special_tokens=True, prefix_length=60)
    inputs = smolvla.prefix_inputs(policy, prepared("smolvla"))
    spans = smolvla.prefix_spans(policy, inputs)
    embedded = []
    embed = policy.model.embed_prefix
    with mock.patch.object(
        policy.model, "embed_prefix", lambda *args, **kw: embedded.append(embed(*args, **kw)) or embedded[0]
    ):
        smolvla.run_prefix(policy, inputs)
    assert torch.equal(spans["all"], embedded[0][1].bool())
    assert spans[f"image.{TOP}"].nonzero()[:, 1].unique().tolist() == [2, 3, 4, 5]
    assert spans["state"].sum() == len(spans["state"])


def test_smolvlas_positions_do_not_depend_on_the_longest_prompt_of_a_batch(make, prepared, tmp_path):
    policy = make("smolvla", train_expert_only=False)
    adapter = adapter_for(policy, "prefix")
    pooling = {"text": "masked_mean", "state": "masked_mean"}
    adapter = replace(adapter, reading=replace(adapter.reading, pooling=pooling))
    batch = prepared("smolvla")
    lengths = batch["observation.language.attention_mask"].sum(1)
    assert lengths.min() < lengths.max(), "prompts of one length show nothing"
    shortest = (lengths == lengths.min()).nonzero().flatten()
    short = {key: x[shortest] for key, x in batch.items() if isinstance(x, torch.Tensor) and x.ndim}
    for key in ("observation.language.tokens", "observation.language.attention_mask"):
        short[key] = short[key][:, : lengths.min()]
    cache = adapter.build(policy, [adapter.inputs(short), adapter.inputs(batch)], tmp_path / "anchors")
    assert adapter.retention(policy, cache, batch_size=5).drift() < 1e-4


def test_frozen_parts_are_named_and_nothing_is_held_where_nothing_moves(make):
    policy = make("smolvla")
    assert adapter_for(policy).frozen == ("model.vlm_with_expert.vlm",)
    with pytest.raises(ValueError, match="keep='actions'"):
        adapter_for(policy, "prefix")
    assert f"{SMOLVLM}vision_model" in adapter_for(make("smolvla", train_expert_only=False), "prefix").frozen
    with pytest.raises(ValueError, match=r"frozen.*train_expert_only=False"):
        adapter_for(make("pi0", train_expert_only=True), "prefix")


def test_hidden_states_of_smolvlas_action_expert(make, prepared, tmp_path):
    policy = make("smolvla")
    adapter = replace(adapter_for(policy), layers=("model.vlm_with_expert.lm_expert.norm",))
    cache = adapter.build(policy, [adapter.inputs(prepared("smolvla"))], tmp_path / "anchors")
    retention = adapter.retention(policy, cache, batch_size=8)
    retention()
    perturb(policy)
    reached = gradients(policy, retention)
    assert any(key.startswith("model.vlm_with_expert.lm_expert.layers.0") for key in reached)
    assert not any(key.startswith("model.action_out_proj") for key in reached)


@pytest.mark.parametrize(("name", "module"), [("pi0", pi0), ("diffusion", diffusion)])
def test_noise_belongs_to_the_anchor_not_to_its_batch(make, prepared, name, module):
    policy, batch = make(name), prepared(name)
    state = torch.get_rng_state()
    whole = module.action_inputs(policy, batch)
    rows = torch.tensor([5, 2])
    part = module.action_inputs(
        policy, {key: x[rows] for key, x in batch.items() if isinstance(x, torch.Tensor) and x.ndim}
    )
    for key in ("anchor.noise", "anchor.time"):
        assert torch.equal(part[key], whole[key][rows])
    assert len(whole["anchor.noise"].flatten(1).unique(dim=0)) == 8
    assert len(whole["anchor.time"].unique()) > 4
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(module.action_inputs(policy, whole)["anchor.noise"], whole["anchor.noise"])


def test_smolvlas_conversion_for_aloha_leaves_the_anchors_alone(make, prepared):
    policy = make("smolvla", adapt_to_pi_aloha=True)
    inputs = smolvla.action_inputs(policy, prepared("smolvla"))
    before = {key: x.clone() for key, x in inputs.items()}
    halve = mock.Mock(side_effect=lambda x: x.mul_(0.5))
    with mock.patch.multiple(policy, _pi_aloha_decode_state=halve, _pi_aloha_encode_actions_inv=halve):
        smolvla.run_prefix(policy, inputs)
        assert halve.call_count == 1
        smolvla.run_actions(policy, inputs)
        assert halve.call_count == 3
    assert all(torch.equal(inputs[key], x) for key, x in before.items())


@pytest.mark.parametrize("actions", [None, torch.zeros(8, 4), torch.zeros(8, 3, 4)])
@pytest.mark.parametrize(("name", "way_out"), [("pi0", r", or keep='prefix'\."), ("diffusion", r"meta\)\.")])
def test_actions_that_are_no_chunk_are_refused(make, prepared, name, way_out, actions):
    policy = make(name)
    with pytest.raises(ValueError, match=f"delta_timestamps=resolve_delta_timestamps.*{way_out}"):
        adapter_for(policy).inputs(prepared(name) | {"action": actions})


def test_act_is_kept_as_it_acts(make, prepared, tmp_path):
    policy = make("act")
    assert policy.config.use_vae
    batch = prepared("act")
    acted = policy.predict_action_chunk(batch)  # leaves the policy in eval mode
    policy.train()
    with torch.no_grad(), steady(policy):  # the whole batch, its actions included: no latent comes from them
        _, hidden = run(policy, batch, forward=act.run_actions, layers=("model.action_head",))
    torch.testing.assert_close(hidden["model.action_head"], acted)
    assert policy.model.training
    adapter = adapter_for(policy)
    cache = adapter.build(policy, [adapter.inputs(batch)], tmp_path / "anchors", dtype=torch.float32)
    kept = cache.read(range(8)).features["hidden.module:model.action_head.all"]
    inside = ~batch["action_is_pad"]
    assert not inside.all()
    torch.testing.assert_close(kept, acted[inside])


def test_missing_cameras_and_states_are_named(make, prepared):
    for name in ("act", "diffusion"):
        policy, batch = make(name), prepared(name)
        for key in (WRIST, "observation.state"):
            with pytest.raises(ValueError, match=rf"{name} needs \['{key}'\]\. Found \['action', "):
                adapter_for(policy).inputs({k: x for k, x in batch.items() if k != key})


def predictions(policy, batch, forward):
    return run(policy, batch, forward=forward, layers=("diffusion.unet",))[1]["diffusion.unet"]


@pytest.mark.parametrize("predicted", ["epsilon", "sample"])
@pytest.mark.parametrize("masked", [False, True])
def test_predictions_of_diffusion_are_those_of_the_policys_own_loss(make, prepared, tmp_path, predicted, masked):
    policy = make("diffusion", prediction_type=predicted, do_mask_loss_for_padding=masked)
    batch = prepared("diffusion")
    adapter = adapter_for(policy)
    inputs = adapter.inputs(batch)
    assert ("action_is_pad" in inputs) == masked
    noise, steps = inputs["anchor.noise"], inputs["anchor.time"]
    assert steps.dtype == torch.int64
    assert 0 <= steps.min() < steps.max() < policy.config.num_train_timesteps
    cache = adapter.build(policy, [inputs], tmp_path / "anchors", dtype=torch.float32)
    kept = cache.read(range(8)).features["hidden.module:diffusion.unet.all"]
    losses = []
    policy.eval()
    with (
        mock.patch.object(torch, "randn", return_value=noise),
        mock.patch.object(torch, "randint", return_value=steps),
    ):
        own = predictions(policy, batch, lambda policy, batch: losses.append(policy.forward(batch)[0])).detach()
    inside = ~batch["action_is_pad"] if masked else torch.ones(8, 8, dtype=torch.bool)
    assert inside.all() != masked
    torch.testing.assert_close(kept.reshape(-1, 4), own[inside])
    target = noise if predicted == "epsilon" else batch["action"]
    torch.testing.assert_close((own - target)[inside].square().mean(), losses[0].detach())


@pytest.mark.parametrize(
    "settings",
    [
        {"n_obs_steps": 1},
        {"use_separate_rgb_encoder_per_camera": True, "noise_scheduler_type": "DDIM"},
        {"crop_shape": None, "use_group_norm": True},
        {"compile_model": True},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_diffusion_however_it_is_configured(make, prepared, tmp_path, settings):
    policy, batch = make("diffusion", **settings), prepared("diffusion")
    if policy.config.n_obs_steps == 1:
        batch |= {key: batch[key][:, -1] for key in (TOP, WRIST)}  # the policy takes them without a second dimension
        batch["observation.state"] = batch["observation.state"][:, -1:]
    adapter = adapter_for(policy)
    cache = adapter.build(policy, [adapter.inputs(batch)], tmp_path / "anchors")
    retention = adapter.retention(policy, cache, batch_size=8)
    assert retention().item() < 1e-5
    perturb(policy)
    reached = gradients(policy, retention)
    assert {"rgb_encoder", "unet"} == {key.split(".")[1] for key in reached}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", ["rgb_encoder.out", "unet.final_conv", None])
def test_diffusion_is_back_in_its_mode_whatever_happens(make, prepared, training, fails):
    policy = make("diffusion")
    policy.diffusion.rgb_encoder.training = training
    inputs = diffusion.action_inputs(policy, prepared("diffusion"))
    modes = [module.training for module in policy.modules()]
    if fails is not None:
        policy.diffusion.get_submodule(fails).register_forward_pre_hook(mock.Mock(side_effect=RuntimeError))
    with nullcontext() if fails is None else pytest.raises(RuntimeError):
        diffusion.run_actions(policy, inputs)
    assert [module.training for module in policy.modules()] == modes


def test_diffusion_without_cameras(make, prepared, tmp_path):
    state = PolicyFeature(FeatureType.ENV, (5,))
    features = small.features() | {"crop_shape": None}
    features["input_features"]["observation.environment_state"] = state
    del features["chunk_size"]
    policy = make("diffusion", **features | {"n_action_steps": 4})
    inputs = adapter_for(policy).inputs(prepared("diffusion") | {"observation.environment_state": torch.rand(8, 2, 5)})
    assert inputs.keys() == {
        "observation.state", "observation.environment_state", "action", "anchor.noise", "anchor.time"
    }  # fmt: skip
    cache = adapter_for(policy).build(policy, [inputs], tmp_path / "anchors")
    assert adapter_for(policy).retention(policy, cache, batch_size=8)().item() < 1e-5


def test_pictures_of_several_frames_are_stored_as_bytes_and_come_back(make, tmp_path):
    policy = make("diffusion", normalization_mapping={"VISUAL": NormalizationMode.IDENTITY})
    dataset = small.TwoCameras(policy.config)
    adapter = adapter_for(policy)
    batches = list(
        anchor_batches(
            dataset, small.preprocessor(policy, dataset.stats), adapter, batch_size=3, indices=[0, 31, 62, 93]
        )
    )
    cache = adapter.build(policy, batches, tmp_path / "anchors")
    found = cache.read(range(4)).inputs
    assert batches[0][TOP].shape == (3, 2, 3, small.IMAGE, small.IMAGE)
    assert torch.equal(found[TOP], torch.cat([batch[TOP] for batch in batches]))
    stored, _ = cache.gather(range(4))
    assert stored[f"inputs.{TOP}"].dtype == torch.uint8
    assert adapter.retention(policy, cache, batch_size=2)().item() < 1e-5


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (
            TOP,
            lambda x: x[:, 0],
            r"its last 2 observations, 'observation.image' of shape \[B, 2, ...\] with 5 dim.*delta",
        ),
        (WRIST, lambda x: x[:, :1], "'observation.images.wrist' .*Found shape"),
        ("observation.state", lambda x: x[:, 0], "'observation.state' of shape .* with 3 dimensions"),
        ("action", lambda x: x[..., :1], "policy's 4 dimensions. Found 1"),
    ],
)
def test_what_diffusion_cannot_read_is_refused(make, prepared, key, change, message):
    batch = prepared("diffusion")
    with pytest.raises(ValueError, match=message):
        adapter_for(make("diffusion")).inputs(batch | {key: change(batch[key])})


def test_running_statistics_stay_and_the_policy_that_acts_is_the_one_that_trains(make, prepared, tmp_path):
    policy, batch = make("diffusion"), prepared("diffusion")
    adapter = adapter_for(policy)
    cache = adapter.build(policy, [adapter.inputs(batch)], tmp_path / "anchors")
    kept = copy.deepcopy(dict(policy.named_buffers()))

    def train_step(policy):
        policy.train()
        policy.forward({**batch, TOP: 3.0 * batch[TOP] + 1.0})[0].backward()
        return [name for name, x in policy.named_buffers() if not torch.equal(x, kept[name])]

    moving = copy.deepcopy(policy)
    adapter.retention(moving, cache, batch_size=8, freeze_statistics=False)
    assert len(train_step(moving)) == 3 * 13  # mean, variance and number of batches of each layer
    retention = adapter.retention(policy, cache, batch_size=8)
    adapter.retention(policy, cache, batch_size=8)
    assert train_step(policy) == []
    assert train_step(copy.deepcopy(policy)) == []
    layer = policy.diffusion.rgb_encoder.backbone[1]
    assert len(layer._forward_pre_hooks) == 1, "once, however many retention closures"
    assert layer.weight.grad.any(), "its weights train on"
    assert retention().item() < 1e-5, "the first check comes after the first task forward"
    assert freeze_statistics(make("act")) == []


@pytest.mark.parametrize("name", ["diffusion", "act", "pi0"])
def test_names_are_those_within_wrappers(make, prepared, tmp_path, name):
    policy = make(name)
    wrapper = nn.Module()
    wrapper.module = policy  # as DistributedDataParallel has it
    for keep in (None, "prefix") if name == "pi0" else (None,):
        adapter = adapter_for(policy, keep)
        around = adapter_for(wrapper, keep)
        assert around.layers == adapter.layers
        inputs = adapter.inputs(prepared(name))
        cache = adapter.build(policy, [inputs], tmp_path / str(keep))
        assert around.build(wrapper, [inputs], tmp_path / str(keep)).fingerprint == cache.fingerprint
        assert around.retention(wrapper, cache, batch_size=8)().item() < 1e-4


@pytest.mark.parametrize(("name", "keep"), [("pi0", "actions"), ("pi0", "prefix"), ("diffusion", "actions")])
def test_gradient_checkpointing_changes_no_gradient(make, prepared, tmp_path, name, keep):
    found = []
    for checkpointing in (False, True):
        policy = make(name, gradient_checkpointing=checkpointing)
        adapter = adapter_for(policy, keep)
        cache = adapter.build(policy, [adapter.inputs(prepared(name))], tmp_path / str(checkpointing))
        perturb(policy)
        found.append(gradients(policy, adapter.retention(policy, cache, batch_size=8, strict=False)))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("keep", ["actions", "prefix"])
def test_a_bfloat16_policy_is_reproduced(make, prepared, tmp_path, keep):
    policy = make("pi0", dtype="bfloat16")
    adapter = adapter_for(policy, keep)
    cache = adapter.build(policy, [adapter.inputs(prepared("pi0"))], tmp_path / "anchors", dtype=torch.bfloat16)
    retention = adapter.retention(policy, cache, batch_size=8)
    retention().backward()


def test_a_policy_with_peft_adapters(make, prepared, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "action_out_proj"], r=2)
    policy = peft.get_peft_model(make("pi0"), config)
    adapter = adapter_for(policy)
    cache = adapter.build(policy, [adapter.inputs(prepared("pi0"))], tmp_path / "anchors")
    retention = adapter.retention(policy, cache, batch_size=8)
    assert retention().item() < 1e-4
    perturb(policy)
    reached = gradients(policy, retention)
    assert all("lora_" in name for name in reached)
    for module in ("action_out_proj", "gemma_expert", "language_model"):
        assert any(module in name for name in reached)


def test_what_is_not_known_is_refused_with_a_way_out(make):
    other = make("act")
    other.name = "vqbet"
    for model in (nn.Linear(2, 2), other):
        with pytest.raises(ValueError, match=r"'act', 'diffusion', 'pi0', 'pi05', 'pi0_fast', 'smolvla'.*layers="):
            adapter_for(model)
    with pytest.raises(ValueError, match=r"\('actions',\) for act. Found 'prefix'"):
        adapter_for(make("act"), "prefix")


def test_arguments_of_the_caller_come_first(make, prepared, tmp_path):
    policy = make("act")
    adapter = adapter_for(policy)
    reading = replace(adapter.reading, pooling={"all": "masked_mean"})
    cache = adapter.build(policy, [adapter.inputs(prepared("act"))], tmp_path / "anchors", reading=reading)
    adapter = replace(adapter, reading=reading)
    retention = adapter.retention(policy, cache, batch_size=4, loss="cosine")
    assert isinstance(retention, anchors.HiddenRetention)
    assert (retention.distance, retention.pooling) == ("cosine", {"all": "masked_mean"})
