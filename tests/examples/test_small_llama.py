"""The toy of the language-model examples, and the examples that several processes run, shortened."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import small_llama

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


def launched(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def numbers(line):
    return [float(x) for x in re.findall(r"\d+\.\d+", line)]


def test_fsdp2_under_torchrun():
    out = launched(
        *("torch.distributed.run", "--standalone", "--nproc-per-node=2", str(EXAMPLES / "fsdp2_torchrun.py")),
        *("--pretraining-steps=250", "--steps=80", "--epsilon=0.05"),
    )
    assert out.count("2 processes") == 1, "one process prints"
    before, adamw, craft = (numbers(line)[-3:] for line in out.splitlines() if line.count("|") == 3 and "." in line)
    assert before[0] > 0.5
    assert before[2] < 1e-4
    assert adamw[2] > 10 * craft[2]


def test_accelerate_launch():
    pytest.importorskip("accelerate")
    out = launched(
        *("accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes=2"),
        *(str(EXAMPLES / "accelerate_launch.py"), "--pretraining-steps=250", "--steps=80", "--epsilon=0.05"),
    )
    lines = out.splitlines()
    assert [line.split(":")[0] for line in lines if "right" in line] == ["before", "after"], "one process prints"
    # Under plain AdamW several nats, see the other example.
    assert numbers(next(line for line in lines if "drift" in line))[0] < 0.5
