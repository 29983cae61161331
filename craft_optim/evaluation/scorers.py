"""Scorers for checkpoints: a lerobot policy, a language model, or a vision-language model."""

import json
from pathlib import Path
from typing import Any

from craft_optim._paths import expanded
from craft_optim.adapter_checkpoints import base_of_adapters, with_adapters
from craft_optim.evaluation.mcq import Scorer

__all__ = ["load_scorer", "require_checkpoint"]

_ADAPTERS = "adapter_config.json"


def load_scorer(path: str, *, device: str = "cpu", template: str | None = None, batch_size: int = 16) -> Scorer:
    """Loads the scorer of a checkpoint, by its config.json; code from the checkpoint is not run.

    Args:
        path: Folder or hub id: a pi0_fast of lerobot; a causal language model, or a vision-language model, of
            transformers; or adapters of PEFT for one of these.
        template: Template of the scorers, `LanguageModelScorer`, `VisionLanguageScorer` and
            `craft_optim.lerobot.answers.PI0FastScorer`. None: the scorer's own.

    Raises:
        ValueError: The checkpoint is none of these, or cannot be loaded.
        ImportError: lerobot or transformers is not installed.
    """
    settings: dict[str, Any] = {"batch_size": batch_size} | ({} if template is None else {"template": template})
    path = expanded(path)
    config = require_checkpoint(path)
    if "type" in config:
        return _of_lerobot(path, device, settings)
    return _of_transformers(path, config, device, settings)


def require_checkpoint(path: str) -> dict[str, Any]:
    """The config.json of a checkpoint, or the adapter_config.json of adapters; loads no weights.

    Raises:
        ValueError: It has neither, or is a policy without a language model.
        ImportError: Neither lerobot nor transformers is installed.
    """
    path = expanded(path)
    config = _json(path, "config.json") or _json(path, _ADAPTERS)
    if not config:
        raise ValueError(f"{path} is no checkpoint: it has neither config.json nor {_ADAPTERS}.")
    if config.get("type", "pi0_fast") != "pi0_fast":
        raise ValueError(f"{path} must be a pi0_fast, which has a head for words. Found {config['type']!r}.")
    return config


def _json(path: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a checkpoint; None if it has no such file."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(f"{path} needs transformers or lerobot ({error}): pip install transformers.") from error
    if Path(path).is_dir():
        file = Path(path) / name
        if not file.is_file():
            return None
    else:
        try:
            file = Path(hf_hub_download(path, name))
        except LocalEntryNotFoundError as error:
            raise ValueError(f"{path} is no folder, and the hub cannot be reached: {error}") from error
        except EntryNotFoundError:
            return None
        except HFValidationError as error:
            raise ValueError(f"{path} is no folder, and no name on the hub: {error}") from error
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): copy it anew.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must be a JSON object. Found {type(found).__name__}.")
    return found


def _of_lerobot(path: str, device: str, settings: dict[str, Any]) -> Scorer:
    try:
        from craft_optim.lerobot.answers import PI0FastScorer
        from craft_optim.lerobot.pretrained import load_policy, load_preprocessor
    except ImportError as error:
        raise ImportError(f"{path} is a lerobot policy ({error}): pip install 'craft-optim[lerobot]'.") from error
    policy = load_policy(path, device)
    return PI0FastScorer(policy, load_preprocessor(policy, path, device), **settings)


def _of_transformers(path: str, config: dict[str, Any], device: str, settings: dict[str, Any]) -> Scorer:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{path} needs transformers ({error}): pip install 'craft-optim[transformers]'.") from error
    from craft_optim.evaluation.language_models import LanguageModelScorer, VisionLanguageScorer

    whole, revision = base_of_adapters(path) if "peft_type" in config else (path, None)
    about = transformers.AutoConfig.from_pretrained(whole, revision=revision)
    # There may be a tokenizer beside adapters, else it is the model's.
    words = path if _json(path, "tokenizer_config.json") else whole
    for kind in (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM):
        if type(about) in kind._model_mapping:
            break
    else:
        raise ValueError(
            f"{path} must be a causal language model, a vision-language model or a pi0_fast. Found model_type="
            f"{about.model_type!r}: for anything else give a function that returns a scorer."
        )
    model, loaded = kind.from_pretrained(whole, revision=revision, dtype="auto", output_loading_info=True)
    if loaded["missing_keys"]:
        raise ValueError(
            f"The weights of {whole} lack {len(loaded['missing_keys'])} tensors of {type(model).__name__}, such as "
            f"{min(loaded['missing_keys'])!r}: transformers would go on with untrained ones."
        )
    model = (model if whole == path else with_adapters(model, path).get_base_model()).to(device).eval()
    if kind is transformers.AutoModelForCausalLM:
        return LanguageModelScorer(model, transformers.AutoTokenizer.from_pretrained(words), **settings)
    return VisionLanguageScorer(model, transformers.AutoProcessor.from_pretrained(words), **settings)
