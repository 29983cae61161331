"""Every block of Python in the README and in docs runs, and prints what the page says; programs in shell exist.

A page is one story: its blocks run one after the other, on the small stand-ins below for what the reader has. Where it
is not, each section is one (`SECTIONS`). A block that cannot run says why, in the line before it:
`<!-- not run: reason -->`.
"""

import ast
import copy
import json
import re
import shlex
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from craft_optim import anchors
from craft_optim.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = {"recipes.md"}
CHAT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # as docs/chat.md has it
NOT_RUN: dict[str, int] = {}  # page -> number of blocks that say why they cannot run


class Output(NamedTuple):
    """What a model returns: `.loss` and `.logits`, as those of transformers."""

    loss: torch.Tensor | None
    logits: torch.Tensor


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x, labels=None):
        logits = self.layers(x)
        return Output(None if labels is None else nn.functional.cross_entropy(logits, labels), logits)


def examples(count):
    return [{"x": torch.randn(6), "labels": torch.randint(4, ())} for _ in range(count)]


def batches(count):
    return [{"x": torch.randn(16, 6), "labels": torch.randint(4, (16,))} for _ in range(count)]


def inputs(count):
    return [{"x": batch["x"]} for batch in batches(count)]


def what_everyone_has():
    """A model, its anchors, the new task's batches, and a retention on them."""
    model = Classifier()
    cache = anchors.build(model, inputs(2), "stand-in/", progress=False, class_dim=-1)
    return {
        "torch": torch,
        "craft_optim": __import__("craft_optim"),
        "model": model,
        "anchor_batches": inputs(2),
        "held_out_batches": inputs(1),
        "loader": torch.utils.data.DataLoader(examples(64), batch_size=16),
        "anchors": cache,
        "held_out": anchors.build(model, inputs(1), "stand-in-heldout/", progress=False, class_dim=-1),
        "retention": anchors.LogitRetention(model, cache, batch_size=8),
    }


def language_model():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1)

    def texts(count):
        tokens = torch.randint(16, (count, 5)).tolist()
        return [{"input_ids": x, "attention_mask": [1] * 5, "labels": x} for x in tokens]

    class Tokenizer:
        """What a collator needs of one."""

        padding_side = "right"

        def pad(self, rows, **_):
            return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}

        def save_pretrained(self, folder):
            """The Trainer keeps it with its checkpoints."""

    found = {"base": transformers.LlamaForCausalLM(config), "old_prompts": texts(32), "new_data": texts(16)}
    return found | {"tokenizer": Tokenizer()}


def growing():
    pytest.importorskip("transformers")
    told = language_model()
    prompts = [
        {name: torch.tensor(row[name]) for name in ("input_ids", "attention_mask")} for row in told["old_prompts"]
    ]
    batches = list(torch.utils.data.DataLoader(prompts, batch_size=8))
    return {"model": told["base"], "old_prompts": prompts, "anchor_batches": batches}


def pictures():
    pytest.importorskip("transformers")
    sys.path.insert(0, str(ROOT / "tests" / "integrations"))
    import pictures as made

    return {"model": made.qwen(), "old_examples": made.examples(), "collate": made.collate}


def trainer():
    transformers = pytest.importorskip("transformers")
    args = transformers.TrainingArguments(
        output_dir="out", max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False
    )
    return {"args": args, "dataset": examples(16), "model_init": Classifier}


def chat_model():
    """A tiny chat model, its tokenizer, chats in a file, and what a Trainer needs."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    sys.path.insert(0, str(ROOT / "tests" / "evaluation"))
    import toys

    tokenizer = toys.tokenizer(bos=True)
    tokenizer.chat_template = toys.CHAT
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    turns = [{"role": "user", "content": "is ice hot?"}, {"role": "assistant", "content": "no, it is cold"}]
    for file in ("old_chats.jsonl", "new_chats.jsonl"):
        Path(file).write_text(f"{json.dumps({'messages': turns})}\n" * 16)
    for part in (copy.deepcopy(model).bfloat16(), tokenizer):  # as on the hub
        part.save_pretrained(CHAT_MODEL)
    rows = [{"input_ids": torch.arange(4, 12), "labels": torch.arange(4, 12)} for _ in range(16)]
    return {**trainer(), "model": model, "tokenizer": tokenizer, "new_data": rows}


def more_for(page, section):
    """What a story needs besides."""
    if page.name == "chat.md":
        return chat_model()
    if section == "A language model with LoRA":
        return language_model()
    if section == "Pictures of a vision-language model":
        return pictures()
    if section == "New tokens, new classes":
        return growing()
    if page.name == "works_with.md":
        return trainer()
    return {}


class Block(NamedTuple):
    section: str
    line: int
    code: str
    printed: str  # what the page says that it prints
    reason: str  # why it does not run; empty if it does


MARK = r"(?:<!-- newcomer[^\n]*-->\n)?"  # of tools/newcomer.py


def python_blocks(text):
    fence = rf"(?:^<!-- not run: (?P<reason>.+) -->\n)?{MARK}^```python\n(?P<code>.*?)^```"
    printed = rf"(?:\n+It prints:\n+{MARK}```console\n(?P<printed>.*?)^```)?"
    for found in re.finditer(fence + printed, text, re.DOTALL | re.MULTILINE):
        section = (["", *re.findall(r"^## (.*)", text[: found.start()], re.MULTILINE)])[-1]
        line = text[: found.start("code")].count("\n")
        yield Block(section, line, found["code"], found["printed"] or "", found["reason"] or "")


def stories():
    for page in PAGES:
        found = list(python_blocks(page.read_text(encoding="utf-8")))
        each = dict.fromkeys(block.section for block in found) if page.name in SECTIONS else [None]
        for section in each if found else ():
            parts = [block for block in found if section in (None, block.section)]
            yield pytest.param(page, section or "", parts, id=f"{page.name}-{section or 'all'}")


def numbers(text):
    return [float(x) for x in re.findall(r"-?\d+\.\d+", text)]


def printing_commands(text):
    """Commands of this package, and the lines that the page quotes of what each prints."""
    both = rf"^```bash\n([^`]*)^```\n+{MARK}```console\n(.*?)^```"
    for shell, printed in re.findall(both, text, re.DOTALL | re.MULTILINE):
        words = shlex.split(shell.replace("\\\n", " "))
        assert words[0] == "craft-optim"
        yield words[1:], printed.splitlines()


def same_numbers(output, quoted):
    """Each quoted line is there, from its first word on; its numbers but for rounding."""
    lines = {line.split()[0]: line for line in output.splitlines() if line.strip()}
    for line in quoted:
        found = lines[line.split()[0]]
        assert numbers(found)[:3] == pytest.approx(numbers(line)[:3], rel=0.1, abs=0.03), (found, line)


@pytest.mark.parametrize(("page", "section", "parts"), list(stories()))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_python_runs(page, section, parts, tmp_path, monkeypatch, capsys):
    for block in parts:
        for node in ast.walk(ast.parse(block.code)):
            for name in [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]:
                if name and not name.startswith("craft_optim") and not block.reason:
                    pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "story", **what_everyone_has(), **more_for(page, section)}
    capsys.readouterr()
    for block in parts:
        if block.reason:
            continue
        # Lines are those of the page, so that a traceback points there.
        exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        printed = capsys.readouterr().out
        if block.printed:
            assert re.sub(r"-?\d+\.\d+", "#", printed) == re.sub(r"-?\d+\.\d+", "#", block.printed)
            # Rounding differs from machine to machine.
            assert numbers(printed) == pytest.approx(numbers(block.printed), rel=0.1, abs=0.03)
    if page.name == "vision.md":
        Path("tuned.py").write_text(next(block.code for block in parts if "def craft():" in block.code))
        for words, printed in printing_commands(page.read_text(encoding="utf-8")):
            assert main(words) == 0
            same_numbers(capsys.readouterr().out, printed)
    if page.name == "chat.md":
        before, after = (load_file(Path(folder) / "model.safetensors") for folder in (CHAT_MODEL, "out"))
        moved = sum(int((after[name] != x).sum()) for name, x in before.items())
        assert moved > 0.9 * sum(map(torch.numel, before.values())), "in bfloat16 hardly any weight moves"


def test_blocks_that_do_not_run_are_known():
    reasons = {p.name: [b for b in python_blocks(p.read_text(encoding="utf-8")) if b.reason] for p in PAGES}
    assert {name: len(found) for name, found in reasons.items() if found} == NOT_RUN


def test_the_page_says_what_the_classifier_prints():
    """The comparison above is of something."""
    text = (ROOT / "docs" / "vision.md").read_text(encoding="utf-8")
    assert [len(numbers(b.printed)) for b in python_blocks(text) if b.printed] == [2, 0, 6]
    assert [words[0] for words, _ in printing_commands(text)] == ["report", "drift"]


def test_a_reason_and_a_print_are_found():
    text = "## A\n<!-- not run: needs a robot -->\n```python\na\n```\n## B\n```python\nb\n```\n"
    text += "\nIt prints:\n\n```console\n1.5\n```\n"
    assert [(b.section, b.line, b.code, b.printed, b.reason) for b in python_blocks(text)] == [
        ("A", 3, "a\n", "", "needs a robot"),
        ("B", 7, "b\n", "1.5\n", ""),
    ]


# Programs in blocks of shell, and in the text


def shell_lines(text):
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from block.replace("\\\n", " ").splitlines()
    code = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    yield from (x for x in code if re.match(r"(python|torchrun|make|accelerate) ", x))


def shell_commands(text):
    for line in shell_lines(text):
        words = shlex.split(line, comments=True)
        commands = [[]]
        for word in words:
            commands.append([]) if word == "&&" else commands[-1].append(word)
        yield from filter(None, commands)


def each_command(of):
    found = {(page.name, *words) for page in PAGES for words in shell_commands(page.read_text("utf-8")) if of(words)}
    return [pytest.param(page, words, id=f"{page}: {' '.join(words)}"[:80]) for page, *words in sorted(found)]


def is_script(words):
    return any(word.endswith(".py") and not word.startswith("/") for word in words) and words[0] != "craft-optim"


def imported_by(script):
    """Modules beside it: some declare its options."""
    for node in ast.walk(ast.parse(script.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            file = script.parent.joinpath(*node.module.split(".")).with_suffix(".py")
            if file.exists():
                yield file


@pytest.mark.parametrize(("page", "words"), each_command(is_script))
def test_scripts_exist_and_know_their_options(page, words):
    (at,) = [i for i, word in enumerate(words) if word.endswith(".py")]
    script = ROOT / words[at]
    assert script.is_file()
    source = "".join(x.read_text("utf-8") for x in [script, *imported_by(script)])
    options = [word.partition("=")[0] for word in words[at + 1 :] if word.startswith("--")]
    assert not [option for option in options if f'"{option}"' not in source]


@pytest.mark.parametrize(("page", "words"), each_command(lambda words: words[0] == "make"))
def test_targets_exist(page, words):
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in [word for word in words[1:] if "=" not in word]:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
    for variable in [word.partition("=")[0] for word in words[1:] if "=" in word]:
        assert f"$({variable})" in makefile, variable


@pytest.mark.parametrize(("page", "words"), each_command(lambda words: words[:2] == ["pip", "install"]))
def test_extras_and_groups_exist(page, words):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(known["project"]["optional-dependencies"]), extras
    assert {group for option, group in pairwise(words) if option == "--group"} <= set(known["dependency-groups"])
