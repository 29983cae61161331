"""Makes everything under `assets/`: demonstrations, tokenizers, and a policy that knows the old task.

Run from the root of the repository, all at once or step by step (each step reads what the last has written):

    python -m examples.metaworld_pi0_fast.make_assets all
    python -m examples.metaworld_pi0_fast.make_assets record
    python -m examples.metaworld_pi0_fast.make_assets tokenizers
    python -m examples.metaworld_pi0_fast.make_assets pretrain
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from . import ASSETS, NEW_TASK, OLD_TASK
from .batches import PreparedFrames
from .demonstrations import Frames, load_frames, record
from .environment import instruction
from .policy import load_policy, make_processors, new_policy, parameter_count, save_policy
from .rollouts import RolloutPool, gl_backend
from .tokenizers import fit_fast_tokenizer, fit_text_tokenizer

PACKAGES = ("lerobot", "torch", "transformers", "tokenizers", "metaworld", "mujoco", "av", "numpy", "scipy")


def demonstrations(assets: Path, task: str) -> Path:
    """Folder of the dataset of `task`."""
    return assets / "demonstrations" / task


def pretrained(assets: Path) -> Path:
    """Folder of the pretrained policy."""
    return assets / "pretrained"


def step_record(options: argparse.Namespace) -> dict[str, Any]:
    """Records both tasks."""
    report: dict[str, Any] = {}
    for task in (options.old, options.new):
        dataset = record(task, demonstrations(options.assets, task), options.episodes, options.seed)
        report[task] = {
            "instruction": instruction(task),
            "episodes": dataset.meta.total_episodes,
            "frames": dataset.meta.total_frames,
        }
    return {"seed": options.seed, "tasks": report}


def step_tokenizers(options: argparse.Namespace) -> dict[str, Any]:
    """Fits both tokenizers to the demonstrations of both tasks, normalised as for the policy."""
    frames = _frames(options)
    low, high = (torch.as_tensor(_joint_stats(frames)["action"][key]).float() for key in ("min", "max"))
    chunks = torch.cat([2 * (part.actions - low) / (high - low) - 1 for part in frames.values()]).numpy()
    folder = pretrained(options.assets) / "tokenizers"
    shutil.rmtree(folder, ignore_errors=True)
    fast = fit_fast_tokenizer(folder / "fast", chunks, options.scale, options.action_vocab)
    text = fit_text_tokenizer(folder / "text", [instruction(task) for task in frames], options.action_vocab)
    lengths = [len(tokens) for tokens in fast(chunks)]
    error = fast.decode(fast(chunks[:1000])) - chunks[:1000]
    return {
        "text_vocabulary": text.vocab_size,
        "action_vocabulary": options.action_vocab,
        "scale": options.scale,
        "chunk_size": options.chunk_size,
        "action_tokens_per_chunk": {"mean": round(float(np.mean(lengths)), 2), "max": max(lengths)},
        "rms_rounding_error": round(float(np.sqrt(np.mean(error**2))), 4),
    }


def step_pretrain(options: argparse.Namespace) -> dict[str, Any]:
    """Trains a new policy on the old task with AdamW, and measures it on both."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    frames = _frames(options)
    folder = pretrained(options.assets)
    policy = new_policy(folder / "tokenizers", chunk_size=options.chunk_size)
    processors = make_processors(policy, _joint_stats(frames))
    data = {task: PreparedFrames(part, processors[0]) for task, part in frames.items()}
    started = time.perf_counter()
    _fit(policy, data[options.old], options)
    seconds = time.perf_counter() - started
    save_policy(policy, folder, processors)

    policy = load_policy(folder)  # what is measured is what was saved
    processors = make_processors(policy, path=folder)
    report: dict[str, Any] = {
        "parameters": parameter_count(policy),
        "steps": options.steps,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "ema": options.ema,
        "seed": options.seed,
        "minutes": round(seconds / 60, 1),
        "heldout_cross_entropy": {task: round(part.heldout_loss(policy), 4) for task, part in data.items()},
    }
    if gl_backend() is not None:
        with RolloutPool(options.workers) as pool:
            report["success_on_50_heldout_goals"] = {
                task: pool.run(policy, processors, task, episodes=50).rate for task in data
            }
    return report


def _fit(policy: Any, data: PreparedFrames, options: argparse.Namespace) -> None:
    """AdamW with warm-up and cosine decay; the policy ends as the moving average of its weights."""
    parameters = list(policy.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, options.steps))
    policy.train()
    with tqdm(total=options.steps, desc=f"pretraining on {options.old}", unit="step") as progress:
        for rows in _rows(data, options):
            loss, _ = policy.forward(data.train_batch(rows))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            with torch.no_grad():
                for mean, parameter in zip(average, parameters, strict=True):
                    mean.lerp_(parameter, 1 - options.ema)
            progress.update()
            if progress.n % 100 == 0:
                progress.set_postfix(loss=f"{float(loss):.3f}")
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    policy.eval()


def cosine(step: int, steps: int, warmup: int = 50, floor: float = 0.05) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _rows(data: PreparedFrames, options: argparse.Namespace) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.steps):
        drawn = torch.randint(len(data.train_indices), (options.batch_size,), generator=generator)
        yield data.train_indices[drawn]


def _frames(options: argparse.Namespace) -> dict[str, Frames]:
    frames = {}
    for task in (options.old, options.new):
        folder = demonstrations(options.assets, task)
        if not folder.is_dir():
            raise FileNotFoundError(f"There are no demonstrations of {task} in {folder}. Run the step `record` first.")
        frames[task] = load_frames(folder, options.chunk_size)
    return frames


def _joint_stats(frames: dict[str, Frames]) -> dict[str, dict[str, Any]]:
    """Statistics over both tasks: fine-tuning must not shift the policy's units."""
    from lerobot.datasets.compute_stats import aggregate_stats

    stats: dict[str, dict[str, Any]] = aggregate_stats([part.stats for part in frames.values()])
    return stats


STEPS = {"record": step_record, "tokenizers": step_tokenizers, "pretrain": step_pretrain}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=(*STEPS, "all"))
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder to write to")
    parser.add_argument("--old", default=OLD_TASK, help="task the policy is pretrained on")
    parser.add_argument("--new", default=NEW_TASK, help="task it will be fine-tuned on")
    parser.add_argument("--episodes", type=int, default=40, help="demonstrations per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk-size", type=int, default=10, help="actions predicted and executed at a time")
    parser.add_argument("--scale", type=float, default=6.0, help="precision of the action tokens")
    parser.add_argument("--action-vocab", type=int, default=256, help="number of action tokens")
    parser.add_argument("--steps", type=int, default=2500, help="pretraining steps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.995, help="decay of the moving average of the weights")
    parser.add_argument("--threads", type=int, default=1, help="threads for pretraining")
    parser.add_argument("--workers", type=int, default=2, help="processes for rollouts")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Runs one step, or all of them, and writes down what was done in `assets.json`."""
    options = parse(arguments)
    options.assets.mkdir(parents=True, exist_ok=True)
    notes_file = options.assets / "assets.json"
    notes = json.loads(notes_file.read_text(encoding="utf-8")) if notes_file.is_file() else {}
    given = " ".join(sys.argv[1:] if arguments is None else arguments)
    for name in STEPS if options.step == "all" else (options.step,):
        notes[name] = {
            "command": f"python -m examples.metaworld_pi0_fast.make_assets {given}",
            **STEPS[name](options),
        }
        notes["old_task"], notes["new_task"] = options.old, options.new
        notes["versions"] = {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        }
        notes_file.write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
        print(json.dumps({name: notes[name]}, indent=2))


if __name__ == "__main__":
    main()
