"""Fine-tune a pi0_fast that knows seven tasks on one more: with plain AdamW, and with CraftOptimizer(AdamW).

    python examples/pi0_fast_craft.py                          # small policy, MetaWorld, all shipped: minutes on a CPU
    python examples/pi0_fast_craft.py --seeds 3                # the same with three seeds
    python examples/pi0_fast_craft.py --retention hidden       # anchor hidden states instead of action-token logits
    python examples/pi0_fast_craft.py --policy.path=lerobot/pi0fast-base --dataset.repo_id=you/new_task \
        --anchors.repo_id=you/old_task --device=cuda           # a policy and datasets of the hub

Both methods start from the same weights and see the same batches in the same order. Everything that is specific to
retention is in `anchor` and in the one line that wraps the optimizer.
"""

import argparse
import copy
import json
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from metaworld_pi0_fast import NEW_TASK, OLD_TASKS, SKILLS
from metaworld_pi0_fast.batches import PreparedFrames
from metaworld_pi0_fast.demonstrations import load_frames
from metaworld_pi0_fast.pictures import draw_curves, draw_films, draw_success
from metaworld_pi0_fast.policy import load_policy, make_processors, parameter_count, save_policy
from metaworld_pi0_fast.rollouts import GL_HELP, RolloutPool, gl_backend
from metaworld_pi0_fast.summary import Outcome, print_table, summarise
from rich.console import Console
from torch import Tensor
from tqdm.auto import tqdm

from craft_optim import CraftOptimizer, Rules, anchors
from craft_optim.lerobot.pi0_fast import action_logits, action_mask, anchor_inputs, prefix_spans, run_prefix
from craft_optim.report import read_runs, render

METHODS = ("pretrained", "adamw", "craft")
# logits (nats): the default of craft-optim train; this learning rate can reach it.
# hidden (share of variance): about the smallest drift that a policy of one task could reach; at 0.03 it let go of that.
EPSILON = {"logits": 0.1, "hidden": 0.005}
PROBE_EVERY = 25  # steps between two measurements of drift, for the report
PROBED = 64  # anchors of each, and held-out frames
STRIDE = 2  # every second frame of what is to be kept is an anchor: neighbours are alike

console = Console()


@dataclass
class Task:
    """A task's demonstrations, and its name in the simulator if it has one."""

    name: str
    frames: PreparedFrames
    environment: str | None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--policy.path", dest="policy", default=None, help="folder or hub id of a pi0_fast (default: the shipped one)")
    add("--dataset.repo_id", dest="dataset", default=None, help="LeRobotDataset of the new task (default: shipped)")
    add("--anchors.repo_id", dest="anchors", default=None, help="LeRobotDataset of what to keep (default: shipped)")
    add("--dataset.episodes", dest="episodes", type=int, default=None, help="use the first N episodes of each dataset")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to run (default: all)")
    add("--retention", choices=tuple(EPSILON), default="logits", help="what the anchors hold (default: logits)")
    add("--layers", nargs="+", type=int, default=[1, 2, -1], help="layers for --retention hidden; -1 is the last")
    add("--epsilon", type=float, default=None, help=f"drift to allow (default: {EPSILON})")
    add("--retention-every", type=every, default="auto", help="run retention on every K-th step (default: auto)")
    add("--rho", type=float, default=Rules.rho, help=f"cap on retention's share of a step (default: {Rules.rho:g})")
    add("--anchor-batch-size", type=int, default=16, help="anchors per retention pass (default: 16)")
    add("--steps", type=int, default=400, help="fine-tuning steps (default: 400)")
    add("--batch-size", type=int, default=16, help="frames per step (default: 16)")
    add("--lr", type=float, default=1e-3, help="peak learning rate, cosine with 50 steps of warm-up (default: 1e-3)")
    add("--seeds", type=int, default=1, help="number of seeds, counted from --seed (default: 1)")
    add("--seed", type=int, default=0, help="the first seed (default: 0)")
    add("--rollouts", type=int, default=10, help="episodes per task and policy, on held-out goals; 0 for none")
    add("--workers", type=int, default=2, help="rollout processes (default: 2)")
    add("--device", default="cpu", help="device to train on (default: cpu)")
    add("--threads", type=int, default=1, help="CPU threads; more are slower on a model this small (default: 1)")
    add("--save-every", type=int, default=200, help="steps between checkpoints (default: 200)")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    add(
        "--out",
        type=lambda text: Path(text).expanduser(),
        default=Path(__file__).parent / "out",
        help="where the results go",
    )
    args = parser.parse_args(arguments)
    if args.policy and not (args.dataset and args.anchors):
        parser.error("--policy.path needs --dataset.repo_id (the new task) and --anchors.repo_id (what to keep)")
    if args.epsilon is None:
        args.epsilon = EPSILON[args.retention]
    return args


def every(text: str) -> int | str:
    """K of --retention-every."""
    return text if text == "auto" else int(text)


def load_task(
    repo_id: str | None,
    environment: str,
    policy: Any,
    preprocessor: Any,
    args: argparse.Namespace,
    shipped: Path = SKILLS,
) -> Task:
    """Demonstrations of the hub; those of `environment` under `shipped`, if there is no repo id."""
    data = repo_id or shipped / "demonstrations" / environment
    episodes = list(range(args.episodes)) if args.episodes else None
    frames = load_frames(data, policy.config.chunk_size, episodes=episodes)
    return Task(repo_id or environment, PreparedFrames(frames, preprocessor), None if repo_id else environment)


def together(tasks: Sequence[Task]) -> Task:
    """The frames of several tasks as those of one, which has no place in the simulator."""
    name = f"{len(tasks)} tasks" if len(tasks) > 1 else tasks[0].name
    return Task(name, PreparedFrames.joined([task.frames for task in tasks]), None)


def anchor(policy: Any, task: Task, rows: Tensor, path: Path, args: argparse.Namespace) -> anchors.AnchorCache:
    """Writes down what the policy says about these frames before it is fine-tuned."""
    name, batches = args.policy or "small pi0_fast", task.frames.anchor_batches(rows, anchor_inputs)
    if args.retention == "logits":
        return anchors.build(
            policy, batches, path, anchors.Reading(action_logits, action_mask), class_dim=-1, model_id=name
        )
    pooling = {"image": "masked_mean", "text": "masked_mean"}
    reading = anchors.Reading(run_prefix, spans=prefix_spans, pooling=pooling)
    return anchors.build(policy, batches, path, reading, output=None, layers=args.layers, model_id=name)


def retention_of(policy: Any, cache: anchors.AnchorCache, args: argparse.Namespace, seed: int) -> Any:
    """The retention closure: drift from the snapshot on the next batch of anchors."""
    return cache.retention(policy, batch_size=min(args.anchor_batch_size, len(cache)), seed=seed)


def rows_of_step(rows: Tensor, batch_size: int, seed: int, step: int) -> Tensor:
    """The training frames of a step: a function of seed and step alone, so that a resumed run sees the same ones."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return rows[torch.randint(len(rows), (batch_size,), generator=generator)]


def warmup_cosine(steps: int, warmup: int = 50, floor: float = 0.05) -> Any:
    """The usual learning-rate factor: linear warm-up, then a cosine to `floor`."""
    return lambda t: min(1.0, (t + 1) / warmup) * (floor + (1 - floor) * (1 + math.cos(math.pi * t / steps)) / 2)


def make_optimizer(
    policy: Any, method: str, retention: Any, args: argparse.Namespace
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW for "adamw", and for "craft" the same one wrapped; with its learning-rate schedule."""
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.01)
    if method == "craft":
        optimizer = CraftOptimizer(
            optimizer,
            retention,
            epsilon=args.epsilon,
            rho=args.rho,
            retention_every=args.retention_every,
            total_steps=args.steps,
            max_grad_norm=1.0,
        )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(args.steps))


def train_step(policy: Any, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, scheduler: Any) -> Any:
    """One step, the same for both methods; returns the loss on the new task."""
    loss, _ = policy.forward(batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    scheduler.step()
    return loss


def fine_tune(
    policy: Any, method: str, new: Task, retention: Any, heldout: Any, args: argparse.Namespace, seed: int
) -> float:
    """Trains `policy` on the new task, writes metrics and checkpoints, and returns the milliseconds per step."""
    folder = args.out / "runs" / f"{method}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    optimizer, scheduler = make_optimizer(policy, method, retention, args)

    torch.manual_seed(seed)
    first, seconds = 0, 0.0
    if args.resume and (folder / "training.pt").is_file():
        saved = torch.load(folder / "training.pt", weights_only=True, map_location=args.device)
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["rng"].cpu())
        first, seconds = saved["step"], saved["seconds"]
    metrics = folder / "metrics.jsonl"
    kept = metrics.read_text(encoding="utf-8").splitlines(keepends=True)[:first] if first else []
    metrics.write_text("".join(kept), encoding="utf-8")  # steps after the checkpoint are run again

    policy.train()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc=f"{method} (seed {seed})")
    for step in bar:
        batch = new.frames.train_batch(rows_of_step(new.frames.train_indices, args.batch_size, seed, step))
        started = time.perf_counter()
        loss = train_step(policy, batch, optimizer, scheduler)
        took = time.perf_counter() - started
        seconds += took

        row = {"method": method, "seed": seed, "step": step, "loss": loss.item(), "seconds": took}
        row |= getattr(optimizer, "metrics", {})
        if step % PROBE_EVERY == 0 or step == args.steps - 1:
            row |= {"drift_anchors": retention.drift(count=PROBED), "drift_heldout": retention.drift(heldout, PROBED)}
            bar.set_postfix(loss=f"{row['loss']:.3f}", drift=f"{row['drift_anchors']:.4f}")
        with metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if (step + 1) % args.save_every == 0 or step == args.steps - 1:
            save_policy(policy, folder / "policy")
            state = {"policy": policy, "optimizer": optimizer, "scheduler": scheduler}
            progress = {"step": step + 1, "seconds": seconds, "rng": torch.get_rng_state()}
            aside = folder / "training.pt.part"  # a kill in the middle of writing leaves the last checkpoint whole
            torch.save({name: part.state_dict() for name, part in state.items()} | progress, aside)
            aside.replace(folder / "training.pt")
    policy.eval()
    return float(1e3 * seconds / args.steps)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs everything and returns the summary that is also written to `summary.json`."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    if not args.resume:
        shutil.rmtree(args.out / "runs", ignore_errors=True)
        shutil.rmtree(args.out / "anchors", ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)

    source = args.policy or SKILLS / "pretrained"
    policy = load_policy(source, device=args.device)
    processors = make_processors(policy, path=source)

    tasks = OLD_TASKS[:1] if args.anchors else OLD_TASKS
    known = [load_task(args.anchors, task, policy, processors[0], args) for task in tasks]
    new = load_task(args.dataset, NEW_TASK, policy, processors[0], args)
    console.print(
        f"[bold]pi0_fast[/bold], {parameter_count(policy) / 1e6:.2f} M parameters; keep "
        f"[cyan]{', '.join(task.name for task in known)}[/cyan], learn [cyan]{new.name}[/cyan] "
        f"({len(new.frames.train_indices)} frames)"
    )

    with ExitStack() as stack:
        pool = None
        if args.rollouts and known[0].environment and new.environment:
            if gl_backend() is None:
                console.print(f"[yellow]Rollouts are skipped, everything else runs.[/yellow] {GL_HELP}")
            else:
                pool = stack.enter_context(RolloutPool(workers=args.workers))
        return _run(args, policy, processors, known, new, pool)


def _run(
    args: argparse.Namespace, policy: Any, processors: Any, known: list[Task], new: Task, pool: RolloutPool | None
) -> dict[str, Any]:
    snapshot = copy.deepcopy(policy.state_dict())
    old = together(known)
    rows = old.frames.train_indices[::STRIDE]
    anchor_cache = anchor(policy, old, rows, args.out / "anchors" / args.retention, args)
    heldout_cache = anchor(
        policy, old, old.frames.heldout_indices, args.out / "anchors" / f"{args.retention}-held-out", args
    )

    films: dict[str, Any] = {}  # the first held-out goal of the first old task, per method

    def success(tasks: Sequence[Task], film_as: str | None = None) -> dict[str, list[bool]] | None:
        if pool is None:
            return None
        found = {}
        for task in tasks:
            stride = 4 if film_as and task is tasks[0] else 0
            made = pool.run(policy, processors, task.name, episodes=args.rollouts, film_stride=stride)
            found[task.name] = made.successes
            if film_as and made.film is not None:
                films[film_as] = made.film
        return found

    def evaluate(method: str, seed: int, ms_per_step: float | None) -> Outcome:
        retention = retention_of(policy, anchor_cache, args, seed)
        filmed = method != "pretrained" and method not in films
        return Outcome(
            method=method,
            seed=seed,
            old_success=success(known, film_as=method if filmed else None),
            new_success=success([new]),
            old_ce=old.frames.heldout_loss(policy),
            new_ce=new.frames.heldout_loss(policy),
            drift_anchor=retention.drift(),
            drift_heldout=retention.drift(heldout_cache),
            ms_per_step=ms_per_step,
        )

    outcomes: list[Outcome] = []
    seeds = list(range(args.seed, args.seed + args.seeds))
    lines = []
    if "pretrained" in args.methods:
        outcomes.append(evaluate("pretrained", seeds[0], None))
    for seed in seeds:
        for method in [m for m in args.methods if m != "pretrained"]:
            policy.load_state_dict(snapshot)
            retention = retention_of(policy, anchor_cache, args, seed)
            ms = fine_tune(policy, method, new, retention, heldout_cache, args, seed)
            outcomes.append(evaluate(method, seed, ms))
            lines.append((args.out / "runs" / f"{method}-seed{seed}" / "metrics.jsonl").read_text(encoding="utf-8"))
    (args.out / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")

    settings = {k: v for k, v in vars(args).items() if k not in ("methods", "out")}
    summary = summarise(outcomes, args.epsilon) | {"seeds": seeds, "settings": settings}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (args.out / "outcomes.json").write_text(
        json.dumps([asdict(o) for o in outcomes], indent=2) + "\n", encoding="utf-8"
    )
    print_table(summary, old.name, new.name, console)
    if lines:
        draw_curves(args.out / "metrics.jsonl", args.epsilon, args.out / "curves.png")
        page = render(read_runs([f"{args.out / 'runs'}"]), f"Keep {old.name}, learn {new.name}")
        (args.out / "report.html").write_text(page, encoding="utf-8")
    if pool is not None:
        draw_success(summary, old.name, args.out / "success.png")
    if films:
        draw_films(films, args.out / "rollout.gif")
    console.print(
        f"Pictures, metrics, summary and checkpoints are in [bold]{args.out}[/bold]; report.html judges the runs"
    )
    return summary


if __name__ == "__main__":
    main()
