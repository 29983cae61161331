"""lerobot-train with retention: every policy trains, stops and goes on as if it had never stopped."""

import shutil
import signal
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
from warm import Python

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


@pytest.fixture(scope="module")
def warm():
    """What lerobot-train imports takes longer than the runs below."""
    policies = [f"lerobot.policies.{name}.modeling_{name}" for name in ("act", "pi0_fast")]
    with Python("lerobot.scripts.lerobot_train", "lerobot.datasets.factory", "craft_optim.anchors", *policies) as warm:
        yield warm


def killed_after(start, out, number):
    """Kills a run some steps after it has written its first checkpoint, in whatever it is doing then."""
    for _ in range(5):  # it may have come to the next one, or to its end, before we look
        process = start()
        while process.poll() is None and not (out / "checkpoints" / "last").exists():
            time.sleep(0.02)
        time.sleep(0.1)
        process.kill()
        output, _ = process.communicate()
        assert (out / "checkpoints" / f"{number:06d}").exists(), output[-3000:]
        if process.returncode == -signal.SIGKILL and (out / "checkpoints" / "last").readlink().name == f"{number:06d}":
            return
        shutil.rmtree(out)
    raise AssertionError("it was never killed between its first checkpoint and its second")


@pytest.mark.parametrize(("name", "kind"), [("pi0_fast", "video"), ("act", "image")])
def test_the_console_script_killed_and_resumed(folders, warm, tmp_path, name, kind):
    policy, whole, killed = folders(name), tmp_path / "whole", tmp_path / "killed"
    data = [] if kind == "video" else [f"--dataset.root={image_dataset(tmp_path / 'pictures')}"]
    settings = [*CRAFT, *data, "--save_freq=8"]
    train(name, policy, *arguments(policy, whole, *settings, steps=40))
    imports = None if kind == "video" else warm  # one of these processes does all of it, the others go on warm
    killed_after(lambda: console(*arguments(policy, killed, *settings, steps=40), warm=imports), killed, 8)
    # Of later checkpoints lerobot 0.6.1 does not take up the order of its frames: a plain run is not the same, either
    finished(console(*resume(killed, 8), warm=warm))
    assert_same_run(whole, killed, 40)


@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP"])
def test_two_processes(warm, tmp_path, fsdp):
    """accelerate launch: one model, each process with anchors of its own; stopped and resumed."""
    # lerobot gives all processes the first one's random numbers when it resumes
    policy = pretrained("act", tmp_path / "act", use_vae=False, dropout=0.0)
    whole = tmp_path / "whole"
    output = finished(console(*arguments(policy, whole), *CRAFT, processes=2, fsdp=fsdp, warm=warm))
    assert output.count("craft: 8 anchors") == 1, "one process speaks"
    assert ("FullyShardedDataParallel" in output) == fsdp
    stopped = copied(whole, tmp_path / "stopped", until=2)
    finished(console(*resume(stopped, 2), processes=2, fsdp=fsdp, warm=warm))
    assert_same_run(whole, stopped, 4)
    first = rows(whole)[0]
    assert first["retention_loss"] == pytest.approx(0.0, abs=1e-4)
    assert first["retention_grad_norm"] == pytest.approx(0.0, abs=1), first
