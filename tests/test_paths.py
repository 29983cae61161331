"""`~` is a home wherever a path is taken; shells leave it as it is after `=` and in quotes."""

import ast
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import craft_optim
from craft_optim._paths import expanded, local, require_found
from craft_optim.anchors import AnchorCache, build, convert
from craft_optim.anchors.importers import write_cache
from craft_optim.anchors.manifest import FeatureSpec
from craft_optim.chat import chat_anchors, load_language_model, read_records
from craft_optim.cli import main
from craft_optim.evaluation.questions import read_questions
from craft_optim.evaluation.scorers import load_scorer, require_checkpoint
from craft_optim.metrics import JSONLWriter
from craft_optim.report import read_runs

ROOT = Path(craft_optim.__file__).parent


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The home; the working directory is another, in which no folder `~` may be made."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert list((tmp_path / "here").iterdir()) == []


def model():
    torch.manual_seed(0)
    return nn.Linear(6, 3)


def points():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def test_what_is_a_home_and_what_is_not(home):
    assert expanded("~") == str(home)
    assert local(Path("~/x")) == home / "x"
    for path in ("a~", "a/~", "~nobody-of-this-name/x", "you/policy", ".", "", "/~/x"):
        assert expanded(path) == path


def no_home(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])


@pytest.mark.parametrize("take", [expanded, local, AnchorCache.open, JSONLWriter, read_questions])
@pytest.mark.parametrize("path", ["~", "~/x"])
def test_a_user_without_a_home_is_told_so(take, path, monkeypatch):
    no_home(monkeypatch)
    with pytest.raises(ValueError, match=r"this user has none\. Found '~.*set HOME"):
        take(path)
    assert expanded("x") == "x"


def test_a_command_of_a_user_without_a_home(monkeypatch, capsys):
    no_home(monkeypatch)
    with pytest.raises(SystemExit, match="2"):
        main(["report", "runs", "--out=~/run.html"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "this user has none" in line


def of_build(home):
    cache = build(model(), [points()], "~/made/anchors", progress=False, class_dim=-1)
    assert cache.path == home / "made" / "anchors"
    assert (home / "made" / "anchors" / "cache.json").is_file()
    assert len(build(model(), [points()], Path("~/made/anchors"), progress=False, class_dim=-1)) == 8


def of_cache(home):
    build(model(), [points()], home / "anchors", progress=False, class_dim=-1)
    assert len(AnchorCache.open("~/anchors")) == len(AnchorCache("~/anchors")) == 8


def of_convert(home):
    (home / "old").mkdir()
    anchor = {"hidden_states": {}, "metadata": {}}
    torch.save(anchor, home / "old" / "a.pt")
    with pytest.raises(ValueError, match=f"^{home}/old"):
        convert("~/old", "~/new")


def of_write_cache(home):
    batches = [({"x": points()}, {"labels": torch.ones(8, 2, dtype=torch.int64)})]
    assert write_cache("~/anchors", batches, FeatureSpec()).path == home / "anchors"


def of_writer(home):
    JSONLWriter("~/run.jsonl")({"retention_step": 0.0, "retention_loss": 1.0})
    assert len((home / "run.jsonl").read_text().splitlines()) == 1


def of_runs(home):
    of_writer(home)
    assert [run.name for run in read_runs(["~/run.jsonl", "other=~/run.jsonl"])] == ["run"]


def of_questions(home):
    row = {"question": "Which?", "choices": ["a", "b"], "answer_index": 0, "image_path": "~/pictures/a.png"}
    (home / "questions.jsonl").write_text(json.dumps(row))
    assert read_questions("~/questions.jsonl")[0].image == home / "pictures" / "a.png"


def of_scorers(home):
    pytest.importorskip("huggingface_hub")
    (home / "policy").mkdir()
    (home / "policy" / "config.json").write_text('{"type": "act"}')
    for load in (require_checkpoint, load_scorer):
        with pytest.raises(ValueError, match=f"^{home}/policy must be a pi0_fast"):
            load("~/policy")


def of_plots(home):
    pytest.importorskip("matplotlib")
    from craft_optim.evaluation.checkpoints import Checkpoint
    from craft_optim.evaluation.drift import drifts
    from craft_optim.evaluation.plots import draw_checkpoints

    of_build(home)
    measured = drifts(model(), AnchorCache.open("~/made/anchors"))
    draw_checkpoints([Checkpoint("p", "p", measured)], {}, "~/one.png")
    assert (home / "one.png").is_file()


def of_pictures(home):
    pytest.importorskip("matplotlib")
    from craft_optim.report.pictures import draw

    of_writer(home)
    draw(read_runs(["~/run.jsonl"]), Path("~/pictures"))
    assert list((home / "pictures").glob("*.png"))


def of_configs(home):
    pytest.importorskip("transformers")
    from craft_optim.planning.from_transformers import model_without_weights

    (home / "model").mkdir()
    (home / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=f"{home}/model has none"):
        model_without_weights("~/model")


def of_records(home):
    (home / "a.txt").write_text("one")
    assert read_records("~/a.txt") == [{"text": "one"}]


def of_language_models(home):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, **sizes)).save_pretrained(home / "model")
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")), unk_token="a")
    made.save_pretrained(home / "model")
    language_model, tokenizer = load_language_model("~/model")
    chat_anchors(language_model, tokenizer, [{"text": "a a"}], "~/anchors", progress=False)
    assert len(AnchorCache.open(home / "anchors")) == 1


# Every function that is given a path by a user -> what shows that it knows homes
TAKES = {
    "anchors.build.build": of_build,
    "anchors.cache.AnchorCache.__init__": of_cache,
    "anchors.cache.AnchorCache.open": of_cache,
    "anchors.importers.convert": of_convert,
    "anchors.importers.write_cache": of_write_cache,
    "chat.anchors.chat_anchors": of_language_models,
    "chat.models.load_language_model": of_language_models,
    "chat.records.read_records": of_records,
    "evaluation.plots.draw_checkpoints": of_plots,
    "evaluation.questions.read_questions": of_questions,
    "evaluation.scorers.load_scorer": of_scorers,
    "evaluation.scorers.require_checkpoint": of_scorers,
    "metrics.JSONLWriter.__init__": of_writer,
    "planning.from_transformers.model_without_weights": of_configs,
    "report.pictures.draw": of_pictures,
    "report.runs.read_runs": of_runs,
}
# In lerobot/test_homes.py
OF_LEROBOT = {
    "lerobot.adapters.Adapter.build",
    "lerobot.frames.open_frames",
    "lerobot.frames_file.FramesFile.__init__",
    "lerobot.opening.dataset_folders",
    "lerobot.opening.open_dataset",
    "lerobot.pretrained.load_config",
    "lerobot.pretrained.load_policy",
    "lerobot.pretrained.load_preprocessor",
}
WITHIN = {  # given paths by those above
    "adapter_checkpoints.base_of_adapters",
    "adapter_checkpoints.with_adapters",
    "cli.work.sources.load_policy",
    "cli.work.sources.load_text_model",
    "demo.small_chat.chat_model",
    "evaluation.checkpoints.short_names",
    "lerobot.frames.require_count",
}


@pytest.mark.parametrize("name", TAKES)
def test_functions_know_homes(name, home):
    TAKES[name](home)


def functions(tree, prefix):
    """Names of the functions of a module that are not its own, and their parameters."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node, f"{prefix}.{node.name}")
        public = isinstance(node, ast.FunctionDef) and (node.name == "__init__" or not node.name.startswith("_"))
        if public:
            yield f"{prefix}.{node.name}", [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def test_no_function_that_takes_a_path_is_forgotten():
    """One that takes text or a path says so; one that takes text alone calls it a path."""
    found = set()
    for file in ROOT.rglob("*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if any(part.startswith("_") and part != "__init__" for part in module.split(".")):
            continue
        for name, parameters in functions(ast.parse(file.read_text("utf-8")), module):
            for parameter in parameters:
                kind = "" if parameter.annotation is None else ast.unparse(parameter.annotation)
                if "PathLike" in kind or "str | Path" in kind or (parameter.arg.startswith("path") and "str" in kind):
                    found.add(name)
    assert found - WITHIN - OF_LEROBOT - {*TAKES} == set(), "add it to the table above"
    assert len(found) >= 20


SCRIPT = """
import torch
from torch import nn

def model(scale=1.0):
    torch.manual_seed(0)
    made = nn.Linear(6, 3)
    with torch.no_grad():
        made.weight.mul_(scale)
    return made

def anchors():
    return model(), [torch.randn(8, 6, generator=torch.Generator().manual_seed(0))], {"class_dim": -1}

def moved():
    return model(2.0), []

def scorer():
    from craft_optim.evaluation import ChoiceScore
    return lambda question: [ChoiceScore(-1.0, 1), ChoiceScore(-2.0, 1)]
"""


def test_every_command(home, capsys):
    pytest.importorskip("matplotlib")
    (home / "mine.py").write_text(SCRIPT)
    of_questions(home)
    of_writer(home)
    commands = [
        ["build-anchors", "~/anchors", "--factory=~/mine.py:anchors"],
        ["inspect", "~/anchors", "--html=~/anchors.html"],
        ["drift", "~/anchors", "--factory=~/mine.py:moved", "--json=~/drift.json", "--plot", "~/drift.png"],
        ["eval-mcq", "~/questions.jsonl", "--model=~/mine.py:scorer", "--json=~/mcq.json"],
        ["report", "first=~/run.jsonl", "~/run.jsonl", "--out=~/run.html", "--png=~/png"],
    ]
    for command in commands:
        assert main(command) in (0, None), (command, capsys.readouterr().err)
    made = {"anchors", "anchors.html", "drift.json", "drift.png", "mcq.json", "run.html", "png"}
    assert made <= {file.name for file in home.iterdir()}


def test_every_option_and_operand_of_every_command(home, monkeypatch):
    """Whatever comes to a command has been through the same door."""
    from craft_optim.cli.options import Parser

    given = []

    def keep(self, arguments, *_):
        given.extend(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Parser, "parse_known_args", keep)
    words = ["~/a", "~", "--any=~/a", "--any=~", "NAME=~/a", "x,~/a,~/b", "--policy.path=x,~/a", "a~/b", "--a=b~c"]
    with pytest.raises(KeyboardInterrupt):
        main(["report", *words])
    at = str(home)
    assert given[1:] == [
        f"{at}/a", at, f"--any={at}/a", f"--any={at}", f"NAME={at}/a", f"x,{at}/a,{at}/b", f"--policy.path=x,{at}/a",
        "a~/b", "--a=b~c",
    ]  # fmt: skip
    given.clear()
    with pytest.raises(KeyboardInterrupt):
        main(["train", "--dataset.root=~/a"])
    assert given == ["train", "--dataset.root=~/a"], "these are lerobot's, as they are for lerobot-train"


@pytest.mark.parametrize("name", ["out/", "./out", "a/b/c", "model.gguf", "/nowhere"])
def test_what_can_be_no_hub_id_must_be_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"must be a model. Found nothing there"):
        require_found(name, "a model", (".gguf",))
    for hub in ("gpt2", "you/model"):
        require_found(hub, "a model", (".gguf",))
    (tmp_path / "out").mkdir()
    require_found("out/", "a model")
