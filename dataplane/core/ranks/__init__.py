"""A stage on several ranks (FailSafe, arXiv 2511.14116): who owns which request, what is backed up, what a loss takes.

Who computes with which heads and shards is kernels/ranks/layout.py. There is no tensor, clock or socket in here."""
