"""Accelerate: a loop that runs on one process or on many. On a language model made on the spot.

    accelerate launch --cpu --num_processes 2 examples/accelerate_launch.py     # seconds, downloads nothing
    python examples/accelerate_launch.py

A small Llama that can write words backwards is taught to shift their letters. CraftOptimizer is made before
`prepare`, like any optimizer; under DDP it averages its own gradients, and each process draws anchors of its own.

Needs `pip install craft-optim[transformers] accelerate`.
"""

import argparse
import tempfile
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from small_llama import Problems, answers, pretrained, score
from torch.utils.data import DataLoader

from craft_optim import CraftOptimizer, anchors


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tunes; one process prints what it could do before and what it can do after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=0.02, help="drift to allow, in nats per token of an answer")
    parser.add_argument("--pretraining-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    share = accelerator.num_processes
    model = pretrained(options.pretraining_steps)
    old, new = Problems("reverse", 500, seed=2), Problems("shift", 500, seed=3)
    accelerator.print(f"before: old task {score(model, old)[1]:.3f} right, new task {score(model, new)[1]:.3f}")

    (folder,) = broadcast_object_list([tempfile.mkdtemp() if accelerator.is_main_process else ""])
    prompts = torch.split(Problems("reverse", 512, seed=4).input_ids, 64)
    inputs = ({"input_ids": ids} for ids in prompts)
    cache = anchors.build(model, inputs, folder, anchors.Reading(mask=answers), progress=False, class_dim=-1)
    retention = anchors.LogitRetention(model, cache, batch_size=32 // share)

    optimizer = CraftOptimizer(torch.optim.AdamW(model.parameters(), lr=5e-3), retention, epsilon=options.epsilon)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps * share)
    loader = DataLoader(Problems("shift", 32 * options.steps, seed=6), batch_size=16 // share, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    model = accelerator.unwrap_model(model)
    accelerator.print(f"after:  old task {score(model, old)[1]:.3f} right, new task {score(model, new)[1]:.3f}")
    accelerator.print(f"drift on anchors {retention.drift(batch_size=256):.4f}, epsilon {options.epsilon:g}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
