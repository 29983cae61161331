"""Benchmarks that only large GPUs can run."""

import pytest
import torch

__all__ = ["require_gpu"]


def require_gpu(device: torch.device, gigabytes: float = 0.0) -> None:
    """Skips the test unless it runs on a GPU with so much memory free."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(device)[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of GPU memory. Found {free:.0f} GB free")
