"""Kernels: three ways to form inner products of two lists of gradients and to merge them; `surgery` chooses.

- `compiled`: one pass of C++ over gradients in host memory, compiled when it is first needed.
- `fused`: Triton kernels over all gradients of a CUDA device.
- `portable`: torch operations, for everything else.
"""
