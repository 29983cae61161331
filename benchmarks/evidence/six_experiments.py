"""Six experiments on what fine-tuning destroys, by the commands of lerobot and craft-optim alone, on a CPU.

    python benchmarks/evidence/six_experiments.py                              # a quarter of an hour on two cores
    python benchmarks/evidence/six_experiments.py --steps 800 --rollouts 50 --seeds 3
    python benchmarks/evidence/six_experiments.py --out=outputs/mine           # its folder; run again, it goes on

    0. the shipped pi0_fast, which opens a drawer, learns to answer questions about pictures: knowledge to lose
    1. baseline: lerobot-train on pressing a button
    2. hidden cache: craft-optim build-anchors of what the policy must keep
    3. token CRaFT: craft-optim train, held to the action-token logits of the drawer's frames
    4. hidden CRaFT: the same, held to hidden states: of the drawer's frames; of those and of questions
    5. craft-optim eval-mcq: what each checkpoint still knows, against the pretrained policy
    6. comparison: rollouts on both tasks, craft-optim drift, what was forgotten; one table, plots, summary.json

All methods have the same seeds, batches, learning rates and normalisation. Questions in evaluation and frames behind
the drift were never trained on and are no anchors.
"""

import argparse
import json
import shutil
from pathlib import Path

import _paths
from metaworld_pi0_fast import ASSETS, NEW_TASK, OLD_TASK
from rich.console import Console
from rich.markdown import Markdown
from six_experiments_support.commands import Steps, craft_optim, lerobot_train
from six_experiments_support.comparison import METHODS, Run, compare, markdown
from six_experiments_support.plots import draw_all

KEPT = 36  # of 40 drawer episodes; the others are held out
KEEP_OF = {"logits": "logits", "hidden": "prefix"}
# Nats for logits; of hidden states the share of the teacher's variance. About the smallest drift that a run at this
# learning rate can hold.
EPSILON = {"logits": 0.03, "hidden": 0.005}
LAYERS = (1, 2, -1)
PICTURES_SEED, HELDOUT_PICTURES_SEED = 3, 2


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=_whole, default=400, help="fine-tuning steps of every method (default: 400)")
    add("--rollouts", type=int, default=20, help="per task and policy, at most 50; 0 for none (default: 20)")
    add("--seeds", type=_whole, default=1, help="fine-tuning seeds, counted from 0 (default: 1)")
    add("--out", type=Path, default=_paths.WORK / "six_experiments", help="where everything goes")
    add("--teaching-steps", type=_whole, default=700, help="of the questions before (default: 700)")
    add("--questions", type=_whole, default=240, help="to evaluate, three to a picture (default: 240)")
    add("--anchors", type=_whole, default=768, help="frames of the drawer as anchors (default: 768)")
    add("--workers", type=_whole, default=2, help="rollout processes (default: 2)")
    add("--loaders", type=int, default=1, help="processes that read frames for training (default: 1)")
    args = parser.parse_args(arguments)
    if not 0 <= args.rollouts <= 50:
        parser.error(f"--rollouts must be in [0, 50], the goals of one seed. Found {args.rollouts}.")
    if args.questions % 3:
        parser.error(f"--questions must be a multiple of 3, the questions to a picture. Found {args.questions}.")
    return args


def _whole(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1. Found {text!r}.")
    return number


def prepare(steps: Steps, args: argparse.Namespace, out: Path) -> None:
    """0: the policy with something to lose, the questions, and the data, normalised alike for both tasks."""

    def teach_questions() -> None:
        from metaworld_pi0_fast.unpacked import unpack
        from six_experiments_support.teaching import teach

        shutil.rmtree(out / "pretrained", ignore_errors=True)
        weights = unpack(out / "pretrained") / "model.safetensors"
        teach(ASSETS / "pretrained", _demonstrations(OLD_TASK), weights, steps=args.teaching_steps, shown=4000)

    def write_data() -> None:
        from metaworld_pi0_fast.policy import load_policy, make_processors
        from six_experiments_support.data import copy_with_joint_statistics
        from six_experiments_support.quiz import pictures, write_dataset, write_questions
        from six_experiments_support.teaching import middle_state, template_of

        for name in ("quiz", "keep", "button"):
            shutil.rmtree(out / name, ignore_errors=True)
        preprocessor = make_processors(load_policy(ASSETS / "pretrained"), path=ASSETS / "pretrained")[0]
        write_questions(out / "quiz", pictures(args.questions // 3, HELDOUT_PICTURES_SEED))
        (out / "quiz" / "template.txt").write_text(template_of(preprocessor), encoding="utf-8")
        fps = json.loads((_demonstrations(OLD_TASK) / "meta" / "info.json").read_text(encoding="utf-8"))["fps"]
        shown = pictures(max(1, args.anchors // 3), PICTURES_SEED)
        # The name puts it before the drawer: its episodes are the first ones of both
        write_dataset(out / "keep" / "1-questions", shown, middle_state(preprocessor), fps)
        shutil.copytree(_demonstrations(OLD_TASK), out / "keep" / "2-drawer")
        copy_with_joint_statistics(_demonstrations(NEW_TASK), _demonstrations(OLD_TASK), out / "button")

    steps.call("0-teach-questions", teach_questions)
    steps.call("0-data", write_data)


def build_caches(steps: Steps, args: argparse.Namespace, out: Path) -> None:
    """2, and what 3 needs: caches of the pretrained policy, those with held-out frames beside them."""
    held = min(args.anchors, 192)
    layers = ["--layers", *LAYERS]
    for kind, keep in KEEP_OF.items():
        of_frames = [f"--policy.path={out / 'pretrained'}", f"--keep={keep}", *(layers if keep == "prefix" else [])]
        drawer = [*of_frames, f"--dataset.root={out / 'keep' / '2-drawer'}"]
        for name, episodes, count in ((kind, f":{KEPT}", args.anchors), (f"{kind}-heldout", f"{KEPT}:", held)):
            more = [f"--dataset.episodes={episodes}", f"--count={count}"]
            steps.command(f"2-cache-{name}", craft_optim("build-anchors", out / "anchors" / name, *drawer, *more))
    # Every question there is, and as many frames of the drawer as the others have
    total = 3 * max(1, args.anchors // 3) + args.anchors
    both = [*of_frames, f"--dataset.root={out / 'keep'}", f"--dataset.episodes=:-{40 - KEPT}", f"--count={total}"]
    steps.command("2-cache-hidden-both", craft_optim("build-anchors", out / "anchors" / "hidden-both", *both))


def fine_tune(steps: Steps, args: argparse.Namespace, run: Run) -> None:
    """1, 3 and 4: one method and seed."""
    if run.folder.exists() and not (args.out / "done" / f"{run.name}.json").is_file():
        shutil.rmtree(run.folder)  # stopped before its end; it takes minutes
    training = [
        f"--policy.path={args.out / 'pretrained'}", "--policy.push_to_hub=false", "--dataset.repo_id=local/button",
        f"--dataset.root={args.out / 'button'}", f"--output_dir={run.folder}", f"--seed={run.seed}", "--batch_size=16",
        f"--steps={args.steps}", f"--save_freq={max(1, args.steps // 4)}", "--log_freq=50",
        f"--num_workers={args.loaders}",
        "--policy.optimizer_lr=1e-3", f"--policy.scheduler_warmup_steps={min(50, args.steps)}",
        f"--policy.scheduler_decay_steps={args.steps}", "--policy.scheduler_decay_lr=5e-5", "--wandb.enable=false",
    ]  # fmt: skip
    if run.method.anchors is None:
        steps.command(run.name, lerobot_train(*training))
        return
    craft = [
        f"--craft.anchors.path={args.out / 'anchors' / run.method.anchors}", "--craft.batch_size=16",
        f"--craft.epsilon={EPSILON[run.method.kind]}", f"--craft.drift_every={max(1, args.steps // 8)}",
        "--craft.statistics=pretrained",
    ]  # fmt: skip
    steps.command(run.name, craft_optim("train", *craft, *training))


def measure(steps: Steps, args: argparse.Namespace, runs: list[Run]) -> None:
    """5 and 6: questions, rollouts, drift, forgetting."""
    out, found = args.out, args.out / "measured"
    found.mkdir(exist_ok=True)
    template = (out / "quiz" / "template.txt").read_text(encoding="utf-8")
    for run in runs:
        asked = ["eval-mcq", out / "quiz" / "questions.jsonl", f"--model={out / 'pretrained'}"]
        asked += [f"--versus={run.checkpoint()}", f"--template={template}", f"--json={found / f'mcq-{run.name}.json'}"]
        steps.command(f"5-mcq-{run.name}", craft_optim(*asked))
    # Of AdamW the way there, too: it has no drift in its own metrics
    saved = [path for run in runs for path in (run.checkpoints() if run.method.anchors is None else [run.checkpoint()])]
    for kind, epsilon in EPSILON.items():
        compared = ["drift", out / "anchors" / f"{kind}-heldout", "--policy.path", *saved, f"--epsilon={epsilon}"]
        steps.command(f"6-drift-{kind}", craft_optim(*compared, f"--json={found / f'drift-{kind}.json'}"))
    if args.rollouts:
        roll_out(steps, args, runs)


def roll_out(steps: Steps, args: argparse.Namespace, runs: list[Run]) -> None:
    """Success in the simulator, and what `forgetting.py` says of it."""
    from forgetting import record
    from metaworld_pi0_fast.rollouts import GL_HELP, RolloutPool, gl_backend
    from six_experiments_support.success import measure_success
    from stages.files import read_matrix

    found = args.out / "measured"
    policies = {"pretrained": args.out / "pretrained"} | {run.name: run.checkpoint() for run in runs}
    files = {name: found / f"success-{name}.json" for name in policies}
    if not all((args.out / "done" / f"6-rollouts-{name}.json").is_file() for name in policies):
        if gl_backend() is None:
            raise RuntimeError(f"{GL_HELP} Or pass --rollouts 0 and another --out.")
        with RolloutPool(args.workers) as pool:
            for name, path in policies.items():
                given = (pool, ASSETS / "pretrained", path, (OLD_TASK, NEW_TASK), args.rollouts, files[name])
                steps.call(f"6-rollouts-{name}", lambda given=given: measure_success(*given))  # type: ignore[misc]
    before = json.loads(files["pretrained"].read_text(encoding="utf-8"))
    for run in runs:
        after = json.loads(files[run.name].read_text(encoding="utf-8"))
        stages = [{"name": "pretrained", "trained": [OLD_TASK], "success": before}]
        stages.append({"name": run.name, "trained": [NEW_TASK], "success": after})
        matrix = found / f"matrix-{run.name}.json"
        if not matrix.is_file():
            matrix.write_text(json.dumps({"stages": stages}), encoding="utf-8")

        def write(matrix: Path = matrix, written: Path = found / f"forgetting-{run.name}.json") -> None:
            written.write_text(json.dumps(record(read_matrix(matrix)), indent=1) + "\n", encoding="utf-8")

        steps.call(f"6-forgetting-{run.name}", write)


def main(arguments: list[str] | None = None) -> list[str]:
    """Runs everything that is not done yet, and returns the names of the steps that were."""
    args, console = parse(arguments), Console()
    args.out = args.out.resolve()
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "workers", "loaders")}
    steps = Steps(args.out, settings | {"epsilon": EPSILON, "layers": list(LAYERS)}, console)
    runs = [Run(method, seed, args.out / "runs") for method in METHODS for seed in range(args.seeds)]

    prepare(steps, args, args.out)
    build_caches(steps, args, args.out)
    for run in runs:
        fine_tune(steps, args, run)
    measure(steps, args, runs)

    def report() -> None:
        record = compare(args.out, runs, EPSILON, settings)
        (args.out / "summary.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (args.out / "table.md").write_text(markdown(record), encoding="utf-8")
        draw_all(record, args.out)

    steps.call("6-report", report)
    console.print(Markdown((args.out / "table.md").read_text(encoding="utf-8")))
    console.print(f"Table, summary.json, plots, checkpoints and logs are in [bold]{args.out}[/bold]")
    return steps.done_now


def _demonstrations(task: str) -> Path:
    return ASSETS / "demonstrations" / task


if __name__ == "__main__":
    main()
