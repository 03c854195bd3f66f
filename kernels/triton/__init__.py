"""Kernels for NVIDIA GPUs in Triton. This package needs triton; nothing imports it before a CUDA stage is built.

The rule of equal bits is kept by construction. Each row of a result is computed by the same compiled program,
in tiles of the same shape, over inputs and keys in the same order, however many rows a call has:

- tile sizes depend on the model (shapes, dtype) and never on the number of rows or on lengths;
- row counts and lengths are never specialised on, so there is one binary for one row and for a thousand;
- no sum is cut by batch or length: matrix products run over all inputs in one program, and attention's cuts
  are at fixed positions (attention.py).

With TRITON_INTERPRET=1 in the environment before triton is imported, the same kernels run on CPU tensors.

Kernels carry no type annotations, since Triton reads those of parameters as its own; what launches them does."""
