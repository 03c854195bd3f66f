"""Decisions of the data plane: no torch, no sockets, no clock. Everything here has a test that runs in milliseconds."""
