"""Caches survive: kills at any moment, damage, full disks, many readers, and a hundred thousand anchors.

Run as a script, this file is a server that forks the processes to kill: a fork costs milliseconds, an interpreter with
torch seconds.
"""

import copy
import errno
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from craft_optim.anchors import AnchorCache, AnchorCacheError, LogitRetention, Reading, build
from craft_optim.anchors.manifest import manifest_text

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

Batch = dict[str, Tensor]


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


class Talker(nn.Module):
    """Logits of every token, from pictures and tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.see, self.head = nn.Embedding(30, 8), nn.Linear(48, 8), nn.Linear(8, 12)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, pixels: Tensor, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.embed(tokens) + self.see(pixels.flatten(1)).unsqueeze(1)))
        return out


def conversations(count: int, seed: int = 0) -> list[Batch]:
    """`count` anchors in batches of 4, of lengths 3 to 8, with a picture each."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for number in range(count // 4):
        tokens = torch.randint(1, 30, (4, 3 + number % 6), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1, -2:] = 0
        pixels = torch.randint(0, 256, (4, 3, 4, 4), generator=generator) / 255.0
        batches.append({"pixels": pixels, "tokens": tokens * mask, "attention_mask": mask})
    return batches


def build_conversations(
    path: Path, count: int, pause: float = 0.0, wait_at: int | None = None, **settings: Any
) -> AnchorCache:
    """Everything that a cache can hold of lengths of its own, in shards of 3 anchors.

    With `wait_at` it waits, once there are so many shards, for the file `go`, or to be killed: on a busy machine, long.
    """
    model = Talker()

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        time.sleep(pause)
        while wait_at is not None and complete(path) >= wait_at and not path.with_name("go").exists():
            time.sleep(0.01)
        out: Tensor = model(**batch)
        return out

    return build(
        model, conversations(count), path, Reading(forward, mask="attention_mask", pooling={"all": "none"}),
        layers=("embed",), shard_size=3, progress=False, **settings,
        class_dim=-1,
    )  # fmt: skip


# The processes to kill


def rank_of_several(
    path: str, count: int, pause: float, wait_at: int | None, rank: int, world_size: int, store: str
) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    build_conversations(Path(path), count, pause, wait_at)
    distributed.barrier()


def dies_before_change(path: str, count: int, number: int) -> None:
    """Builds, and dies before it changes the folder for the `number`-th time; what it was writing is half there."""
    changes = 0

    def count_changes(event: str, args: tuple[Any, ...]) -> None:
        nonlocal changes
        if event in ("os.rename", "os.remove") or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)):
            if not str(args[0]).startswith(path):
                return
            changes += 1
            if changes == number:
                if event == "os.rename":
                    os.truncate(args[0], os.path.getsize(args[0]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_changes)
    build_conversations(Path(path), count)


def builds(path: str, count: int, pause: float = 0.0, wait_at: int | None = None) -> None:
    build_conversations(Path(path), count, pause, wait_at)


def builds_without_room(path: str, count: int, limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        build_conversations(Path(path), count)
    except AnchorCacheError as error:
        Path(path).with_name("said").write_text(str(error)[:limit])
        raise


def serve() -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        if name == "wait":
            print(os.waitpid(arguments[0], 0)[1], flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            try:
                globals()[name](*arguments)
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)


class Server:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, *request: Any) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, function: Callable[..., None], *arguments: Any) -> int:
        """The id of a process that runs this function of this file."""
        return self.ask(function.__name__, *arguments)

    def end(self, pid: int, kill: bool = False) -> int:
        """What `os.waitpid` says about it: 0, or the signal that ended it."""
        if kill:
            os.kill(pid, signal.SIGKILL)
        return self.ask("wait", pid)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.process.communicate("")


def complete(path: Path) -> int:
    return len(list(path.glob("shard-*.json")))


def wait_for_shards(path: Path, number: int) -> None:
    while complete(path) < number and not (path / "cache.json").exists():
        time.sleep(0.005)


@pytest.fixture(scope="module")
def in_peace(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, bytes]]:
    """The bytes of a cache of so many anchors that nothing has disturbed."""
    built: dict[int, dict[str, bytes]] = {}

    def of(count: int) -> dict[str, bytes]:
        if count not in built:
            path = tmp_path_factory.mktemp("in_peace")
            assert server.end(server.start(builds, str(path), count)) == 0
            built[count] = contents(path)
        return built[count]

    return of


# Kills


def test_twenty_kills_at_random_moments(
    server: Server, in_peace: Callable[[int], dict[str, bytes]], tmp_path: Path
) -> None:
    path, draw, progress = tmp_path / "c", random.Random(0), [0]
    for _ in range(20):
        pid = server.start(builds, str(path), 480, 0.002, progress[-1] + 7)
        wait_for_shards(path, progress[-1] + draw.randrange(4))
        time.sleep(draw.uniform(0.0, 0.01))
        assert server.end(pid, kill=True) == signal.SIGKILL
        progress.append(complete(path))
    assert progress == sorted(progress), "a resumed build goes on"
    assert len({n for n in progress if 0 < n < 160}) >= 10, progress
    assert server.end(server.start(builds, str(path), 480)) == 0
    assert contents(path) == in_peace(480)


def test_a_kill_before_each_change_of_the_folder(
    server: Server, in_peace: Callable[[int], dict[str, bytes]], tmp_path: Path
) -> None:
    """Between a shard and its record, between the manifest and the cleaning up: every place there is."""
    left: list[frozenset[str]] = []
    for number in range(1, 200):
        path = tmp_path / str(number)
        path.mkdir()
        if server.end(server.start(dies_before_change, str(path), 8, number)) == 0:
            break
        left.append(frozenset(contents(path)))
        finished = "cache.json" in left[-1]
        if not finished:
            with pytest.raises(AnchorCacheError, match="no such file"):
                AnchorCache.open(path)
        assert server.end(server.start(builds, str(path), 8)) == 0
        assert contents(path) == in_peace(8), (number, sorted(left[-1]))
    record, shard = "shard-00001.json", "shard-00001.safetensors"
    assert any(shard in names and not {record, record + ".tmp"} & names for names in left), "killed between the two"
    assert any({"cache.json", record, "build.json"} <= names for names in left), "killed before the cleaning up"
    assert any("cache.json" in names and record not in names for names in left), "killed during it"


@pytest.mark.parametrize("finished", [False, True])
def test_what_kills_leave_behind_is_removed(
    server: Server, in_peace: Callable[[int], dict[str, bytes]], tmp_path: Path, finished: bool
) -> None:
    """Also where the kill was in safetensors' own code, which writes to a file of its own, or of a larger team."""
    path = tmp_path / "c"
    if finished:
        assert server.end(server.start(builds, str(path), 8)) == 0
    else:
        assert server.end(server.start(dies_before_change, str(path), 8, 12)) == signal.SIGKILL
    for name in (".tmpDuKdGQ", "build-1.lock", "rank-1.done", "rank-1.failed", "shard-00009.json.tmp"):
        (path / name).write_bytes(b"half")
    assert server.end(server.start(builds, str(path), 8)) == 0
    assert contents(path) == in_peace(8)


@pytest.mark.parametrize("world_size", [1, 3])
def test_two_processes_killed_together(
    server: Server, in_peace: Callable[[int], dict[str, bytes]], tmp_path: Path, world_size: int
) -> None:
    path, draw, progress = tmp_path / "c", random.Random(world_size), [0]

    def start(processes: int, pause: float, wait_at: int | None = None) -> list[int]:
        store = str(tmp_path / f"store{len(progress)}-{processes}")
        ranks = range(processes)
        return [server.start(rank_of_several, str(path), 120, pause, wait_at, r, processes, store) for r in ranks]

    for _ in range(2):
        pids = start(2, 0.005, progress[-1] + 12)
        wait_for_shards(path, progress[-1] + 4)
        time.sleep(draw.uniform(0.0, 0.01))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert [server.end(pid) for pid in pids] == [signal.SIGKILL] * 2
        progress.append(complete(path))
    assert 0 < progress[1] < progress[2] < 40, progress
    assert [server.end(pid) for pid in start(world_size, 0.0)] == [0] * world_size
    assert contents(path) == in_peace(120)


# Damage


def mutate(draw: random.Random, folder: dict[str, bytes]) -> dict[str, bytes]:
    """The folder with one thing wrong in it."""
    name = draw.choice([*folder, *["cache.json"] * len(folder)])
    data = bytearray(folder[name])
    # Headers and manifests are small: half of the time there
    at = draw.randrange(min(len(data), 400) if draw.random() < 0.5 else len(data))
    length = draw.choice([1, 1, 2, 8, 64])
    number = draw.choice([b"9" * 400, b"1e999", b"-1", b"1" + b"0" * 30, b"NaN", b"0.5", b"9" * 5000, b"null", b"true"])
    numbers = list(re.finditer(rb"(?<=[:\[, ])\d+(?=[,\]\s}])", bytes(data[:2000])))
    match draw.choice(["flip", "noise", "cut", "insert", "delete", "swap", "zero", "duplicate", "number", "nest"]):
        case "flip":
            data[at] ^= 1 << draw.randrange(8)
        case "noise":
            data[at : at + length] = draw.randbytes(length)
        case "cut":
            del data[at:]
        case "insert":
            data[at:at] = draw.randbytes(length)
        case "delete":
            del data[at : at + length]
        case "swap":
            other = draw.choice([key for key in folder if key != name])
            return folder | {name: folder[other], other: folder[name]}
        case "zero":
            at -= at % 64
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        case "duplicate":
            found = draw.choice(list(re.finditer(rb'"(\w+)": ?[^,\[{}\]]+,', bytes(data[:4000]))) or [None])
            if found is not None:
                data[found.end() : found.end()] = found[0] if draw.random() < 0.5 else b'"' + found[1] + b'":0,'
        case "number" if numbers:
            found = draw.choice(numbers)
            # In a shard within its size: the header is read before anything else is compared
            digits = number if name == "cache.json" else b"9" * len(found[0])
            data[found.start() : found.end()] = digits
        case "nest" if numbers:
            found, depth = draw.choice(numbers), draw.choice([10, 1_000, 1_200, 3_000, 100_000])
            data[found.start() : found.end()] = b"[" * depth + b"]" * depth
    return folder | {name: bytes(data)}


def test_a_thousand_damaged_caches_are_refused(in_peace: Callable[[int], dict[str, bytes]], tmp_path: Path) -> None:
    whole, draw, refused = in_peace(8), random.Random(0), 0
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    AnchorCache.open(tmp_path).verify()
    while refused < 1000:
        damaged = mutate(draw, whole)
        changed = [name for name in whole if damaged[name] != whole[name]]
        if not changed:
            continue
        for name in changed:
            (tmp_path / name).write_bytes(damaged[name])
        with pytest.raises(AnchorCacheError, match=r"cannot be used: .+\. [A-Z]"):
            AnchorCache.open(tmp_path).verify()
        refused += 1
        for name in changed:
            (tmp_path / name).write_bytes(whole[name])
    AnchorCache.open(tmp_path).verify()


ODD: list[Any] = [None, True, -1, 0, 7, 10**400, 1.5, float("inf"), "", "..", "\0", "\ud800", "a" * 500, [], [[]], {}]


def replaced(draw: random.Random, value: Any, chance: float = 0.1) -> Any:
    """A JSON value with something odd somewhere in it."""
    if not isinstance(value, dict | list) or not value or draw.random() < chance:
        return draw.choice(ODD)
    copied = copy.copy(value)
    key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
    copied[key] = replaced(draw, value[key])
    return copied


def test_manifests_that_lie_under_a_right_checksum_never_crash(
    in_peace: Callable[[int], dict[str, bytes]], tmp_path: Path
) -> None:
    whole, draw, refused = in_peace(8), random.Random(0), 0
    for name, data in whole.items():
        (tmp_path / name).write_bytes(data)
    manifest = json.loads(whole["cache.json"])
    del manifest["sha256"]
    for _ in range(500):
        (tmp_path / "cache.json").write_text(manifest_text(replaced(draw, manifest, 0.0)))
        try:
            AnchorCache.open(tmp_path).verify()
        except AnchorCacheError:
            refused += 1
    assert refused >= 300


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 500)


def written_over(path: Path) -> None:
    data = path.read_bytes()
    time.sleep(0.02)  # a clock tick of the file system
    path.write_bytes(data[:-500] + bytes(500))


def put_in_place(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-500] + bytes(500))
    os.replace(other, path)


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("change", [cut_short, written_over, put_in_place, Path.unlink])
def test_a_shard_that_changes_under_an_open_cache(
    tmp_path: Path, change: Callable[[Path], None], read_before: bool
) -> None:
    """It is an error; or, of a file that is open and still there as it was, the anchors that it held."""
    x = torch.randn(32, 60)
    cache = build(nn.Linear(60, 3), [x], tmp_path, shard_size=16, progress=False, class_dim=-1)
    if read_before:
        cache.read([17])
    change(tmp_path / "shard-00001.safetensors")
    assert torch.equal(cache.read([3, 1]).inputs, x[[3, 1]])  # type: ignore[arg-type]
    if read_before and change in (put_in_place, Path.unlink):
        assert torch.equal(cache.read(range(32)).inputs, x)  # type: ignore[arg-type]
    else:
        with pytest.raises(AnchorCacheError, match=r"shard-00001.*(changed|cut short|No such file).*overwrite=True"):
            cache.read(range(32))


# Size


def memory(kind: str) -> int:
    """Bytes, by /proc: "VmRSS" is all that the process holds, "RssFile" its mapped files."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc")
def test_a_hundred_thousand_anchors(tmp_path: Path) -> None:
    """Opened within a second, sampled in memory that stays what it was."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2000, 768, generator=generator)
    build(nn.Linear(768, 8), (block + i for i in range(50)), tmp_path, progress=False, class_dim=-1)

    began = time.process_time()
    cache = AnchorCache.open(tmp_path)
    assert time.process_time() - began < 1.0
    assert len(cache) == 100_000
    assert len(list(tmp_path.glob("*.safetensors"))) == 391
    assert cache.nbytes > 300e6

    retention = LogitRetention(nn.Linear(768, 8), cache, 16)
    retention._batch(0)  # threads, and the permutation of all anchors
    before = {kind: memory(kind) for kind in ("VmRSS", "RssFile")}
    seen = 0
    for position in range(1, 2001):
        batch = retention._batch(position)
        if position % 100 == 0:
            rows = retention._sampler.indices(position)
            assert torch.equal(batch.inputs, block[rows % 2000] + (rows // 2000).unsqueeze(1))  # type: ignore[arg-type]
        seen += sum(x.nbytes for x in (batch.inputs, *batch.features.values()) if isinstance(x, Tensor))
    grown = {kind: memory(kind) - was for kind, was in before.items()}
    assert seen > 96e6
    assert all(growth < 32e6 for growth in grown.values()), grown


# Disks


def test_a_disk_without_room(server: Server, in_peace: Callable[[int], dict[str, bytes]], tmp_path: Path) -> None:
    """No file may be as long as the last shard, which holds the longest anchors."""
    whole, path, last = in_peace(24), tmp_path / "c", "shard-00007.safetensors"
    sizes = {name: len(data) for name, data in whole.items() if name.startswith("shard-")}
    assert all(size < sizes[last] for name, size in sizes.items() if name != last)
    status = server.end(server.start(builds_without_room, str(path), 24, sizes[last] - 1))
    assert os.waitstatus_to_exitcode(status) == 1
    said = (tmp_path / "said").read_text()
    assert f"{path / last} cannot be written" in said
    assert "File too large" in said
    assert "pass another `path`" in said
    assert "The shards that are complete stay" in said
    left = contents(path)
    assert complete(path) == 7
    assert not [name for name in left if name.endswith(".tmp")]
    for name in left:
        if name.endswith(".safetensors"):
            assert left[name] == whole[name]
    assert server.end(server.start(builds, str(path), 24)) == 0
    assert contents(path) == whole


def test_a_folder_that_cannot_be_written_to_is_found_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(model: nn.Module, batch: Tensor) -> Tensor:
        raise AssertionError("ran")

    (tmp_path / "file").touch()
    with pytest.raises(AnchorCacheError, match=r"file/c cannot be written \(Not a directory\).*another `path`"):
        build(nn.Linear(6, 4), [torch.randn(4, 6)], tmp_path / "file" / "c", Reading(never), class_dim=-1)

    folder, really = tmp_path / "c", os.open
    folder.mkdir()

    def read_only(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if str(path).startswith(str(folder)) and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return really(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(AnchorCacheError, match=r"Read-only file system.*Make the folder writable"):
        build(nn.Linear(6, 4), [torch.randn(4, 6)], folder, Reading(never), class_dim=-1)
    assert not contents(folder)


def test_two_builders_of_one_folder(
    server: Server, in_peace: Callable[[int], dict[str, bytes]], tmp_path: Path
) -> None:
    path = tmp_path / "c"
    pid = server.start(builds, str(path), 120, 0.02, 20)
    wait_for_shards(path, 2)
    with pytest.raises(AnchorCacheError, match=r"Another process is building.*Wait for it, or pass another `path`"):
        build_conversations(path, 120)
    with pytest.raises(AnchorCacheError, match="Another process"):
        build_conversations(path, 120, overwrite=True)
    assert not (path / "cache.json").exists(), "at once, not when the other has finished"
    path.with_name("go").touch()
    assert server.end(pid) == 0
    assert contents(path) == in_peace(120)


# Readers


@pytest.fixture
def cache(tmp_path: Path) -> AnchorCache:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    return build(
        nn.Linear(6, 4), [x], tmp_path / "cache", shard_size=4, dtype=torch.float32, progress=False, class_dim=-1
    )


def test_forked_workers_read_what_their_parent_reads(cache: AnchorCache) -> None:
    class Rows(torch.utils.data.Dataset[tuple[int, Tensor, Tensor]]):
        def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor]:
            batch = cache.read([i, 63 - i])
            assert isinstance(batch.inputs, Tensor)
            return os.getpid(), batch.inputs, batch.features["logprobs"]

        def __len__(self) -> int:
            return 64

    whole = cache.read(range(64))  # the files are open: descriptors are shared, with their offsets
    assert isinstance(whole.inputs, Tensor)
    loader = torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    seen = set()
    for _ in range(3):
        for i, (pid, inputs, logprobs) in enumerate(loader):
            seen.add(pid)
            assert torch.equal(inputs, whole.inputs[[i, 63 - i]])
            assert torch.equal(logprobs, whole.features["logprobs"][[i, 63 - i]])
            assert torch.equal(cache.read([i]).inputs, whole.inputs[i : i + 1])  # type: ignore[arg-type]
    assert len(seen - {os.getpid()}) == 6


def losses(retention: LogitRetention, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        loss = retention()
        for p, grad in zip(retention.parameters(), torch.autograd.grad(loss, retention.parameters()), strict=True):
            p.data -= 0.01 * grad
        found.append(loss.item())
    return found


def drifting(cache: AnchorCache, workers: int) -> LogitRetention:
    generator = torch.Generator().manual_seed(3)
    model = nn.Linear(6, 4)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return LogitRetention(model, cache, 4, strict=False, workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_reading_ahead_changes_no_bit(cache: AnchorCache, workers: int) -> None:
    def run(workers: int, copied: Callable[[LogitRetention], LogitRetention]) -> list[float]:
        retention = drifting(cache, workers)
        found = losses(retention, 4)
        retention.position = 29  # the end of an epoch, two epochs on
        found += losses(retention, 3)
        retention = copied(retention)
        found += losses(retention, 2)
        retention.position = 1
        return found + losses(retention, 1)

    expected = run(0, lambda retention: retention)
    assert len(set(expected)) == 10
    for copied in (lambda r: r, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))):
        assert run(workers, copied) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_while_reading_ahead_comes_at_its_own_position(cache: AnchorCache, workers: int) -> None:
    expected = losses(drifting(cache, 0), 16)
    retention = drifting(AnchorCache.open(cache.path), workers)
    needed = [{int(i) // 4 for i in retention._sampler.indices(position)} for position in range(16)]
    position = next(p for p in range(3, 16) if needed[p] - set().union(*needed[:p]))
    shard = (needed[position] - set().union(*needed[:position])).pop()
    path = cache.path / f"shard-{shard:05d}.safetensors"
    shutil.move(path, path.with_name("away"))
    assert losses(retention, position) == expected[:position]
    for _ in range(2):
        with pytest.raises(AnchorCacheError, match=path.name):
            retention()
        assert retention.position == position
    shutil.move(path.with_name("away"), path)
    assert losses(retention, 16 - position) == expected[position:]


if __name__ == "__main__":
    serve()


def test_a_forked_process_reads_ahead_for_itself(tmp_path: Path) -> None:
    """With what its parent had begun to read, and whose threads it does not have."""
    x = torch.randn(32, 6)
    model = nn.Linear(6, 3)
    retention = LogitRetention(model, build(model, [x], tmp_path, progress=False, class_dim=-1), 4)
    retention._batch(0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(600)  # a process that waits for ever for a thread, however busy the machine
        os.write(writer, retention._batch(1).inputs.numpy().tobytes())  # type: ignore[union-attr]
        os._exit(0)
    found = os.read(reader, 4 * 6 * 4)
    assert os.waitpid(child, 0)[1] == 0
    assert found == retention._batch(1).inputs.numpy().tobytes()  # type: ignore[union-attr]
