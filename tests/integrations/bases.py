"""Base optimizers, and how they are stepped."""

import importlib

import pytest
import torch

# Name: the library (None: torch), and a constructor given (library, parameters).
OPTIMIZERS = {
    "AdamW": (None, lambda _, p: torch.optim.AdamW(p, lr=1e-2)),
    "SGD": (None, lambda _, p: torch.optim.SGD(p, lr=0.3)),
    "SGD, momentum": (None, lambda _, p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "LBFGS": (None, lambda _, p: torch.optim.LBFGS(p, lr=0.05, max_iter=2, history_size=3)),
    "Muon": ("torch.optim", lambda optim, p: optim.Muon([x for x in p if x.ndim == 2], lr=1e-2)),
    "Adafactor": (None, lambda _, p: torch.optim.Adafactor(p, lr=3e-2)),
    "AdamW, foreach": (None, lambda _, p: torch.optim.AdamW(p, lr=1e-2, foreach=True)),
    "AdamW, fused": (None, lambda _, p: torch.optim.AdamW(p, lr=1e-2, fused=True)),
    "AdamW, fused, tensor lr": (None, lambda _, p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), fused=True)),
    "AdamW, tensor lr": (None, lambda _, p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False)),
    "torchao.AdamW8bit": ("torchao.optim", lambda ao, p: ao.AdamW8bit(p, lr=1e-2)),
    "torchao.AdamW4bit": ("torchao.optim", lambda ao, p: ao.AdamW4bit(p, lr=1e-2)),
    "torchao.AdamWFp8": ("torchao.optim", lambda ao, p: ao.AdamWFp8(p, lr=1e-2)),
    "bitsandbytes.AdamW8bit": ("bitsandbytes.optim", lambda bnb, p: bnb.AdamW8bit(p, lr=1e-2)),
    "bitsandbytes.Lion8bit": ("bitsandbytes.optim", lambda bnb, p: bnb.Lion8bit(p, lr=3e-3)),
    "bitsandbytes.SGD8bit": ("bitsandbytes.optim", lambda bnb, p: bnb.SGD8bit(p, lr=0.1, momentum=0.9)),
    "bitsandbytes.AdEMAMix8bit": ("bitsandbytes.optim", lambda bnb, p: bnb.AdEMAMix8bit(p, lr=1e-2)),
    "AdamWScheduleFree": ("schedulefree", lambda sf, p: sf.AdamWScheduleFree(p, lr=1e-2, warmup_steps=3)),
    "SGDScheduleFree": ("schedulefree", lambda sf, p: sf.SGDScheduleFree(p, lr=1.0)),
    "RAdamScheduleFree": ("schedulefree", lambda sf, p: sf.RAdamScheduleFree(p, lr=3e-2)),
    "AdamWScheduleFreeClosure": ("schedulefree", lambda sf, p: sf.AdamWScheduleFreeClosure(p, lr=1e-2)),
    "Prodigy": ("prodigyopt", lambda prodigy, p: prodigy.Prodigy(p, d0=1e-3)),
    "Lion": ("pytorch_optimizer", lambda po, p: po.Lion(p, lr=3e-3)),
    "SOAP": ("pytorch_optimizer", lambda po, p: po.SOAP(p, lr=1e-2)),
    "Lookahead": ("pytorch_optimizer", lambda po, p: po.Lookahead(torch.optim.AdamW(p, lr=1e-2), k=3)),
    "ScheduleFreeAdamW": ("pytorch_optimizer", lambda po, p: po.ScheduleFreeAdamW(p, lr=1e-2)),
    "SAM": ("pytorch_optimizer", lambda po, p: po.SAM(list(p), torch.optim.AdamW, rho=0.005, lr=1e-2)),
    "transformers.Adafactor": (
        "transformers.optimization",
        lambda hf, p: hf.Adafactor(p, lr=3e-2, relative_step=False, scale_parameter=False, beta1=0.5),
    ),
    "transformers.Adafactor, lr=None": ("transformers.optimization", lambda hf, p: hf.Adafactor(p)),
}


def make(name):
    library, build = OPTIMIZERS[name]
    if library is not None:
        try:
            library = importlib.import_module(library)
        except ImportError as e:
            pytest.skip(f"pip install --group integrations ({e})")
        if name == "Muon" and not hasattr(library, name):
            pytest.skip("this torch has no Muon")
    return lambda parameters: build(library, parameters)


def in_train_mode(optimizer):
    """Schedule-free optimizers want to be told; the wrapper has the method exactly if its base does."""
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def ways(name):
    if name == "SAM":
        return ["backward, closure"]
    return ["closure"] if name == "LBFGS" or name.endswith("Closure") else ["loop", "closure"]
