"""Causal language models of transformers with their tokenizers: folders, adapters, GGUF files, the hub."""

from pathlib import Path
from typing import Any

from torch import nn

from craft_optim._paths import expanded, require_found
from craft_optim.adapter_checkpoints import base_of_adapters, with_adapters

__all__ = ["load_language_model"]


def load_language_model(path: str, *, device: str = "cpu") -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer. Code from the checkpoint is not run.

    Args:
        path: Folder or hub id of a model, or of PEFT's adapters for one; or a .gguf file, or a folder with one.
        device: Device for the model.

    Returns:
        The model in eval mode, its parameters in the dtype of the checkpoint; and the tokenizer, from beside the
        adapters if there is one.

    Raises:
        ImportError: transformers, or a package that it needs for the file, is not installed.
        ValueError: It is not such a model, or weights are missing.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError(f"{path} needs transformers ({error}): pip install 'craft-optim[transformers]'.") from error
    path = expanded(path)
    require_found(path, "the folder of a model, a .gguf file, or a hub id", (".gguf",))
    folder, named = Path(path), {}
    files = [folder] if folder.suffix == ".gguf" else sorted(folder.glob("*.gguf"))
    if files and not (folder / "config.json").is_file():
        if len(files) > 1:
            raise ValueError(f"{path} holds {len(files)} GGUF files: name one, such as {files[0]}.")
        path, named = str(files[0].parent), {"gguf_file": files[0].name}
    adapters = (folder / "adapter_config.json").is_file()
    whole, revision = base_of_adapters(path) if adapters else (path, None)
    settings: dict[str, Any] = {"revision": revision, **named}
    model, loaded = AutoModelForCausalLM.from_pretrained(whole, dtype="auto", output_loading_info=True, **settings)
    # Files do not hold an output layer that is tied to the embedding
    tied = {key for key in loaded["missing_keys"] if key in (getattr(model, "_tied_weights_keys", None) or ())}
    if missing := sorted(set(loaded["missing_keys"]) - tied):
        raise ValueError(
            f"The weights of {whole} lack {len(missing)} tensors of {type(model).__name__}, such as {missing[0]!r}: "
            "transformers would go on with untrained ones."
        )
    if adapters:
        model = with_adapters(model, path)
    own = not adapters or (folder / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(path if own else whole, **(settings if whole == path else {}))
    if named:
        tokenizer = _of_gguf(tokenizer, model.config)
        _as_plain(model)
    return model.to(device).eval(), tokenizer


def _of_gguf(tokenizer: Any, config: Any) -> Any:
    """Repairs a tokenizer from a GGUF file.

    transformers 5.5 invents its special tokens, while the config has those of the file; and gives it a class that,
    after saving and loading, splits texts in another way than the file defines.
    """
    from transformers import PreTrainedTokenizerFast

    known = {name: getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    special = {f"{name}_token": tokenizer.convert_ids_to_tokens(x) for name, x in known.items() if isinstance(x, int)}
    backend, template = tokenizer.backend_tokenizer, tokenizer.chat_template
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special)


def _as_plain(model: Any) -> None:
    """Removes a model's marks of quantisation, now that its weights are plain numbers.

    With them transformers 5.24 does not save it, and its Trainer does not train it.
    """
    model.config.__dict__.pop("quantization_config", None)
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(name, None)
