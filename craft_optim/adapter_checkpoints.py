"""Checkpoints of PEFT that hold adapters only: their base model, and that model with the adapters."""

from typing import Any

from torch import nn

from craft_optim._paths import expanded

__all__ = ["base_of_adapters", "with_adapters"]


def base_of_adapters(path: str) -> tuple[str, str | None]:
    """Folder or hub id, and revision, of the model that the adapters in a folder or on the hub belong to.

    Raises:
        ImportError: peft is not installed.
        ValueError: The adapters do not name their model.
    """
    about = _peft(path).PeftConfig.from_pretrained(path)
    base = about.base_model_name_or_path
    if not base:
        raise ValueError(
            f"The adapters in {path} do not say which model they belong to: write its folder or hub id into "
            "adapter_config.json as base_model_name_or_path."
        )
    return expanded(base), about.revision


def with_adapters(model: nn.Module, path: str) -> Any:
    """Puts adapters into the model that they belong to. A PeftModel; PEFT freezes the model's own weights.

    Raises:
        ImportError: peft is not installed.
        ValueError: The adapters are not weights within the model, or do not fit it: PEFT only warns of missing weights,
            and skips unknown ones.
    """
    peft = _peft(path)
    about = peft.PeftConfig.from_pretrained(path)
    if about.is_prompt_learning:
        raise ValueError(f"{path} holds a learned prompt ({about.peft_type.value}), not weights within the model.")
    saved = peft.load_peft_weights(path, device="cpu")
    try:
        adapted = peft.PeftModel.from_pretrained(model, path, config=about)
    except (KeyError, RuntimeError) as error:  # names and shapes
        raise _unlike(path, " ".join(str(error).split())) from error
    own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    alone = sorted(own.keys() - saved.keys()) + sorted(saved.keys() - own.keys() - adapted.state_dict().keys())
    if alone:
        raise _unlike(path, repr(alone[0]))
    return adapted


def _peft(path: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"{path} holds adapters, which need peft ({error}): pip install peft.") from error
    return peft


def _unlike(path: str, where: str) -> ValueError:
    return ValueError(
        f"The adapters in {path} do not fit their model ({where}): they belong to another one than the "
        "base_model_name_or_path in adapter_config.json, or were copied incompletely."
    )
