"""Which scheduler runs which request: the router, a pure state machine, and what feeds it and performs its effects."""
