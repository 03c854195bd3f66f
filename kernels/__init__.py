"""Compute kernels. Importing this is silent, and needs neither torch nor a GPU; build_stage() is in `dispatch`."""
