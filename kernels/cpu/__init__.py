"""Kernels for CPUs, in C. `stage` runs a whole stage in one call, `ops` its operations one by one."""
