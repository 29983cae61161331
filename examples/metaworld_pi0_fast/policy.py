"""lerobot's `PI0FastPolicy` with a small backbone: built, saved, loaded, wired to its processors.

lerobot fixes the size of PaliGemma in its code (3 billion parameters). Here two names in its module are
replaced while a policy is built, and only then; everything that runs afterwards, from the processors to
the decoding of action tokens, is lerobot's own.

A saved small policy is a folder like any lerobot checkpoint, plus `small_backbone.json` and the two
tokenizers. It holds no absolute path, and can be moved.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from torch import nn

from .demonstrations import ACTION_KEY, CAMERA_KEY, STATE_KEY
from .environment import ACTION_NAMES, IMAGE_SIZE, STATE_NAMES

_MODULE = "lerobot.policies.pi0_fast.modeling_pi0_fast"
_BACKBONE_FILE = "small_backbone.json"
_BACKBONE_ATTRIBUTE = "_small_backbone"
TEXT_TOKENIZER = "tokenizers/text"
ACTION_TOKENIZER = "tokenizers/fast"


@dataclass(frozen=True)
class Backbone:
    """Sizes of a small PaliGemma.

    Attributes:
        width: Width of the language model, and of what the vision tower hands it.
        depth: Layers of the language model.
        mlp: Hidden width of its feed-forward layers.
        heads: Attention heads; they share one key-value head, as in Gemma 2B.
        vision_width: Width of the vision tower.
        vision_depth: Layers of the vision tower.
        vision_mlp: Hidden width of its feed-forward layers.
        vision_heads: Its attention heads.
        patch: Side of an image patch, in pixels.
        image: Side of the image, in pixels.
    """

    width: int = 96
    depth: int = 3
    mlp: int = 256
    heads: int = 4
    vision_width: int = 64
    vision_depth: int = 2
    vision_mlp: int = 192
    vision_heads: int = 4
    patch: int = 16
    image: int = IMAGE_SIZE


def shrink(config: Any, backbone: Backbone, vocab_size: int) -> None:
    """Writes the sizes of a small PaliGemma into the config that lerobot is about to build one of.

    lerobot has already written its own sizes into it; only what it hard-codes needs undoing.

    Args:
        config: Changed in place.
        backbone: The sizes.
        vocab_size: Size of the text tokenizer's vocabulary, action tokens included.
    """
    text, vision = config.text_config, config.vision_config
    text.vocab_size = config._vocab_size = vocab_size
    # PaliGemma's image placeholder: lerobot never uses it, but the embedding must be able to hold it.
    config.image_token_index = config.image_token_id = vocab_size - 1
    text.pad_token_id = 0
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: backbone.depth]
    vision.hidden_size, vision.num_hidden_layers = backbone.vision_width, backbone.vision_depth
    vision.intermediate_size, vision.num_attention_heads = backbone.vision_mlp, backbone.vision_heads
    vision.patch_size, vision.image_size = backbone.patch, backbone.image
    vision.num_image_tokens = (backbone.image // backbone.patch) ** 2
    vision.projection_dim = config.projection_dim = config.hidden_size = backbone.width


def features(camera: str = CAMERA_KEY, image: int = IMAGE_SIZE) -> dict[str, Any]:
    """What a policy's config says of MetaWorld: `input_features` and `output_features`.

    Args:
        camera: Key of the camera in the datasets.
        image: Side of the picture, in pixels.
    """
    from lerobot.configs.types import FeatureType, PolicyFeature

    return {
        "input_features": {
            camera: PolicyFeature(FeatureType.VISUAL, (3, image, image)),
            STATE_KEY: PolicyFeature(FeatureType.STATE, (len(STATE_NAMES),)),
        },
        "output_features": {ACTION_KEY: PolicyFeature(FeatureType.ACTION, (len(ACTION_NAMES),))},
    }


@contextlib.contextmanager
def small_backbone(backbone: Backbone, vocab_size: int) -> Iterator[Any]:
    """While this is open, `PI0FastPolicy(config)` builds a small PaliGemma.

    Args:
        backbone: The sizes.
        vocab_size: Size of the text tokenizer's vocabulary, action tokens included.

    Yields:
        lerobot's pi0-FAST module.
    """
    module = importlib.import_module(_MODULE)
    name = "PaliGemmaForConditionalGenerationWithPiGemma"
    full = getattr(module, name)

    def build(config: Any) -> nn.Module:
        shrink(config, backbone, vocab_size)
        model: nn.Module = full(config)
        return model

    def sizes(variant: str) -> Any:
        del variant
        head_dim = backbone.width // backbone.heads
        return module.GemmaConfig(backbone.width, backbone.depth, backbone.mlp, backbone.heads, 1, head_dim)

    with mock.patch.object(module, name, build), mock.patch.object(module, "get_gemma_config", sizes):
        yield module


def new_policy(
    tokenizers: Path,
    backbone: Backbone | None = None,
    camera: str = CAMERA_KEY,
    chunk_size: int = 10,
    max_action_tokens: int = 28,
    tokenizer_max_length: int = 20,
) -> Any:
    """Builds an untrained policy for MetaWorld.

    Args:
        tokenizers: Folder that holds `text` and `fast`.
        backbone: Sizes; `Backbone()` when `None`.
        camera: Key of the camera in the datasets.
        chunk_size: Actions predicted, and executed, at a time.
        max_action_tokens: Longest encoded chunk, with its prefix `Action: ` and its end mark.
        tokenizer_max_length: Longest prompt, in tokens.

    Returns:
        A `PI0FastPolicy` on the CPU.
    """
    from lerobot.configs.types import NormalizationMode
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

    backbone = backbone or Backbone()
    config = PI0FastConfig(
        device="cpu",
        chunk_size=chunk_size,
        n_action_steps=chunk_size,
        max_state_dim=len(STATE_NAMES),
        max_action_dim=len(ACTION_NAMES),
        max_action_tokens=max_action_tokens,
        max_decoding_steps=max_action_tokens,
        tokenizer_max_length=tokenizer_max_length,
        image_resolution=(backbone.image, backbone.image),
        text_tokenizer_name=str(tokenizers / "text"),
        action_tokenizer_name=str(tokenizers / "fast"),
        validate_action_token_prefix=False,  # an untrained policy must be allowed to babble
        push_to_hub=False,
        # The prompt spells the state in 256 steps from -1 to 1: extremes fill that range, where mean and
        # deviation would cut off a third of it.
        normalization_mapping={
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MIN_MAX,
            "ACTION": NormalizationMode.MIN_MAX,
        },
        **features(camera, backbone.image),
    )
    return _build(config, backbone)


def _build(config: Any, backbone: Backbone) -> Any:
    from transformers import AutoTokenizer

    vocab_size = len(AutoTokenizer.from_pretrained(config.text_tokenizer_name))
    with small_backbone(backbone, vocab_size) as module:
        policy = module.PI0FastPolicy(config)
    setattr(policy, _BACKBONE_ATTRIBUTE, backbone)
    return policy


def save_policy(policy: Any, path: str | Path, processors: tuple[Any, Any] | None = None) -> Path:
    """Saves a policy as a lerobot checkpoint; a small one takes its sizes and its tokenizers along.

    Args:
        policy: A `PI0FastPolicy`.
        path: Folder to write to.
        processors: The pre- and postprocessor, saved beside it when given.

    Returns:
        The folder.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(path)
    for processor in processors or ():
        processor.save_pretrained(path)
    backbone = getattr(policy, _BACKBONE_ATTRIBUTE, None)
    if backbone is None:
        return path
    sources = {
        TEXT_TOKENIZER: policy.config.text_tokenizer_name,
        ACTION_TOKENIZER: policy.config.action_tokenizer_name,
    }
    for inside, source in sources.items():
        if Path(source).resolve() != (path / inside).resolve():
            shutil.copytree(source, path / inside, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    # Names inside the folder in place of absolute paths: the folder may be moved, and read on another
    # machine.
    for file in path.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        for inside, source in sources.items():
            text = text.replace(json.dumps(str(source)), json.dumps(inside))
        file.write_text(text, encoding="utf-8")
    (path / _BACKBONE_FILE).write_text(json.dumps(asdict(backbone), indent=2) + "\n", encoding="utf-8")
    return path


def is_small(path: str | Path) -> bool:
    """Whether `path` is a folder written by `save_policy` for a small policy."""
    return (Path(path) / _BACKBONE_FILE).is_file()


def load_policy(path: str | Path, device: str | None = None) -> Any:
    """Loads a policy: a small one from its folder, anything else with `PI0FastPolicy.from_pretrained`.

    Args:
        path: A folder, or the name of a pi0-FAST policy on the hub.
        device: Where to put it; the config's own choice when `None`.

    Returns:
        The policy in evaluation mode.
    """
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy

    if not is_small(path):
        if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(
                f"`path`={str(path)!r} holds no config.json, so it is no lerobot checkpoint. "
                "Pass the folder that does (after lerobot-train: `.../pretrained_model`)."
            )
        config = PreTrainedConfig.from_pretrained(str(path))
        if device is not None:
            config.device = device
        policy = PI0FastPolicy.from_pretrained(str(path), config=config)
        return policy.eval()

    from safetensors.torch import load_file

    folder = Path(path).resolve()
    config = PreTrainedConfig.from_pretrained(str(folder))
    config.device = device or "cpu"
    config.text_tokenizer_name = str(folder / config.text_tokenizer_name)
    config.action_tokenizer_name = str(folder / config.action_tokenizer_name)
    backbone = Backbone(**json.loads((folder / _BACKBONE_FILE).read_text(encoding="utf-8")))
    policy = _build(config, backbone)
    # Not `from_pretrained`: it copies the output layer over the embedding, which this lerobot keeps
    # apart, and it goes on with untrained weights when the file cannot be read.
    policy.load_state_dict(load_file(str(folder / "model.safetensors"), device=config.device), strict=True)
    return policy.eval()


def make_processors(
    policy: Any, stats: dict[str, dict[str, Any]] | None = None, path: str | Path | None = None
) -> tuple[Any, Any]:
    """The pre- and postprocessor that lerobot makes for a policy.

    Args:
        policy: A `PI0FastPolicy`.
        stats: Dataset statistics to normalise with, when the processors are new.
        path: Checkpoint folder or hub name to read the processors from, statistics included.

    Returns:
        Preprocessor (dataset or simulator -> model) and postprocessor (model -> actions).

    Raises:
        ValueError: Both or none of `stats` and `path` are given.
    """
    from lerobot.policies.factory import make_pre_post_processors

    if (stats is None) == (path is None):
        raise ValueError(
            f"Give `stats` (for new processors) or `path` (for saved ones), exactly one. Found stats "
            f"{'missing' if stats is None else 'given'}, path={path!r}."
        )
    if path is None:
        made: tuple[Any, Any] = make_pre_post_processors(policy_cfg=policy.config, dataset_stats=stats)
        return made
    text, action = policy.config.text_tokenizer_name, policy.config.action_tokenizer_name
    # lerobot does not save the text tokenizer's name with the action tokenizer, and would look for the
    # default on the hub. Naming all of them again also makes the names inside a small policy's folder
    # absolute.
    overrides = {
        "tokenizer_processor": {"tokenizer_name": text},
        "action_tokenizer_processor": {
            "action_tokenizer_name": action,
            "paligemma_tokenizer_name": text,
            "fast_skip_tokens": policy.config.fast_skip_tokens,
        },
        "device_processor": {"device": str(policy.config.device)},
    }
    read: tuple[Any, Any] = make_pre_post_processors(
        policy_cfg=policy.config, pretrained_path=str(path), preprocessor_overrides=overrides
    )
    return read


def parameter_count(policy: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in policy.parameters())
