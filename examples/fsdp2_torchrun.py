"""FSDP2: every process holds a part of the model, and of the anchors. On a language model made on the spot.

    torchrun --nproc-per-node 2 examples/fsdp2_torchrun.py     # about a minute on two cores, downloads nothing

A small Llama that can write words backwards is taught to shift their letters, all of its parameters sharded over the
processes: once with AdamW, once with CraftOptimizer(AdamW). Nothing in the loop knows the difference.

Needs `pip install craft-optim[transformers]`.
"""

import argparse
import copy
import os
import tempfile
from collections.abc import Sequence

import torch
import torch.distributed as dist
from small_llama import Problems, answers, pretrained, score
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from craft_optim import CraftOptimizer, anchors


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """The model over all processes, layer by layer, in place."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model.to(device)
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, problems: Problems, device: torch.device) -> None:
    """What anyone's loop does."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(problems) // 32)
    loader = DataLoader(problems, batch_size=32 // dist.get_world_size(), sampler=DistributedSampler(problems, seed=0))
    for batch in loader:
        model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tunes twice; one process prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=0.02, help="drift to allow, in nats per token of an answer")
    parser.add_argument("--pretraining-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")

    base = pretrained(options.pretraining_steps)
    old, new = Problems("reverse", 500, seed=2), Problems("shift", 500, seed=3)
    # What the model says before it is fine-tuned: each process runs and writes its share.
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [""]
    dist.broadcast_object_list(folder)
    prompts = torch.split(Problems("reverse", 512, seed=4).input_ids, 64)
    inputs = ({"input_ids": ids} for ids in prompts)
    cache = anchors.build(base, inputs, folder[0], anchors.Reading(mask=answers), progress=False, class_dim=-1)

    lines = []
    for name in ("before", "AdamW", "CraftOptimizer(AdamW)"):
        model = shard(copy.deepcopy(base), device)
        retention = anchors.LogitRetention(model, cache, batch_size=32 // dist.get_world_size())
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        if name == "CraftOptimizer(AdamW)":
            optimizer = CraftOptimizer(optimizer, retention, epsilon=options.epsilon)
        if name != "before":
            train(model, optimizer, Problems("shift", 32 * options.steps, seed=6), device)
        (_, right_old), (_, right_new) = score(model, old), score(model, new)
        drift = retention.drift(batch_size=256)
        lines.append(f"{name:22} | {right_old:15.3f} | {right_new:15.3f} | {max(drift, 0.0):.4f}")  # KL is rounded, too
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, epsilon {options.epsilon:g}")
        print(f"{'':22} | old task, right | new task, right | drift")
        print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
