"""A plugin of lerobot-train for the tests: accelerate's FSDP on CPUs, which it keeps for GPUs.

The environment says the rest (ACCELERATE_USE_FSDP and its like). Full state dicts stay where they are: torch crashes
when it moves them from a CPU to the CPU.
"""

from functools import partial
from unittest import mock

import torch
from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed import fsdp

plugins = []


def in_state(original, self, *args, fsdp_plugin=None, **settings):
    original(self, *args, fsdp_plugin=fsdp_plugin, **settings)
    plugins.extend([] if fsdp_plugin is None else [fsdp_plugin])
    if plugins:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[0]


def on_the_cpu(original, self, module, *args, device_id=None, **settings):
    original(self, module, *args, device_id=torch.device("cpu"), **settings)


def staying(kind, *, offload_to_cpu=False, **settings):
    return kind(offload_to_cpu=False, **settings)


def replace(owner, replacement):
    original = owner.__init__
    mock.patch.object(owner, "__init__", lambda self, *a, **k: replacement(original, self, *a, **k)).start()


replace(state.AcceleratorState, in_state)
replace(fsdp.FullyShardedDataParallel, on_the_cpu)
for name in ("FullStateDictConfig", "FullOptimStateDictConfig"):
    mock.patch.object(fsdp, name, partial(staying, getattr(fsdp, name))).start()
