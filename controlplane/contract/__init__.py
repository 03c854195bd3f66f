"""The vocabulary that all planes share: identities, topology, records, messages and their codecs.

Nothing here imports anything else of ours, opens a socket or reads a clock.
"""
