"""The command line, in this process; and as a program, alone and under torchrun."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from craft_optim import CraftOptimizer, __version__, anchors
from craft_optim.anchors import AnchorCache
from craft_optim.cli import _parser, main

ROOT = Path(__file__).parents[1]

SCRIPT = """
from collections import OrderedDict
import torch
from torch import nn
from craft_optim.anchors import Reading
from helper import SIZE

calls = []

def model(scale=1.0):
    torch.manual_seed(0)
    made = nn.Sequential(OrderedDict(body=nn.Linear(6, SIZE), bend=nn.Tanh(), head=nn.Linear(SIZE, 4)))
    with torch.no_grad():
        made.body.weight.mul_(scale)
    return made

def run(model, batch):
    calls.append(len(batch["x"]))
    return model(batch["x"])

def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        yield {"x": torch.randn(5, 6, generator=generator), "picture": torch.rand(5, 3, 8, 8, generator=generator)}

def anchors():
    return model(), batches(), {"reading": Reading(run, class_dim=-1), "model_id": "of the script", "shard_size": 7}

def moved():
    return model(4.0), batches(), {"reading": Reading(run, class_dim=-1)}

def plain():
    return model(), [torch.ones(3, 6), torch.zeros(3, 6)], {"class_dim": -1}

def by_fields():
    return model(), batches(), {"forward": run, "class_dim": -1}

def broken():
    raise RuntimeError("of the user's own")

def wrong():
    return model()

def no_dict():
    return model(), [], "settings"

calm = 3
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A script with functions for --factory; what it imports lies beside it, not in the working directory."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "helper.py").write_text("SIZE = 16")
    (tmp_path / "scripts" / "mine.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    return "scripts/mine.py"


@pytest.fixture
def built(script):
    assert main(["build-anchors", "a", f"--factory={script}:anchors"]) == 0
    return AnchorCache.open("a")


def contents(path):
    return {file.name: file.read_bytes() for file in Path(path).iterdir()}


def test_the_factory_says_what_is_built(built):
    assert len(built) == 40
    assert built.model_id == "of the script"
    assert built.features.forward == "run"
    assert built.settings["shard_size"] == 7


def test_options_replace_the_factorys_settings(script):
    options = ["--top-k=2", "--layers", "body", "bend", "--dtype=float32", "--shard-size=9", "--autocast=bfloat16"]
    assert main(["build-anchors", "a", f"--factory={script}:anchors", *options]) == 0
    cache = AnchorCache.open("a")
    found = cache.features
    assert (found.top_k, found.layers, found.dtype, found.autocast) == (2, ("body", "bend"), "float32", "bfloat16")
    assert cache.settings["shard_size"] == 9


def test_fields_of_a_reading_among_the_settings_read_the_cache_too(script, capsys):
    assert main(["build-anchors", "a", f"--factory={script}:by_fields"]) == 0
    assert "AnchorCache.open('a', reading)" in capsys.readouterr().out
    assert main(["inspect", "a", f"--factory={script}:by_fields"]) == 0
    assert "The cache fits this model" in capsys.readouterr().out


def test_a_module_as_factory(script, monkeypatch):
    monkeypatch.chdir("scripts")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert main(["build-anchors", "../a", "--factory=mine:plain", "--device=cpu"]) == 0
    assert len(AnchorCache.open("../a")) == 6


def test_it_prints_what_it_built_and_code_that_works(script, capsys):
    assert main(["build-anchors", "a", f"--factory={script}:anchors"]) == 0
    said = capsys.readouterr().out
    cache = AnchorCache.open("a")
    assert re.search(r"Anchors +40\n", said)
    assert cache.features.describe() in said
    module = sys.modules["craft_optim_factory"]
    model = module.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = {
        "model": model,
        "reading": anchors.Reading(module.run),
        "CraftOptimizer": CraftOptimizer,
        "optimizer": optimizer,
    }
    exec(said.split("Next:")[1].replace("\n  ", "\n").replace("...", "0.1"), names)
    assert isinstance(names["retention"], anchors.LogitRetention)
    assert abs(float(names["retention"]().detach())) < 1e-5
    assert isinstance(names["optimizer"], CraftOptimizer)


def test_what_it_built_as_json(script, capsys, tmp_path):
    assert main(["build-anchors", "told", f"--factory={script}:anchors", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    cache = AnchorCache.open("told")
    assert (told["cache"], told["anchors"]) == ("told", len(cache))
    assert {row["name"] for row in told["tensors"]} == {name for name, _, _ in cache.tensors()}
    assert main(["build-anchors", "told", f"--factory={script}:anchors", "--json=told.json"]) == 0
    assert "JSON: told.json" in capsys.readouterr().out
    assert json.loads(Path("told.json").read_text()) == told
    with pytest.raises(SystemExit):
        main(["build-anchors", "other", f"--factory={script}:anchors", "--json=nowhere/told.json"])
    assert "there is no folder nowhere" in capsys.readouterr().err
    assert not Path("other").exists()


def test_a_finished_cache_is_left_alone_unless_told_otherwise(built, script, capsys):
    before = contents("a")
    build = ["build-anchors", "a", f"--factory={script}:anchors"]
    capsys.readouterr()
    assert main(build) == 0
    assert not sys.modules["craft_optim_factory"].calls
    assert "a was finished already" in capsys.readouterr().out
    assert main([*build, "--overwrite"]) == 0
    assert sum(sys.modules["craft_optim_factory"].calls) == 40
    assert contents("a") == before
    assert "Built a" in capsys.readouterr().out


def test_no_resume_starts_a_half_built_cache_over(script, monkeypatch):
    build = ["build-anchors", "a", f"--factory={script}:stopped"]
    text = "\ndef stopped():\n    made, rows, settings = anchors()\n    return made, stop(rows), settings\n"
    text += "\ndef stop(rows):\n    for i, row in enumerate(rows):\n        if i == 6 and STOP:\n"
    text += "            raise KeyboardInterrupt\n        yield row\n"
    Path(script).write_text(SCRIPT + "STOP = True" + text)
    assert main(build) == 130
    Path(script).write_text(SCRIPT + "STOP = False" + text)
    assert main([*build, "--no-resume"]) == 0
    assert sum(sys.modules["craft_optim_factory"].calls) == 40


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ([], "--model.path for a language model, or --factory"),
        (["--factory={script}:anchors", "--policy.path=p"], "pass one"),
        (["--factory={script}"], "script.py:function"),
        (["--factory=scripts/none.py:anchors"], "there is no file 'scripts/none.py'"),
        (["--factory=no.such.module:anchors"], "path/to/it.py"),
        (["--factory={script}:none"], "there is no function 'none'"),
        (["--factory={script}:calm"], "there is no function 'calm'"),
        (["--factory={script}:wrong"], "must return (model, batches)"),
        (["--factory={script}:no_dict"], "settings must be a dict. Found str"),
        (["--factory={script}:anchors", "--count=3"], "--count goes with --policy.path"),
        (["--factory={script}:anchors", "--keep=prefix"], "--keep goes with --policy.path"),
        (["--factory={script}:anchors", "--top-k=0"], "must be a whole number >= 1, auto or all. Found '0'"),
        (["--factory={script}:anchors", "--dtype=int8"], "float16"),
        (["--policy.path=p"], "pass --dataset.repo_id or --dataset.root"),
        (["--policy.path=p", "--dataset.root=scripts"], "no meta/info.json"),
        (["--policy.path=p", "--dataset.repo_id=d", "--tokens=3"], "--tokens goes with --factory"),
        (["--policy.path=p", "--dataset.repo_id=d", "--layers", "3"], "--keep=prefix"),
        (["--policy.path=p", "--dataset.repo_id=d", "--keep=actions", "--top-k=3"], "--keep=logits"),
        (["--policy.path=p", "--dataset.repo_id=d", "--prompts=none.txt"], "there is no file 'none.txt'"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(script, capsys, arguments, remedy):
    with pytest.raises(SystemExit) as stopped:
        main(["build-anchors", "a", *(x.format(script=script) for x in arguments)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert remedy in said
    assert said.count("\n") == 1
    assert not Path("a").exists()


def test_errors_are_told_without_a_traceback(built, script, capsys):
    capsys.readouterr()
    for arguments in (
        ["build-anchors", "a", f"--factory={script}:anchors", "--dtype=float32"],
        ["build-anchors", "b", f"--factory={script}:anchors", "--layers", "none"],
        ["inspect", "nowhere"],
        ["convert", "scripts", "b"],
    ):
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"craft-optim {arguments[0]}: ")
        assert "Traceback" not in said
        with pytest.raises(ValueError):
            main([*arguments, "--debug"])


def test_errors_of_the_users_code_keep_their_traceback(script):
    with pytest.raises(RuntimeError, match="of the user's own"):
        main(["build-anchors", "a", f"--factory={script}:broken"])
    Path(script).write_text("import nothing_of_that_name")
    assert main(["build-anchors", "a", f"--factory={script}:anchors"]) == 1


def test_hyphens_and_underscores_are_the_same_in_the_names_of_options(script):
    given = ["--top_k=2", "--shard_size", "9", "--no_resume", f"--factory={script}:anchors", "--dtype=float32"]
    assert main(["build-anchors", "a_b", *given]) == 0
    cache = AnchorCache.open("a_b")
    assert (cache.features.top_k, cache.settings["shard_size"]) == (2, 9)
    with pytest.raises(SystemExit):
        main(["build-anchors", "a_b", "--factory=x_y.py:z", "--top_k_=2"])


def test_every_option_is_known_under_both_names():
    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    for command in commands.choices.values():
        special = {"eval-mcq": [__file__, "--model=x"], "convert": ["x", "y"], "demo": ["vision"]}
        given = special.get(command.prog.split()[-1], ["x"])
        for action in command._actions:
            action.type = None
            for name in action.option_strings:
                value = [] if action.nargs == 0 else [(action.choices or ["1"])[0]]
                for other in (name, f"--{name[2:].replace('_', '-')}", f"--{name[2:].replace('-', '_')}"):
                    if name.startswith("--") and name != "--help":
                        _, rest = command.parse_known_args([*given, other, *value])
                        assert other not in rest, (command.prog, other)


def test_unforeseen_errors_are_one_line_too(built, monkeypatch, capsys):
    """Those of a function of the user's keep their traceback, see below."""

    def broken(*_):
        raise KeyError("videos/top/chunk_index")

    monkeypatch.setattr("craft_optim.cli.work.inspect.as_json", broken)
    capsys.readouterr()
    assert main(["inspect", "a"]) == 1
    assert capsys.readouterr().err == (
        "craft-optim inspect: KeyError: 'videos/top/chunk_index' (--debug shows where)\n"
    )
    with pytest.raises(KeyError):
        main(["inspect", "a", "--debug"])


def test_inspect_and_its_checksums(built, capsys):
    capsys.readouterr()
    assert main(["inspect", "a"]) == 0
    said = capsys.readouterr().out
    for words in (
        "40 in 6 shards",
        "of the script · Sequential",
        "forward=run",
        "inputs.picture     3 x 8 x 8  float32",
    ):
        assert words in said, words
    assert main(["inspect", "a", "--verify"]) == 0
    assert "all 40 anchors are as they were written" in capsys.readouterr().out
    shard = built.path / "shard-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert main(["inspect", "a"]) == 0
    assert main(["inspect", "a", "--verify"]) == 1
    assert shard.name in capsys.readouterr().err


def test_on_a_terminal_names_are_shown_as_they_are(script, capsys, monkeypatch):
    Path(script).write_text(SCRIPT.replace("of the script", "[bold]mine[/] [/red]"))
    assert main(["build-anchors", "a", f"--factory={script}:anchors"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["inspect", "a"]) == 0
    assert "[bold]mine[/] [/red] · Sequential" in capsys.readouterr().out


def test_inspect_tells_a_changed_model_from_the_teacher(built, script, capsys):
    pytest.importorskip("PIL", reason="pip install 'craft-optim[report]'")
    page = Path("page.html")
    drifts = {}
    for name in ("anchors", "moved"):
        capsys.readouterr()
        assert main(["inspect", "a", f"--factory={script}:{name}", "--count=6", f"--html={page}"]) == 0
        said = capsys.readouterr().out
        assert "Drift on 40 of 40 anchors" in said
        assert ("The cache fits this model" in said) == (name == "anchors")
        assert page.read_text().count("<img ") == 6
        assert ("The cache fits this model" in page.read_text()) == (name == "anchors")
        drifts[name] = float(re.search(r"logits +(\S+) nats", said)[1])
    assert drifts["anchors"] < 1e-4 < 1e-2 < drifts["moved"]


def test_the_page_without_a_model(built):
    pytest.importorskip("PIL", reason="pip install 'craft-optim[report]'")
    assert main(["inspect", "a", "--count=3", "--html=page.html"]) == 0
    assert "Drift of the model" not in Path("page.html").read_text()
    assert re.findall(r"<h3>Anchor (\d+)", Path("page.html").read_text()) == ["6", "20", "33"]


def test_convert(tmp_path, capsys):
    old = tmp_path / "old"
    old.mkdir()
    shard = {
        "pixel_values": torch.rand(3, 3, 8, 8) * 2.0 - 1.0,
        "input_ids": torch.randint(3, 60, (3, 6)),
        "attention_mask": torch.ones(3, 6, dtype=torch.int64),
        "teacher_hidden": torch.randn(3, 2, 2, 5),
        "meta": {"layers_to_save": [14, 15], "pooling_strategy": {"vision": "mean", "text": "last"}},
    }
    torch.save(shard, old / "shard_0000.pt")
    about = {"num_shards": 1, "num_anchors": 3, "layers_to_save": [-3, -2], "cache_type": "hidden_state_anchoring"}
    (old / "metadata.json").write_text(json.dumps(about))
    new = tmp_path / "new"
    assert main(["convert", str(old), str(new), "--layers", "-3", "-2"]) == 0
    assert AnchorCache.open(new).features.layers == (-3, -2)
    said = capsys.readouterr().out
    assert re.search(r"Anchors +3 in 1 shard\n", said)
    assert f"craft-optim inspect {new} --html=anchors.html" in said
    assert main(["convert", str(old), str(new), "--layers", "-3", "-2", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["anchors"] == 3


def test_version_and_help(capsys):
    for arguments, words in (
        (["--version"], f"craft-optim {__version__}"),
        (["--help"], "build-anchors"),
        (["build-anchors", "--help"], "--factory=my_script.py:anchors"),
        (["inspect", "--help"], "--html=anchors.html"),
        (["convert", "--help"], "craft-optim convert old_cache/ anchors/"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
        assert words in capsys.readouterr().out


def program(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = subprocess.Popen([sys.executable, "-m", *arguments], env=environment, **streams)
    try:
        output, errors = started.communicate()
    finally:
        started.terminate()  # not kill: torchrun ends its processes
    return subprocess.CompletedProcess(arguments, started.returncode, output, errors)


COMMANDS = [name for action in _parser()._actions for name in action.choices or () if action.dest == "command"]


@pytest.mark.parametrize("asked", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_no_help_imports_what_takes_seconds(asked):
    code = f"""
import sys
from craft_optim.cli import main
try:
    main({asked})
except SystemExit:
    print("torch" in sys.modules, "numpy" in sys.modules, "lerobot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "False False False"


@pytest.mark.skipif(sys.platform == "win32", reason="as bash does it")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("craft-optim dr", ["drift"]),
        ("craft-optim drift --policy.p", ["--policy.path"]),
        ("craft-optim plan --dtype=b", ["bfloat16"]),
        ("craft-optim build-anchors out --prompts=docs/gui", ["docs/guide.md"]),
        (
            "craft-optim train --craft.epsilon_s",
            ["--craft.epsilon_schedule", "--craft.epsilon_start", "--craft.epsilon_steps"],
        ),
    ],
)
def test_a_shell_is_told_what_may_come_next(line, offered):
    """With the variables that argcomplete's bash function sets; what is offered goes to descriptor 8."""
    told = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash"}
    told |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:"}
    asked = f"{sys.executable} -m craft_optim.cli 8>&1 9>&2 1>/dev/null"
    done = subprocess.run(["bash", "-c", asked], env={**os.environ, **told}, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == offered


def test_as_a_program(script):
    done = program("craft_optim.cli", "inspect", "nowhere")
    assert done.returncode == 1
    assert done.stderr.startswith("craft-optim inspect: nowhere")
    assert "Traceback" not in done.stderr


def test_torchrun_builds_what_one_process_builds(built, script):
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "craft_optim.cli"]
    done = program(*launch, "build-anchors", "two", f"--factory={script}:anchors")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Built two") == 1, "one of them speaks"
    assert contents("two") == contents("a")
