"""lerobot-train with retention: every policy trains, stops and goes on as if it had never stopped."""

import time

import pytest
from training import (
    CRAFT,
    arguments,
    assert_same_run,
    console,
    copied,
    finished,
    image_dataset,
    pretrained,
    resume,
    rows,
    train,
)

POLICIES = ["pi0_fast", "pi0", "pi05", "smolvla", "act", "diffusion"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name of a policy -> a pretrained one; each is made once."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = pretrained(name, tmp_path_factory.mktemp("policies") / name)
        return made[name]

    return folder


@pytest.mark.parametrize("name", POLICIES)
def test_a_resumed_run_is_the_run_that_never_stopped(folders, tmp_path, name):
    policy, whole, stopped = folders(name), tmp_path / "whole", tmp_path / "stopped"
    run = train(name, policy, *arguments(policy, whole), *CRAFT)
    assert [row["step"] for row in rows(whole)] == [1, 2, 3, 4]
    assert rows(whole)[0]["retention_loss"] == pytest.approx(0.0, abs=1e-3)
    assert rows(whole)[-1]["retention_loss"] > 0.0
    assert {"drift_anchors", "drift_heldout"} <= rows(whole)[-1].keys()
    assert len(run.retention.cache) == 8
    copied(whole, stopped, until=2)
    train(name, policy, *resume(stopped, 2))
    assert_same_run(whole, stopped, 4)


def killed_after(process, checkpoint):
    """Kills a run some steps after it has written a checkpoint, in whatever it is doing then."""
    while process.poll() is None and not (checkpoint.parent / "last").exists():
        time.sleep(0.05)
    time.sleep(0.3)
    assert process.poll() is None, process.communicate()[0][-3000:]
    process.kill()
    process.communicate()


@pytest.mark.parametrize(("name", "kind"), [("pi0_fast", "video"), ("act", "image")])
def test_the_console_script_killed_and_resumed(folders, tmp_path, name, kind):
    policy, whole, killed = folders(name), tmp_path / "whole", tmp_path / "killed"
    data = [] if kind == "video" else [f"--dataset.root={image_dataset(tmp_path / 'pictures')}"]
    settings = [*CRAFT, *data, "--save_freq=8"]
    train(name, policy, *arguments(policy, whole, *settings, steps=40))
    killed_after(console(*arguments(policy, killed, *settings, steps=40)), killed / "checkpoints" / "000008")
    last = int((killed / "checkpoints" / "last").readlink().name)
    assert last < 40
    finished(console(*resume(killed, last)))
    assert_same_run(whole, killed, 40)


@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP"])
def test_two_processes(tmp_path, fsdp):
    """accelerate launch: one model, each process with anchors of its own; stopped and resumed."""
    # lerobot gives all processes the first one's random numbers when it resumes
    policy = pretrained("act", tmp_path / "act", use_vae=False, dropout=0.0)
    whole = tmp_path / "whole"
    output = finished(console(*arguments(policy, whole), *CRAFT, processes=2, fsdp=fsdp))
    assert output.count("craft: 8 anchors") == 1, "one process speaks"
    assert ("FullyShardedDataParallel" in output) == fsdp
    stopped = copied(whole, tmp_path / "stopped", until=2)
    finished(console(*resume(stopped, 2), processes=2, fsdp=fsdp))
    assert_same_run(whole, stopped, 4)
    first = rows(whole)[0]
    assert first["retention_loss"] == pytest.approx(0.0, abs=1e-4)
    assert first["retention_grad_norm"] == pytest.approx(0.0, abs=1), first
