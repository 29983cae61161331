"""A vocabulary head that FSDP2 spreads over processes: its logits are compared in pieces, as on one process."""

import heads
import pytest
import torch

from craft_optim import anchors


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Paths of caches: False and True for models whose embedding and head are tied or not; "tokens"."""
    made = {}
    for name, settings in {False: {"top_k": 8}, True: {"top_k": 8}, "tokens": {"tokens": heads.continued}}.items():
        made[name] = str(tmp_path_factory.mktemp("anchors") / "cache")
        batches, model = heads.examples().split(6), heads.network(name is True)
        anchors.build(model, batches, made[name], progress=False, class_dim=-1, **settings)
    return made | dict.fromkeys(["module", "adapters"], made[False])


@pytest.fixture(scope="module")
def alone(processes, caches):
    """The same pass in one process, on whole logits; each once."""
    runs = {}

    def run(tied=False, frozen=False, kind="logits"):
        key = tied, frozen, kind
        if key not in runs:
            arguments = {"tied": tied, "frozen": frozen, "kind": kind}
            (runs[key],) = processes.run(
                1, "heads.passes", cache=caches[kind if kind in caches else tied], way="plain", whole=True, **arguments
            )
        return runs[key]

    return run


def assert_same(found, expected, rounding=1e-4):
    assert found["loss"] == pytest.approx(expected["loss"], rel=rounding)
    assert found["drift"] == pytest.approx(expected["drift"], rel=rounding)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        atol = rounding * float(gradient.abs().max())
        mine = found["gradients"][name]
        torch.testing.assert_close(mine, gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


IN_PIECES = heads.PIECE * heads.CLASSES


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("way", ["root", "root that shares out", "layers and root", "layers and root that shares out"])
def test_a_head_within_the_root(processes, caches, alone, way, tied, frozen):
    ranks = processes.run(2, "heads.passes", cache=caches[tied], way=way, tied=tied, frozen=frozen)
    for rank in ranks:
        assert rank["said"] == []
        assert rank["largest"] <= IN_PIECES
        assert_same(rank, alone(tied, frozen))


@pytest.mark.parametrize("way", ["head and root", "norm with head, and root", "head alone"])
def test_a_head_that_is_gathered_for_its_own_forward_only(processes, caches, alone, way):
    for rank in processes.run(2, "heads.passes", cache=caches[False], way=way):
        assert rank["said"] == []
        assert rank["largest"] <= IN_PIECES
        assert_same(rank, alone())


@pytest.mark.parametrize("way", ["bfloat16", "bfloat16, float32 outside"])
def test_mixed_precision(processes, caches, way):
    ranks, whole = (
        processes.run(2, "heads.passes", cache=caches[False], way=way, whole=whole) for whole in (False, True)
    )
    for found, expected in zip(ranks, whole, strict=True):
        assert found["said"] == []
        assert found["largest"] <= IN_PIECES < expected["largest"]
        assert_same(found, expected, rounding=2e-2)


@pytest.mark.parametrize("kind", ["tokens", "module"])
def test_other_closures(processes, caches, alone, kind):
    """The teacher's own tokens; a teacher that runs along, its head spread as the model's."""
    for rank in processes.run(2, "heads.passes", cache=caches[kind], way="head and root", kind=kind):
        assert rank["said"] == []
        assert rank["largest"] <= IN_PIECES
        assert_same(rank, alone(kind=kind))


@pytest.mark.parametrize("way", ["root", "root that shares out"])
def test_a_teacher_without_its_adapters(processes, caches, alone, way):
    for rank in processes.run(2, "heads.passes", cache=None, way=way, kind="adapters"):
        assert rank["largest"] <= IN_PIECES
        assert_same(rank, alone(kind="adapters"))


@pytest.mark.parametrize("way", ["root", "layers and root", "head and root"])
def test_a_process_without_valid_positions(processes, caches, way):
    ranks, whole = (
        processes.run(2, "heads.passes", cache=caches[False], way=way, mask="some", whole=whole)
        for whole in (False, True)
    )
    for found, expected in zip(ranks, whole, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize(("world_size", "way"), [(1, "head and root"), (4, "replicas")])
def test_other_numbers_of_processes(processes, caches, alone, world_size, way):
    for rank in processes.run(world_size, "heads.passes", cache=caches[False], way=way):
        assert rank["largest"] <= IN_PIECES
        assert_same(rank, alone())


def test_a_vocabulary_shared_out_by_tensor_parallelism_is_compared_as_a_whole(processes, caches, alone):
    for rank in processes.run(2, "heads.passes", cache=caches[False], way="tensor parallel"):
        assert len(rank["said"]) == 1
        assert "something else than FSDP2" in rank["said"][0]
        assert_same(rank, alone())


def test_a_cache_is_built_in_pieces(processes, caches, tmp_path):
    assert processes.run(2, "heads.build", path=str(tmp_path / "cache")) == [[], []]
    found, expected = (anchors.AnchorCache.open(path).read(range(24)) for path in (tmp_path / "cache", caches[False]))
    assert torch.equal(found.inputs, expected.inputs)
    for name, x in expected.features.items():
        torch.testing.assert_close(found.features[name], x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", ["root", "head and root"])
def test_training(processes, caches, way):
    ((expected, metrics),) = processes.run(1, "heads.train", cache=caches[False], way="plain")
    for parameters, found in processes.run(2, "heads.train", cache=caches[False], way=way):
        assert found == pytest.approx(metrics, rel=1e-3)
        for mine, its in zip(parameters, expected, strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-5)


def test_processes_decide_alike(processes):
    """The first, where no cap shows, by what the second has seen; on its own it could not tell."""
    assert processes.run(2, "heads.forms_found") == [(False, True), (True, True)]
