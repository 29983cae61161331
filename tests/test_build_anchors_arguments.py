"""Where a policy's anchors come from, on the command line: wrong arguments are told before anything is read."""

from pathlib import Path

import pytest

from craft_optim.cli import main


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("questions.jsonl").write_text("{}")
    Path("prompts.txt").write_text("open the drawer")
    Path("empty").mkdir()


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--dataset.root=d", "--dataset.episodes=0"], "must be the first N as N, a list as [0,3,5]"),
        (["--dataset.root=d", "--dataset.episodes=[1,1]"], "each once; the last ten are -10: as text. Found [1, 1]"),
        (
            ["--dataset.root=d", "--rename-map=a:b"],
            'must be JSON such as {"observation.image": "observation.images.top"}',
        ),
        (["--dataset.root=d", '--rename_map={"a": 1}'], "Found '{\"a\": 1}'"),
        (["--dataset.root=empty"], "there is no meta/info.json in it or below"),
        (["--prompts=prompts.txt"], "pass --dataset.repo_id or --dataset.root, or a .jsonl as --prompts"),
        (
            ["--prompts=questions.jsonl", "--dataset.repo_id=d"],
            "--dataset.repo_id goes with a dataset: questions.jsonl has",
        ),
        (["--prompts=questions.jsonl", "--dataset.root=d"], "--dataset.root goes with a dataset"),
        (["--prompts=questions.jsonl", "--dataset.episodes=3"], "--dataset.episodes goes with a dataset"),
        (["--prompts=questions.jsonl", '--rename-map={"a": "b"}'], "--rename-map goes with a dataset"),
        (["--prompts=questions.jsonl", "--top-k=3"], "--top-k needs a dataset with actions"),
        (["--prompts=none.jsonl"], "there is no file 'none.jsonl'"),
    ],
)
def test_arguments_that_contradict_each_other(arguments, remedy, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["build-anchors", "a", "--policy.path=p", *arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert remedy in said
    assert said.count("\n") == 1
    assert not Path("a").exists()


def test_a_function_chooses_its_own_anchors(capsys):
    for option in ("--dataset.episodes=3", '--rename-map={"a": "b"}', "--prompts=questions.jsonl"):
        with pytest.raises(SystemExit):
            main(["build-anchors", "a", "--factory=x.py:y", option])
        assert f"{option.partition('=')[0]} goes with --policy.path" in capsys.readouterr().err


def test_the_help_shows_where_anchors_may_come_from(capsys):
    with pytest.raises(SystemExit):
        main(["build-anchors", "--help"])
    said = capsys.readouterr().out
    assert "--dataset.root=outputs/eval/recordings" in said
    assert "--prompts=questions.jsonl" in said
