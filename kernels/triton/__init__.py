"""The GPU kernels in Triton, for NVIDIA and AMD; README.md beside this file says how they are built and measured.

One module per operation, named as the operation is. It holds the kernels (`@triton.jit`, names with a leading
underscore) and the functions that launch them, `op` and `op_backward`. These take the arguments of the kernel contract,
`fastvae/backends/contract.py`, and some after them what the caller has set: detached tensors of one device in, new
tensors out. `fastvae/backends/triton.py` finds them by name, reads the settings and makes that device current. Nothing
of fastvae is imported here but these modules themselves. So a launcher

- launches by `_launch.launch`, on whatever stream is current, with a launch configuration fixed by the sizes;
- has torch compute nothing: allocations, views and launches are all that it does, unless an input has to be copied to
  be contiguous; so what it does is recorded, and done again without it (`_replay.py`);
- allocates what it needs on that stream and leaves it there, so nothing is owed a `record_stream`: a caller who hands
  tensors of another stream in owes it, as to any of torch's operations;
- never reads a tensor's values (no host synchronization, capturable in a CUDA graph), and so also runs on meta
  tensors: the ahead-of-time suite, tests/backends/test_triton_compile.py, compiles what such a call would launch;
- reads its inputs in the dtype they have and converts in registers; rows may be strided (`_launch.rows`);
- addresses with 64 bits (`.to(tl.int64)` on anything that is multiplied by a stride);
- gives the same bits every time: no atomics, partial sums added up by a second kernel in a fixed order.
"""
