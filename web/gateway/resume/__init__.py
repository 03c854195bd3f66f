"""Streams that outlive a connection or a gateway: their identity, how far a client is, and how they are taken up."""
