"""pi0_fast at its real size, planned: the table in docs/performance.md. Computed on a CPU, without weights.

    python benchmarks/plan_pi0_fast.py bfloat16 float32   # plans anew with these dtypes, a minute or two each
    python benchmarks/plan_pi0_fast.py                    # writes the page from what was kept

Three cameras of 224 pixels, a prompt of 200 tokens, 256 action tokens of which a third are no padding, 257,152 classes,
top-64 of them kept.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from performance_table import PAGE, RESULTS, with_table

__all__ = ["BATCHES", "BEGIN", "END", "planned", "read_results", "render"]

FILE = RESULTS / "plan-pi0_fast.json"
BEGIN = "<!-- plan: written by `python benchmarks/plan_pi0_fast.py` -->\n"
END = "<!-- end of plan -->"

BATCHES = (8, 32)
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
VALID, COUNT, TOP_K = 1 / 3, 512, 64
GPUS = (24.0, 48.0, 80.0, 141.0)
WITHOUT, WITH = "without checkpointing", "with checkpointing"


def planned(dtype: str, size: int) -> dict[str, Any]:
    """The plan of a policy in this dtype and batches of this size, as `Plan.as_dict` has it.

    With the bytes per anchor of a cache of all classes.
    """
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig

    from craft_optim import plan
    from craft_optim.lerobot import adapter_for
    from craft_optim.lerobot.shapes import batch_of_shapes, plan_settings, policy_without_weights

    cameras = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)) for name in CAMERAS}
    policy = policy_without_weights(PI0FastConfig(device="cpu", dtype=dtype, input_features=cameras))
    adapter, batch = adapter_for(policy), batch_of_shapes(policy.config, size)
    found = plan(
        policy,
        batch,
        adapter.inputs(batch),
        top_k=TOP_K,
        valid=VALID,
        count=COUNT,
        **plan_settings(adapter),
    )
    everything = found.per_anchor - found.phases.kept + found.phases.logits / (2 * size)
    return {**found.as_dict(GPUS), "bytes_per_anchor_of_all_classes": everything}


def read_results() -> dict[str, Any]:
    """What was kept: name of a plan -> itself."""
    found: dict[str, Any] = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    return found


def render(plans: Mapping[str, Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    columns = [(name, way) for name in plans for way in (WITHOUT, WITH)]
    titles = [f"{name}, {'checkpointed' if way == WITH else 'no checkpointing'}" for name, way in columns]
    lines = [f"| computed, not measured | {' | '.join(titles)} |", "|---|" + "---:|" * len(columns)]

    def row(label: str, *cells: str) -> None:
        lines.append(f"| {label} | {' | '.join(cells)} |")

    def sizes(label: str, of: Any) -> None:
        row(label, *(_gib(of(plans[name], way)) for name, way in columns))

    sizes("weights", lambda plan, _: plan["weights"])
    sizes("gradients", lambda plan, _: plan["gradients"])
    sizes("AdamW's state", lambda plan, _: plan["optimizer_state"])
    sizes("what its step works with; nothing with `fused=True`", lambda plan, _: plan["base_step"])
    sizes("the trust region's copy, in the start", lambda plan, _: plan["trust_region_copy"])
    sizes("activations of the task", lambda plan, way: plan["passes"][way]["task"]["activations"])
    sizes("activations of the anchors", lambda plan, way: plan["passes"][way]["anchors"]["activations"])
    sizes("logits of a pass, had it all at a time", lambda plan, _: plan["logits"])
    sizes("logits that it has at a time", lambda plan, _: plan["logits_at_a_time"])
    sizes("**peak of AdamW alone**", lambda plan, way: plan["peaks"][way]["base"])
    for memory in ("copy", "bfloat16", "host"):
        sizes(f'**peak**, `gradient_memory="{memory}"`', lambda plan, way, memory=memory: plan["peaks"][way][memory])
    for place, gib in enumerate(GPUS):
        row(f"GPUs of {gib:g} GiB", *(_fit(plans[name]["gpus"][way][place]) for name, way in columns))
    return "\n".join([*lines, "", _below(next(iter(plans.values()))), ""])


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB" if size < 1000 * 2**30 else f"{size / 2**30:.0f} GiB"


def _fit(fit: Mapping[str, Any]) -> str:
    return "1" if fit["one"] else "no number" if fit["fsdp"] is None else f"{fit['fsdp']}"


def _below(plan: Mapping[str, Any]) -> str:
    cost = plan["cost"]
    few, all_classes = plan["bytes_per_anchor"], plan["bytes_per_anchor_of_all_classes"]
    return (
        f"{plan['parameters'] / 1e9:.2f} billion parameters, all of which train (lerobot holds embedding and head "
        "apart, and vision and norms in float32), GiB of 2^30 bytes, one process; B: examples of the task, and as many "
        "anchors in a pass. A third of 256 action tokens are no padding. Operations of a step over those of AdamW's: "
        f"{cost['1']:.2f} with K = 1, {cost['5']:.2f} with K = 5, {cost['10']:.2f} with K = 10. A cache of top-{TOP_K} "
        f"takes {few / 1e3:.0f} kB for an anchor, three pictures included, and {few * COUNT / 1e6:.0f} MB for {COUNT}; "
        f"of all classes {all_classes / 1e6:.0f} MB and {all_classes * COUNT / 1e9:.0f} GB. GPUs: how many of that "
        'size it takes with `gradient_memory="copy"`, more than one under FSDP2, each with this batch.'
    )


def main(dtypes: Sequence[str]) -> None:
    """Plans with these dtypes, keeps it, and writes the table."""
    kept = read_results()
    for dtype in dtypes:
        for size in BATCHES:
            kept[f"{dtype}, B = {size}"] = planned(dtype, size)
            FILE.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(with_table(PAGE.read_text("utf-8"), render(kept), BEGIN, END), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
