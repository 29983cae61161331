"""The toy of the language-model examples, and the examples that several processes run, shortened."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import small_llama
from warm import Python

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_data_is_what_it_says():
    for task in ("reverse", "shift"):
        rows = small_llama.Problems(task, 2000, seed=0)
        words = [
            "".join(small_llama.VOCABULARY[i] for i in row["input_ids"][1:])
            for row in (rows[i] for i in range(len(rows)))
        ]
        for word in words:
            prompt, answer = word.split("=")
            moved = small_llama.LETTERS[1:] + small_llama.LETTERS[0]
            wanted = prompt[::-1] if task == "reverse" else prompt.translate(str.maketrans(small_llama.LETTERS, moved))
            assert answer == wanted
        assert ((rows.labels == -100).sum(1) == small_llama.LENGTH + 2).all()


def test_the_mask_selects_what_predicts_the_answers():
    problems = small_llama.Problems("shift", 3, seed=0)
    predicted = problems.labels[:, 1:] != -100
    mask = small_llama.answers({"input_ids": problems.input_ids})
    assert mask[:, :-1].equal(predicted)
    assert not mask[:, -1].any()


@pytest.fixture(scope="module")
def warm():
    """What the examples import takes longer than they do."""
    with Python("accelerate", "transformers.models.llama.modeling_llama", "craft_optim.anchors") as warm:
        yield warm


def launched(launcher, warm, *command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-m", *launcher, *warm.runs, *command], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def numbers(line):
    return [float(x) for x in re.findall(r"\d+\.\d+", line)]


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="FSDP2 of torch 2.6 does not run on CPUs")
def test_fsdp2_under_torchrun(warm):
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    settings = ("--pretraining-steps=160", "--steps=80", "--epsilon=0.05")
    out = launched(torchrun, warm, EXAMPLES / "fsdp2_torchrun.py", *settings)
    assert out.count("2 processes") == 1, "one process prints"
    before, adamw, craft = (numbers(line)[-3:] for line in out.splitlines() if line.count("|") == 3 and "." in line)
    assert before[0] > 0.5
    assert before[2] < 1e-4
    assert adamw[2] > 10 * craft[2]


def test_accelerate_launch(warm):
    pytest.importorskip("accelerate")
    launch = ("accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=2")
    settings = ("--pretraining-steps=160", "--steps=80", "--epsilon=0.05")
    out = launched(launch, warm, EXAMPLES / "accelerate_launch.py", *settings)
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines if "right" in line] == ["before", "after"], "one process prints"
    # Under plain AdamW several nats, see the other example.
    assert numbers(next(line for line in lines if "drift" in line))[0] < 0.5
