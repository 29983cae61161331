"""Text that ships with Python, character by character: the source of its library, then the pages of its manual."""

import ast
import string
import sysconfig
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from .setting import Examples, Recipe, Setting

__all__ = ["CharacterTransformer", "encode", "language", "windows"]

ALPHABET = string.printable[:95] + "\n"  # without exotic white space; other characters become "?"
CONTEXT = 32
_WIDTH, _HEADS, _BLOCKS = 48, 4, 2
_ANCHORS = 256
_TEST = 512  # windows that scores are measured on
# Modules of different kinds that are one file in every version.
_MODULES = (
    "argparse", "ast", "bdb", "calendar", "cmd", "codecs", "configparser", "contextlib", "csv", "dataclasses",
    "difflib", "doctest", "enum", "fractions", "ftplib", "functools", "gettext", "heapq", "inspect", "locale",
    "mailbox", "optparse", "pdb", "pickle", "pickletools", "platform", "plistlib", "pprint", "random", "shutil",
    "smtplib", "socket", "statistics", "subprocess", "tarfile", "textwrap", "threading", "typing", "uuid", "weakref",
)  # fmt: skip


def encode(text: str) -> Tensor:
    """Characters as places in the alphabet, int64 `[characters]`."""
    places = {character: place for place, character in enumerate(ALPHABET)}
    return torch.tensor([places.get(character, places["?"]) for character in text])


def windows(codes: Tensor) -> Examples:
    """Pieces of `CONTEXT` characters, one after the other; the target of each is the next."""
    count = (len(codes) - 1) // CONTEXT
    inputs, targets = codes[: count * CONTEXT], codes[1 : count * CONTEXT + 1]
    return Examples(inputs.view(count, CONTEXT), targets.view(count, CONTEXT))


def code(source: str) -> str:
    """Python source without comments and docstrings: what is left is far from prose."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[0] = ast.Pass()
    return ast.unparse(tree)


@cache
def _texts() -> tuple[Examples, Examples]:
    """Source and manual."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_path("stdlib"))
    source = "\n\n".join(code((library / f"{module}.py").read_text(encoding="utf-8")) for module in _MODULES)
    return windows(encode(source)), windows(encode("\n".join(topics[name] for name in sorted(topics))))


class CharacterTransformer(nn.Module):
    """A causal transformer, `[n, T]` characters -> `[n, T, characters]` logits, T up to `CONTEXT`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), _WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, _WIDTH))
        self.blocks = nn.Sequential(*(_Block() for _ in range(_BLOCKS)))
        self.norm = nn.LayerNorm(_WIDTH)
        self.output = nn.Linear(_WIDTH, len(ALPHABET))

    def forward(self, characters: Tensor) -> Tensor:
        x = self.embedding(characters) + self.places[: characters.shape[1]]
        logits: Tensor = self.output(self.norm(self.blocks(x)))
        return logits


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.attend, self.project = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.mlp = nn.Sequential(nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attend(self.before_attention(x)).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.project(found.transpose(1, 2).flatten(2))
        mixed: Tensor = x + self.mlp(self.before_mlp(x))
        return mixed


def language(seed: int) -> Setting:
    """The standard library's source first, then the manual's pages."""
    generator = torch.Generator().manual_seed(seed)
    source, manual = (text[torch.randperm(len(text), generator=generator)] for text in _texts())
    return Setting(
        name="language",
        title="Python source, then the manual",
        make_model=CharacterTransformer,
        hidden="blocks.0",
        head=("blocks.1.", "norm.", "output."),
        pretraining=source[_TEST:],
        anchors=source[_TEST : _TEST + _ANCHORS],
        old_test=source[:_TEST],
        task=manual[_TEST:],
        task_test=manual[:_TEST],
        metric="cross_entropy",
        pretrain=Recipe(steps=2000, batch_size=32, lr=3e-3),
        finetune=Recipe(steps=200, batch_size=16, lr=1e-3),
        anchor_batch=16,
    )
