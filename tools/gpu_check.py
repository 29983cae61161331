"""What only a GPU can tell, in one command of at most eight minutes.

    python tools/gpu_check.py --json=gpu.json    # on a machine with one GPU of 80 GB
    python tools/gpu_check.py --mini             # all of it in small, on a CPU: does it run?

The kernels against their reference; the benchmarks of the surgery; and a language model of 1.5 billion parameters and
pi0_fast at its real size, both with random weights in bfloat16, for twenty steps: the memory that a step holds beside
what `craft_optim.plan` says, and the time of a step with K = 1, K = 5 and "auto" over that of AdamW's. What fits into
neither time nor memory is said.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]

import torch  # noqa: E402
from markdown_table import markdown_table  # noqa: E402
from peak_memory import peak_bytes  # noqa: E402
from planned_peaks import Case, planned  # noqa: E402
from torch import Tensor  # noqa: E402

from craft_optim import CraftOptimizer, anchors  # noqa: E402
from craft_optim.anchors import AnchorCache  # noqa: E402

# Rules of a run by its name; None for AdamW alone. A start, with its looks at other anchors, lasts 40 passes
START = "K = 1, in the start"
WAYS: dict[str, dict[str, Any] | None] = {
    "AdamW": None,
    START: {"retention_every": 1},
    "K = 1": {"retention_every": 1, "trust_region": None},
    "K = 5": {"retention_every": 5, "trust_region": None},
    "auto": {"retention_every": "auto", "trust_region": None},
}
WARM = 3  # steps that do not count for time


@dataclass
class Report:
    """What was found.

    Attributes:
        device: The GPU, or "CPU".
        passed: Name of a part of the tests -> its last line.
        trained: Name of a model -> "peak" and "planned" (bytes), and "seconds" (of a step), each by the way.
        left_out: What was not run, and why.
    """

    device: str
    passed: dict[str, str] = field(default_factory=dict)
    trained: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.device, *(f"{name}: {line}" for name, line in self.passed.items())]
        if self.trained:
            header = ["", "peak, AdamW", "planned", f"peak, {START}", "planned", *(f"step, {name}" for name in WAYS)]
            lines += ["", markdown_table(header, [_row(name, found) for name, found in self.trained.items()])]
        return "\n".join([*lines, *(f"left out: {name}: {why}" for name, why in self.left_out.items())])


def _row(name: str, found: dict[str, Any]) -> list[str]:
    cells = [name]
    for way in ("AdamW", START):
        cells += [f"{found['peak'][way] / 2**30:.3g} GiB", f"{found['planned'][way] / 2**30:.3g} GiB"]
    seconds = found["seconds"]
    return [*cells, *(f"{1e3 * seconds[way]:.3g} ms, {seconds[way] / seconds['AdamW']:.2f} x" for way in WAYS)]


def tested(arguments: Sequence[str], seconds: float) -> str:
    """The last line of pytest, which must not fail."""
    run = [sys.executable, "-m", "pytest", "-q", "--no-header", *arguments]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(run)} failed:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return done.stdout.strip().splitlines()[-1]


def trained(case: Case, device: torch.device, steps: int) -> dict[str, Any]:
    """Peaks beside the plan's, and seconds of a step by K."""
    plan = planned(case)
    found: dict[str, Any] = {"peak": {}, "seconds": {}}
    found["planned"] = {"AdamW": plan.peak("base"), START: plan.peak("copy")}
    with tempfile.TemporaryDirectory() as folder:
        anchors.build(case.make().eval(), [case.anchors()], folder, progress=False, **case.build)
        for name, rules in WAYS.items():
            _free(device)
            times: list[float] = []

            def run(rules: dict[str, Any] | None = rules, times: list[float] = times) -> None:
                times += _steps(case, folder, rules, steps, device)

            found["peak"][name] = peak_bytes(run, device)
            found["seconds"][name] = statistics.fmean(times[WARM:])  # not all steps have a pass
    return found


def _steps(case: Case, folder: str, rules: dict[str, Any] | None, steps: int, device: torch.device) -> list[float]:
    """Seconds of each step of a new model."""
    model, batch = case.make().train(), case.batch()
    optimizer: Any = case.base(model.parameters())
    if rules is not None:
        cache = AnchorCache.open(folder, case.build.get("reading"))
        retention = cache.retention(model, batch_size=len(cache), workers=0)
        optimizer = CraftOptimizer(optimizer, retention, **rules)
    times = []
    for _ in range(steps):
        _wait(device)
        began = time.perf_counter()
        optimizer.zero_grad()
        case.loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        _wait(device)
        times.append(time.perf_counter() - began)
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def listed(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """AdamW over lists of tensors, at a rate at which random weights hardly move."""
    return torch.optim.AdamW(parameters, lr=1e-6, foreach=True)


def language_model(device: torch.device, mini: bool) -> Case:
    """A decoder with the sizes of a Qwen2 of 1.5 billion parameters; 8 rows of 512 tokens."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes: dict[str, int] = {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151_936,
    }  # fmt: skip
    rows, length = 8, 512
    if mini:
        sizes |= {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 5000}
        rows, length = 2, 32
    config = Qwen2Config(**sizes, tie_word_embeddings=True, dtype=torch.bfloat16)

    def make() -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            return Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)

    ids = torch.randint(0, sizes["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1)).to(device)
    return Case(make, lambda: {"input_ids": ids, "labels": ids}, base=listed)


def policy(device: torch.device, mini: bool) -> Case:
    """pi0_fast with three cameras, a prompt of 200 and 256 action tokens, a third of them valid; 4 frames."""
    from contextlib import nullcontext

    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
    from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
    from metaworld_pi0_fast import ASSETS
    from metaworld_pi0_fast.policy import ACTION_TOKENIZER, TEXT_TOKENIZER, Backbone, small_backbone

    from craft_optim.lerobot import adapter_for
    from craft_optim.lerobot.pi0_fast import ACTION_MASK, action_mask
    from craft_optim.lerobot.shapes import batch_of_shapes

    small = Backbone(width=32, depth=2, mlp=64, heads=2, vision_width=32, vision_depth=1, vision_mlp=64, patch=14,
                     vision_heads=2, image=224)  # fmt: skip
    classes = 5000 if mini else 257_152
    names = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    config = PI0FastConfig(
        device=str(device),
        dtype="float32" if mini else "bfloat16",
        text_tokenizer_name=str(ASSETS / "pretrained" / TEXT_TOKENIZER),
        action_tokenizer_name=str(ASSETS / "pretrained" / ACTION_TOKENIZER),
        input_features={f"observation.images.{x}": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)) for x in names},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
    )

    def make() -> Any:
        torch.manual_seed(0)
        with small_backbone(small, classes) if mini else nullcontext(), torch.device(device):
            return PI0FastPolicy(config)

    generator = torch.Generator().manual_seed(1)

    def filled(x: Tensor) -> Tensor:
        if x.dtype == torch.bool:
            return torch.ones(x.shape, dtype=torch.bool)
        if x.is_floating_point():
            return torch.rand(x.shape, generator=generator)
        return torch.randint(1, classes, x.shape, generator=generator)

    batch = {name: filled(x) for name, x in batch_of_shapes(config, 1 if mini else 4).items()}
    batch[ACTION_MASK][:, batch[ACTION_MASK].shape[1] // 3 :] = False
    batch = {name: x.to(device) for name, x in batch.items()}
    adapter = adapter_for(make())
    return Case(
        make,
        lambda: batch,
        lambda: adapter.inputs(batch),
        base=listed,
        loss=lambda model, given: model(given)[0],
        build={"reading": adapter.reading, "output": "classes"},
        valid=float(action_mask(batch).float().mean()),
    )


def check(device: torch.device, *, mini: bool, minutes: float) -> Report:
    """Runs all parts, as far as time and memory allow."""
    began = time.monotonic()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    report = Report(f"{name}, torch {torch.__version__}")

    def left() -> float:
        return 60 * minutes - (time.monotonic() - began)

    benches = ["benchmarks/test_surgery.py", "--benchmark-disable" if mini else "--benchmark-columns=median"]
    parts: dict[str, Callable[[], None]] = {
        "kernels": lambda: report.passed.update(kernels=tested(["tests/kernels"], left())),
        "surgery": lambda: report.passed.update(
            surgery=tested([*benches, *(["--collect-only"] if mini else [])], left())
        ),
    }
    for title, made in (("language model, 1.5 B", language_model), ("pi0_fast", policy)):
        parts[title] = lambda title=title, made=made: report.trained.update(  # type: ignore[misc]
            {title: trained(made(device, mini), device, WARM + (2 if mini else 20))}
        )
    for title, part in parts.items():
        if left() < 30.0:
            report.left_out[title] = "the time is over"
            continue
        try:
            part()
        except (ImportError, torch.OutOfMemoryError, subprocess.TimeoutExpired) as error:
            report.left_out[title] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        _free(device)
        print(f"{title}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return report


def main(arguments: Sequence[str] | None = None) -> Report:
    """Runs the check and prints its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mini", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="what does not begin in time is left out")
    parser.add_argument("--json", type=Path, help="write the report there, too")
    args = parser.parse_args(arguments)
    if not args.mini and not torch.cuda.is_available():
        parser.error("there is no GPU: --mini runs it in small on a CPU")
    device = torch.device("cpu" if args.mini else "cuda")
    report = check(device, mini=args.mini, minutes=args.minutes)
    print(report)
    if args.json:
        args.json.write_text(f"{json.dumps(asdict(report), indent=1)}\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    main()
