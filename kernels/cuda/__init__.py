"""A stage of a model on an NVIDIA GPU: its KV cache, its steps, its CUDA graphs. Like kernels/triton, needs triton."""
