"""lerobot's own policies at toy size, built without a download, and a dataset with two cameras for them."""

from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import small_act  # noqa: F401
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.datasets.factory import resolve_delta_timestamps
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.factory import make_pre_post_processors
from metaworld_pi0_fast import ASSETS, OLD_TASK
from metaworld_pi0_fast.demonstrations import VIDEO_BACKEND
from transformers import AutoTokenizer, SmolVLMConfig

TOKENIZER = ASSETS / "pretrained" / "tokenizers" / "text"
TOP, WRIST, ABSENT = "observation.image", "observation.images.wrist", "observation.images.absent"
IMAGE, PATCH = 64, 32
CHUNK = 5
MAX_ACTION = 6  # two more than there are
EYES = {"vision_backbone": "resnet8", "pretrained_backbone_weights": None}  # of ACT and diffusion: see small_act


def features(*cameras):
    visual = PolicyFeature(FeatureType.VISUAL, (3, IMAGE, IMAGE))
    return {
        "input_features": dict.fromkeys(cameras, visual)
        | {"observation.state": PolicyFeature(FeatureType.STATE, (4,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (4,))},
        "device": "cpu",
        "chunk_size": CHUNK,
        "n_action_steps": CHUNK,
        "push_to_hub": False,
    }


def pi(name, **settings):
    module = import_module(f"lerobot.policies.{name}.modeling_{name}")
    vlm, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM
    vocabulary = len(AutoTokenizer.from_pretrained(TOKENIZER))

    def small_vlm(config):
        text, vision = config.text_config, config.vision_config
        text.vocab_size = config._vocab_size = vocabulary
        config.image_token_index = config.image_token_id = vocabulary - 1
        text.pad_token_id = 0
        vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads = 32, 1, 4
        vision.intermediate_size, vision.patch_size = 64, PATCH
        vision.projection_dim = config.projection_dim = config.hidden_size = 32
        return vlm(config)

    def small_expert(config):
        config.vocab_size, config.pad_token_id = 8, 0
        return expert(config)

    def sizes(variant):
        # Eight heads: lerobot writes that number into its attention.
        return module.GemmaConfig(32 if variant == "gemma_2b" else 16, 2, 64, 8, 1, 8)

    config = import_module(f"lerobot.policies.{name}.configuration_{name}")
    with (
        mock.patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", small_vlm),
        mock.patch.object(module, "PiGemmaForCausalLM", small_expert),
        mock.patch.object(module, "get_gemma_config", sizes),
    ):
        return getattr(module, f"{name.upper()}Policy")(
            getattr(config, f"{name.upper()}Config")(
                max_state_dim=8,
                max_action_dim=MAX_ACTION,
                image_resolution=(IMAGE, IMAGE),
                tokenizer_max_length=24,
                **features(TOP, WRIST, ABSENT) | settings,
            )
        )


def smolvla(folder, **settings):
    from lerobot.policies.smolvla import smolvlm_with_expert as module
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": IMAGE,
            "patch_size": PATCH // 2,
        },
        scale_factor=2,
        image_token_id=len(tokenizer) - 1,
        pad_token_id=0,
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The policy reads two numbers off SmolVLM's processor, which needs another package and files of the hub.
    processor = SimpleNamespace(tokenizer=SimpleNamespace(fake_image_token_id=5, global_image_token_id=6))
    with mock.patch.object(module.AutoProcessor, "from_pretrained", return_value=processor):
        return SmolVLAPolicy(
            SmolVLAConfig(
                vlm_model_name=str(folder),
                num_vlm_layers=2,
                max_state_dim=8,
                max_action_dim=MAX_ACTION,
                resize_imgs_with_padding=(IMAGE, IMAGE),
                tokenizer_max_length=24,
                **{"empty_cameras": 1} | features(TOP, WRIST) | settings,
            )
        )


def act(**settings):
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    sizes = {"dim_model": 16, "n_heads": 2, "dim_feedforward": 32, "n_encoder_layers": 1, "n_vae_encoder_layers": 1}
    return ACTPolicy(ACTConfig(**EYES, latent_dim=4, **sizes | features(TOP, WRIST) | settings))


def diffusion(**settings):
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    sizes = {"down_dims": (16, 32), "n_groups": 4, "kernel_size": 3, "diffusion_step_embed_dim": 16}
    chunks = {"horizon": 8, "n_action_steps": 4, "num_train_timesteps": 20}
    own = {key: value for key, value in features(TOP, WRIST).items() if key != "chunk_size"}
    eyes = {"crop_shape": (40, 40), "use_separate_rgb_encoder_per_camera": False, **EYES}
    return DiffusionPolicy(DiffusionConfig(**own | sizes | chunks | eyes | settings))


def build(name, folder, **settings):
    """The policy, untrained, its weights made large enough to matter; in train mode, as a trainer has it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        makers = {"smolvla": lambda **s: smolvla(folder, **s), "act": act, "diffusion": diffusion}
        policy = makers.get(name, lambda **s: pi(name, **s))(**settings)
        for parameter in policy.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return policy.train()


def preprocessor(policy, stats):
    """The policy's own, with the shipped tokenizer in the place of the hub's."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    with mock.patch.object(AutoTokenizer, "from_pretrained", return_value=tokenizer):
        return make_pre_post_processors(policy.config, dataset_stats=stats)[0]


class TwoCameras(torch.utils.data.Dataset):
    """Two shipped episodes, seen from a second camera and under alternating instructions of different lengths."""

    def __init__(self, config=None):
        root = ASSETS / "demonstrations" / OLD_TASK
        settings = {"root": root, "episodes": [0, 1], "video_backend": VIDEO_BACKEND}
        meta = LeRobotDataset(f"local/{OLD_TASK}", **settings).meta
        deltas = None if config is None else resolve_delta_timestamps(config, meta)
        self.inner = LeRobotDataset(f"local/{OLD_TASK}", delta_timestamps=deltas, **settings)
        self.hf_dataset, self.stats = self.inner.hf_dataset, meta.stats | {WRIST: meta.stats[TOP]}
        self.meta = SimpleNamespace(camera_keys=[TOP, WRIST])

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        sample = dict(self.inner[index])
        task = ("Open a drawer", "Open a drawer and then press the button")[index % 2]
        return sample | {WRIST: sample[TOP].flip(-1) ** 2, "task": task}
