"""Hidden states of a model that FSDP2 spreads over processes: their loss has the gradients that it has on one."""

import pytest
import taps
import torch

from craft_optim import anchors


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("anchors") / "cache")
    anchors.build(taps.Net(), taps.examples().split(4), path, layers=taps.CACHED, top_k=8, progress=False, class_dim=-1)
    return path


@pytest.fixture(scope="module")
def alone(processes, cache):
    """The same pass in one process; each once."""
    runs = {}

    def run(layers, **options):
        key = tuple(layers), *options.items()
        if key not in runs:
            (runs[key],) = processes.run(1, "taps.passes", cache=cache, way="plain", layers=layers, **options)
        return runs[key]

    return run


@pytest.fixture
def same(processes, cache, alone):
    """Asserts that several processes have the gradients of one; the results of all."""

    def check(way, layers, options, world_size=2, **others):
        expected = alone(layers, **others)
        ranks = processes.run(world_size, "taps.passes", cache=cache, way=way, layers=layers, options=options, **others)
        for found in ranks:
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
            assert found["gradients"].keys() == expected["gradients"].keys()
            for name, gradient in expected["gradients"].items():
                torch.testing.assert_close(
                    found["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
                )
        return ranks

    return check


KEEPING = pytest.mark.parametrize("options", [None, {"reshard_after_forward": True}], ids=["", "shared out"])


@KEEPING
@pytest.mark.parametrize("layers", [[0], [2], [-1], [1, -1], ["decoder.layers.1.mix"], ["decoder.layers.2"]], ids=str)
@pytest.mark.parametrize("way", [way for way in taps.WAYS if way != "plain"])
def test_parts_of_a_model(same, way, layers, options):
    for rank in same(way, layers, options):
        assert rank["head"] == 0, "nothing of the loss comes from there"


@pytest.mark.parametrize("layers", [[2], ["decoder.layers.1.mix"]], ids=str)
@pytest.mark.parametrize("way", ["root", "layers and root"])
def test_weights_that_stay_gathered(same, way, layers):
    same(way, layers, {"reshard_after_forward": False})


@KEEPING
@pytest.mark.parametrize("model", ["tied", "frozen", "checkpointed", "silent"])
@pytest.mark.parametrize("way", ["root", "layers and root", "later layers and root"])
def test_models(same, way, model, options):
    """Embeddings that are the head; a frozen head; layers that run again; an output without a gradient."""
    for layers in ([2], ["decoder.layers.2.mix"]):
        same(way, layers, options, **{model: True})


@KEEPING
@pytest.mark.parametrize("kind", ["logits, too", "two passes"])
@pytest.mark.parametrize("way", ["root", "layers and root", "head and root"])
def test_combined(same, way, kind, options):
    same(way, [2], options, kind=kind)


@pytest.mark.parametrize("world_size", [1, 4])
def test_other_numbers_of_processes(same, world_size):
    same("root", [2], {"reshard_after_forward": True}, world_size=world_size)


@KEEPING
def test_training(processes, cache, options):
    ((expected, metrics),) = processes.run(1, "taps.train", cache=cache, way="plain", layers=[2])
    for parameters, found in processes.run(2, "taps.train", cache=cache, way="root", layers=[2], options=options):
        assert found == pytest.approx(metrics, rel=1e-3)
        for mine, its in zip(parameters, expected, strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-5)
