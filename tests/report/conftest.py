"""Runs as training leaves them, made on the spot."""

import json
import math

import pytest


def rows(steps=100, *, epsilon=0.05, final=1.0, method=None, seed=None, every=1, seconds=None, averages=False, **more):
    """Rows of a run whose drift comes up to `final` x epsilon; all numbers are functions of the step.

    `averages` adds the average of drift, K and the share of a step that was kept.
    """
    found, average = [], None
    for step in range(steps):
        row = {"step": step, "loss": 2.0 * math.exp(-step / 30), "time": 1000.0 + 0.25 * step}
        if method is not None:
            row["method"] = method
        if seed is not None:
            row["seed"] = seed
        if seconds is not None:
            row["seconds"] = seconds
        if epsilon is not None:
            at = step - step % every
            drift = final * epsilon * min(1.0, at / (0.6 * steps) + 0.1) * (1.0 + 0.02 * math.sin(at))
            row |= {"retention_loss": drift, "epsilon": epsilon, "lambda": 0.5 + at / steps}
            row |= {"violation": drift / epsilon, "grad_dot": -0.1, "grad_cos": -0.2, "conflict": float(at % 2)}
            row |= {"projected": float(drift > epsilon), "task_grad_norm": 1.0, "retention_grad_norm": 2.0}
            row |= {"merged_grad_norm": 1.5, "capped": 0.0, "clipped": 0.0, "skipped": 0.0}
            row |= {"retention_step": float(at), "fresh": float(step == at)}
            if averages:
                if step == at:
                    average = drift if average is None else 0.8 * average + 0.2 * drift
                row |= {"drift": average, "violation": average / epsilon, "interval": float(every), "step_kept": 1.0}
        found.append(row | more)
    return found


def write(path, content, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in content) + end)
    return path


@pytest.fixture(name="rows", scope="session")
def rows_fixture():
    return rows


@pytest.fixture(name="write", scope="session")
def write_fixture():
    return write


@pytest.fixture
def runs_folder(tmp_path):
    """Two seeds each of a constrained and a plain method, as examples leave them."""
    for seed in (0, 1):
        held = rows(method="craft", seed=seed, final=1.0 + 0.05 * seed, seconds=0.1, averages=True)
        plain = rows(method="adamw", seed=seed, epsilon=None, seconds=0.05)
        for row in plain:
            row["drift_anchors"] = 2.0 + 0.1 * seed
        write(tmp_path / "runs" / f"craft-seed{seed}" / "metrics.jsonl", held)
        write(tmp_path / "runs" / f"adamw-seed{seed}" / "metrics.jsonl", plain)
    return tmp_path / "runs"
