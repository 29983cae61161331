"""Names of modules and tensors as the model itself has them, without wrappers."""

from typing import Any

from torch import nn

__all__ = ["base_model", "class_name", "class_names", "modules_by_name", "plain_name", "unwrapped"]

# Parts that DistributedDataParallel, DataParallel, torch.compile, FSDP1 and activation checkpointing insert.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def plain_name(name: str) -> str:
    """The name without the parts that wrappers have inserted."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Plain name, and full name, -> module; the plain name of a wrapped module gives its wrapper."""
    exact = dict(model.named_modules())
    plain: dict[str, nn.Module] = {}
    for name, module in exact.items():
        plain.setdefault(plain_name(name), module)
    return plain | exact


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within its wrappers."""
    while len(model._modules) == 1:
        ((name, inner),) = model._modules.items()
        if name not in _WRAPPERS or inner is None:
            break
        model = inner
    return model


def base_model(model: nn.Module) -> nn.Module:
    """The model within its wrappers and adapters."""
    model = unwrapped(model)
    within = getattr(model, "get_base_model", None)  # of PEFT
    return within() if callable(within) else model


def class_names(model: nn.Module) -> set[str]:
    """Names of the classes of all modules, and of their bases: a check by name needs no import."""
    return {base.__name__ for kind in {type(module) for module in model.modules()} for base in kind.__mro__}


def class_name(model: nn.Module) -> str:
    """Name of the model's class within its wrappers, PEFT's included, and without FSDP2's own class."""
    inner: Any = unwrapped(model)
    kind = type(inner.get_base_model() if hasattr(type(inner), "get_base_model") else inner)
    bases = [base for base in kind.__bases__ if base.__name__ != "FSDPModule"]
    return bases[0].__name__ if len(bases) < len(kind.__bases__) else kind.__name__
