"""Compute kernels. Importing this is silent, and needs neither torch nor a GPU. `dispatch` builds stages."""
