"""Triton kernels of a training step, for GPUs; nothing here is imported before `load_gpu_kernels`."""
