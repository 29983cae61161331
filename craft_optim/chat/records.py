"""Records: chats, prompts with completions, and texts, from files, folders and the hub, read by `datasets`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from craft_optim._numbers import whole
from craft_optim._paths import expanded, require_found
from craft_optim.anchors.sampling import spread

__all__ = ["FORMS", "read_records", "require_form"]

# Keys of a record, by their use
FORMS = (("messages",), ("prompt", "completion"), ("prompt",), ("text",))
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text"}


def read_records(source: str | Path | Sequence[Mapping[str, Any]], count: int | None = None) -> list[dict[str, Any]]:
    """Records of a file, a folder or the hub, in their order.

    A record has `messages`, a list of {"role": ..., "content": ...}; or `prompt` and optionally `completion`, both
    texts or both lists of messages; or `text`. Other columns are left out, except `tools` of messages, and `category`,
    a text or a number: drift is also reported per category.

    Args:
        source: A .jsonl, .json or .parquet file; a .txt or .md file, each paragraph a text; a folder of such files, or
            one that `datasets.save_to_disk` wrote; the id of a dataset on the hub, for its split "train", or
            "ID:SPLIT"; or the records themselves.
        count: Largest number of records, evenly spaced. None: all.

    Raises:
        ImportError: datasets, which reads all but texts, is not installed.
        ValueError: The file does not exist or cannot be read, or a record has none of these forms.
    """
    count = None if count is None else whole("count", count)
    rows: Any = source if not isinstance(source, str | Path) else _opened(expanded(str(source)))
    if not len(rows):
        raise ValueError(f"`data` must hold at least one record. Found none in {_name(source)}.")
    places = spread(len(rows), len(rows) if count is None else count)
    names = getattr(getattr(rows, "features", {}).get("category"), "names", None)  # of a datasets.ClassLabel
    found = []
    for place in places:
        record, name = rows[place], f"Record {place} of {_name(source)}"
        if names and isinstance(number := record.get("category"), int):
            record = {**record, "category": names[number] if number >= 0 else None}  # -1 stands for none
        found.append(require_form(record, name))
    return found


def require_form(record: Any, name: str) -> dict[str, Any]:
    """The entries of a record that make it a chat, a prompt or a text.

    Raises:
        ValueError: The record is none of these.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{name} must be a mapping. Found {type(record).__name__}.")
    for form in FORMS:
        found = {key: record.get(key) for key in form}
        if all(found.values()) and all(isinstance(x, str | list | tuple) for x in found.values()):
            more = _category(record, name)
            if form == ("messages",) and not isinstance(found["messages"], str):
                return found | more | ({"tools": record["tools"]} if record.get("tools") else {})
            if form != ("messages",) and (form != ("text",) or isinstance(found["text"], str)):
                return found | more
    raise ValueError(
        f"{name} must have `messages`, a list of roles and contents, `prompt` and `completion`, or `text`, none of "
        f"them empty. Found {', '.join(map(str, record)) or 'nothing'}: rename its columns."
    )


def _category(record: Mapping[str, Any], name: str) -> dict[str, str]:
    """The record's category as a text; nothing if it has none."""
    found = record.get("category")
    if found is None:
        return {}
    if not isinstance(found, str | int | float):
        raise ValueError(f"{name}: `category` must be a text or a number. Found {found!r:.80}: rename the column.")
    return {"category": str(found)}


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "`data`"


def _opened(source: str) -> Any:
    require_found(source, f"a file ({', '.join(_READERS)}), a folder, or the id of a dataset on the hub", _READERS)
    path = Path(source)
    kind = _READERS.get(path.suffix.lower())
    if path.is_file() and kind is None:
        raise ValueError(f"`data` must be one of {', '.join(_READERS)}. Found {source}.")
    if path.is_file() and kind == "text":
        return [{"text": text} for text in _paragraphs(path)]
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source} is read by datasets ({error}): pip install datasets.") from error
    if path.is_file():
        return _read(source, lambda: datasets.load_dataset(kind, data_files=source, split="train"))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _split(_read(source, lambda: datasets.load_from_disk(source)), None, source)
    name, _, split = source.partition(":") if not path.is_dir() else (source, "", "")
    return _split(_read(source, lambda: datasets.load_dataset(name)), split or None, source)


def _read(source: str, read: Any) -> Any:
    try:
        return read()
    except Exception as error:  # each format has its own kinds
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ValueError(f"{source} cannot be read as records: {type(error).__name__}: {reason}") from error


def _split(found: Any, split: str | None, source: str) -> Any:
    if not isinstance(found, dict):
        return found
    name = split or ("train" if "train" in found else next(iter(found)))
    if name not in found:
        raise ValueError(f"{source} has the splits {', '.join(found)}. Found {name!r}.")
    return found[name]


def _paragraphs(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    blocks = (block.strip() for block in text.replace("\r\n", "\n").split("\n\n"))
    return [block for block in blocks if block]
