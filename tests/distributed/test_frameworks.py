"""Frameworks that spread a run over processes themselves: still what one process does with the whole batch."""

import pytest


@pytest.mark.parametrize("framework", ["accelerate", "trainer", "lightning"])
def test_ddp(framework_processes, cache, alone, assert_same_run, framework):
    for library in {"trainer": ("transformers", "accelerate")}.get(framework, (framework,)):
        pytest.importorskip(library)
    ((_, one),) = framework_processes.run(1, f"frameworks.{framework}", cache=cache)
    ranks = framework_processes.run(2, f"frameworks.{framework}", cache=cache)
    assert [wrapper for wrapper, _ in ranks] == ["DistributedDataParallel"] * 2
    runs = [run for _, run in ranks]
    if framework == "trainer":  # which sees metrics through a sink, and of several processes one reports
        assert runs[1]["metrics"] == []
        runs[1]["metrics"] = runs[0]["metrics"]
    assert_same_run(runs, one)
    if framework != "trainer":  # the Trainer's base has other defaults
        assert_same_run(runs, alone())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_lora_with_a_teacher_that_runs_beside_it(framework_processes, assert_same_run, parallel):
    pytest.importorskip("peft")
    ((_, one),) = framework_processes.run(1, "frameworks.peft", parallel="plain")
    assert one["metrics"][0]["retention_loss"] == 0.0
    assert one["metrics"][-1]["retention_loss"] > 1e-3
    assert_same_run([run for _, run in framework_processes.run(2, "frameworks.peft", parallel=parallel)], one)
