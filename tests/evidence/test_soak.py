"""The soak: what counts as growth, and that it sees what does."""

import sys
from types import SimpleNamespace

import pytest
import torch

if not sys.platform.startswith("linux"):
    pytest.skip("counts by /proc", allow_module_level=True)

import soak

LEVEL = soak.Counts(100.0, 10, 0, 2, 3, 1)


@pytest.mark.parametrize("name", soak.Counts._fields[1:])
def test_anything_that_there_is_more_of_has_grown(name):
    more = LEVEL._replace(**{name: getattr(LEVEL, name) + 5})
    assert soak.grown([LEVEL, LEVEL, more]) == soak.grown([LEVEL, more, more]) == [name]
    assert soak.grown([more, LEVEL, LEVEL]) == soak.grown([LEVEL, more, LEVEL]) == []


def test_memory_wavers_and_settles():
    def at(memory):
        return LEVEL._replace(memory=memory)

    assert soak.grown([at(90.0), at(100.0), at(100.9)]) == []
    assert soak.grown([at(100.0), at(100.0), at(101.1)]) == ["memory"]


def test_what_is_kept_from_one_step_to_the_next_is_seen(monkeypatch, capsys, tmp_path):
    kept = []

    def leaking(folder):
        run = soak.on_cache()(folder)

        def step(number):
            run.step(number)
            kept.append(run.model(soak.INPUTS))
            run.model.body.register_forward_hook(lambda *_: None)
            kept.append(open("/dev/null"))  # noqa: SIM115

        return run._replace(step=step)

    monkeypatch.setitem(soak.ALONE, "leaking", leaking)
    rows = []
    soak.work("leaking", 20, 0, 1, tmp_path, SimpleNamespace(send=rows.extend))
    assert [row.hooks for row in rows] == [2, 10, 20]
    found = soak.grown(rows)
    monkeypatch.setattr(soak, "soak", lambda name, steps, processes: [rows])
    monkeypatch.setattr(soak, "TOGETHER", {})
    assert soak.main(["--steps=20", "--only=leaking"]) == 1
    assert {"tensors", "nodes", "files", "hooks"} <= set(found)
    assert f"20 steps. Grown: leaking: {', '.join(found)}." in capsys.readouterr().out


@pytest.mark.evidence
@pytest.mark.parametrize("name", soak.ALONE | soak.TOGETHER)
def test_nothing_grows(name, capfd):
    assert soak.main(["--steps=1000", f"--only={name}"]) == 0
    assert "1000 steps. Nothing has grown." in capfd.readouterr().out
    assert not torch.distributed.is_initialized()
