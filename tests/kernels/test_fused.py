"""Triton's kernels: in its interpreter, through its compiler for devices that are not here, and on one that is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from craft_optim._step.kernels import fused  # noqa: E402
from craft_optim._step.surgery import GradientPairs  # noqa: E402
from craft_optim.functional import project_and_merge_  # noqa: E402

SIGNATURE = {
    **dict.fromkeys(("tensors", "programs"), "*i64"),
    **dict.fromkeys(("partial", "coefficients"), "*fp64"),
    **dict.fromkeys(("tensors_stride", "programs_stride", "partial_stride", "n_segments"), "i32"),
}


def test_in_the_interpreter():
    tests = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 25


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("kernel", ["_dots", "_merge"])
def test_compiles_to_loads_of_16_bytes(kernel, dtype, architecture):
    from triton.backends.compiler import GPUTarget

    function = getattr(fused, kernel)
    constants = fused._Group(dtype, dtype, aligned=True).constants(torch.float32)
    warps = constants.pop("num_warps")
    source = triton.compiler.ASTSource(
        function,
        {name: SIGNATURE.get(name, "constexpr") for name in function.arg_names},
        constants,
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
    assert made.asm["ptx"].count("ld.global.v4.b32") >= 4
    assert ("st.global.v4.b32" in made.asm["ptx"]) == (kernel == "_merge")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_device_it_does_what_torch_operations_do(dtype, monkeypatch):
    generator = torch.Generator("cuda").manual_seed(0)
    task = [torch.randn(n, generator=generator, device="cuda").to(dtype) for n in (5, 100_000, 4096, 1 << 20)]
    retention = [torch.randn(t.shape, generator=generator, device="cuda").to(dtype) - 0.5 * t for t in task]
    assert GradientPairs(task, retention).ways == {"fused"}
    other = [r.clone() for r in retention]
    found = project_and_merge_(task, retention, lam=0.7)
    monkeypatch.setattr("craft_optim._step.surgery._FUSED", frozenset())
    expected = project_and_merge_(task, other, lam=0.7)
    assert (found.tt, found.rr, found.tr) == pytest.approx((expected.tt, expected.rr, expected.tr), rel=1e-4)
    for a, b in zip(retention, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-3)
