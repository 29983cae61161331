"""Makes everything under `assets/`: demonstrations, tokenizers, and a policy that knows the old tasks.

Run from the root of the repository, all at once or step by step (each step reads what the last has written):

    python -m examples.metaworld_pi0_fast.make_assets all
    python -m examples.metaworld_pi0_fast.make_assets record
    python -m examples.metaworld_pi0_fast.make_assets tokenizers
    python -m examples.metaworld_pi0_fast.make_assets pretrain
    python -m examples.metaworld_pi0_fast.make_assets ship

What the policy is trained on stays in `--recordings`; the last episodes of each task are made once more, the same,
for `--assets`: the policy has not seen the last four of them. With `--many` it is the policy that knows many tasks,
under `assets/skills`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from . import ASSETS, NEW_TASK, NEW_TASKS, OLD_TASK, OLD_TASKS, SKILLS
from .batches import PreparedFrames
from .demonstrations import Frames, load_frames, record
from .environment import instruction
from .policy import Backbone, load_policy, make_processors, new_policy, parameter_count, save_policy
from .rollouts import RolloutPool, gl_backend
from .tokenizers import fit_fast_tokenizer, fit_text_tokenizer

TRAINED_ONLY = "door-close-v3"  # pretrained on, but solved in 38 of 50 rollouts alone: not among what it knows
MANY = {
    "assets": SKILLS,
    "old": (*OLD_TASKS[:5], TRAINED_ONLY, *OLD_TASKS[5:]),
    "new": NEW_TASKS,
    "shipped_old": 12,
    "shipped_new": 20,
    "prompt_length": 24,
    "max_action_tokens": 34,
    "backbone": {"width": 128, "depth": 4, "mlp": 320, "vision_width": 80, "vision_mlp": 224},
    "steps": 10_000,
}
"""Defaults of the policy that knows many tasks"""

RECORDINGS = ASSETS.parents[1] / "out" / "recordings"
PACKAGES = ("lerobot", "torch", "transformers", "tokenizers", "metaworld", "mujoco", "av", "numpy", "scipy")


def demonstrations(assets: Path, task: str) -> Path:
    """Folder of the dataset of `task`."""
    return assets / "demonstrations" / task


def pretrained(assets: Path) -> Path:
    """Folder of the pretrained policy."""
    return assets / "pretrained"


def step_record(options: argparse.Namespace) -> dict[str, Any]:
    """Records all tasks, for pretraining."""
    episodes = dict.fromkeys((*options.old, *options.new), options.episodes)
    return _record(options.recordings, episodes, options)


def step_ship(options: argparse.Namespace) -> dict[str, Any]:
    """Records the last episodes of every task once more: the same ones, for they depend on the seed alone."""
    known = [task for task in options.old if task != TRAINED_ONLY]
    kept = dict.fromkeys(known, options.shipped_old) | dict.fromkeys(options.new, options.shipped_new)
    return _record(options.assets, kept, options)


def _record(folder: Path, kept: dict[str, int], options: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for task, count in kept.items():
        meta = record(task, demonstrations(folder, task), count, options.seed, skip=options.episodes - count).meta
        found = {"instruction": instruction(task), "episodes": meta.total_episodes, "frames": meta.total_frames}
        report[task] = found
    return {"seed": options.seed, "tasks": report}


def step_tokenizers(options: argparse.Namespace) -> dict[str, Any]:
    """Fits both tokenizers to the demonstrations of all tasks, normalised as for the policy."""
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
    """Trains a new policy on the old tasks with AdamW, and measures it on all."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    frames = _frames(options)
    folder = pretrained(options.assets)
    policy = new_policy(
        folder / "tokenizers",
        Backbone(**options.backbone),
        chunk_size=options.chunk_size,
        max_action_tokens=options.max_action_tokens,
        tokenizer_max_length=options.prompt_length,
    )
    processors = make_processors(policy, _joint_stats(frames))
    data = {task: PreparedFrames(part, processors[0]) for task, part in frames.items()}
    started = time.perf_counter()
    known = PreparedFrames.joined([data[task] for task in options.old])
    settings = {name: getattr(options, name) for name in ("steps", "batch_size", "lr", "ema", "seed")}
    fit(policy, known, **settings)
    seconds = time.perf_counter() - started
    save_policy(policy, folder, processors)

    policy = load_policy(folder)  # what is measured is what was saved
    processors = make_processors(policy, path=folder)
    report: dict[str, Any] = {
        "parameters": parameter_count(policy),
        **settings,
        "minutes": round(seconds / 60, 1),
        "heldout_cross_entropy": {task: round(part.heldout_loss(policy), 4) for task, part in data.items()},
    }
    if gl_backend() is not None:
        with RolloutPool(options.workers) as pool:
            report["success_on_50_heldout_goals"] = {
                task: pool.run(policy, processors, task, episodes=50).rate for task in data
            }
    return report


def fit(policy: Any, data: PreparedFrames, *, steps: int, batch_size: int, lr: float, ema: float, seed: int) -> None:
    """AdamW with warm-up and cosine decay; the policy ends as the moving average of its weights.

    Args:
        policy: One of lerobot's.
        data: Its `train_indices` are drawn with replacement.
        steps: Of training.
        batch_size: Frames of a step.
        lr: Learning rate, at its highest.
        ema: Decay of the moving average.
        seed: Of the order of frames.
    """
    parameters = list(policy.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    generator = torch.Generator().manual_seed(seed)
    policy.train()
    with tqdm(total=steps, desc="pretraining", unit="step") as progress:
        for _ in range(steps):
            drawn = torch.randint(len(data.train_indices), (batch_size,), generator=generator)
            loss, _ = policy.forward(data.train_batch(data.train_indices[drawn]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            with torch.no_grad():
                for mean, parameter in zip(average, parameters, strict=True):
                    mean.lerp_(parameter, 1 - ema)
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


def _frames(options: argparse.Namespace) -> dict[str, Frames]:
    frames = {}
    for task in (*options.old, *options.new):
        folder = demonstrations(options.recordings, task)
        if not folder.is_dir():
            raise FileNotFoundError(f"There are no demonstrations of {task} in {folder}. Run the step `record` first.")
        frames[task] = load_frames(folder, options.chunk_size)
    return frames


def _joint_stats(frames: dict[str, Frames]) -> dict[str, dict[str, Any]]:
    """Statistics over all tasks: fine-tuning must not shift the policy's units."""
    from lerobot.datasets.compute_stats import aggregate_stats

    stats: dict[str, dict[str, Any]] = aggregate_stats([part.stats for part in frames.values()])
    return stats


STEPS = {"record": step_record, "tokenizers": step_tokenizers, "pretrain": step_pretrain, "ship": step_ship}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=(*STEPS, "all"))
    parser.add_argument("--many", action="store_true", help="the policy that knows many tasks: other defaults")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder to write to")
    parser.add_argument("--recordings", type=Path, default=RECORDINGS, help="folder of what the policy is trained on")
    parser.add_argument("--old", nargs="+", default=[OLD_TASK], help="tasks that the policy is pretrained on")
    parser.add_argument("--new", nargs="+", default=[NEW_TASK], help="tasks that it will be fine-tuned on")
    parser.add_argument("--episodes", type=int, default=40, help="demonstrations per task")
    parser.add_argument("--shipped-old", type=int, default=40, help="of each old task, so many go to --assets")
    parser.add_argument("--shipped-new", type=int, default=40, help="of each new task, so many go to --assets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk-size", type=int, default=10, help="actions predicted and executed at a time")
    parser.add_argument("--scale", type=float, default=6.0, help="precision of the action tokens")
    parser.add_argument("--action-vocab", type=int, default=256, help="number of action tokens")
    parser.add_argument("--prompt-length", type=int, default=20, help="longest prompt, in tokens")
    parser.add_argument("--max-action-tokens", type=int, default=28, help="longest chunk, in tokens, with its marks")
    parser.add_argument("--backbone", type=json.loads, default={}, help="sizes as JSON; see `policy.Backbone`")
    parser.add_argument("--steps", type=int, default=2500, help="pretraining steps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.995, help="decay of the moving average of the weights")
    parser.add_argument("--threads", type=int, default=1, help="threads for pretraining")
    parser.add_argument("--workers", type=int, default=2, help="processes for rollouts")
    if parser.parse_args(arguments).many:
        parser.set_defaults(**MANY)
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
        notes["old_tasks"], notes["new_tasks"] = list(options.old), list(options.new)
        notes["versions"] = {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        }
        notes_file.write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
        print(json.dumps({name: notes[name]}, indent=2))


if __name__ == "__main__":
    main()
