"""Erasure codes over shards of bytes. `codes` is what others use."""
