"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# Other tests run beside these: how long an example takes is the machine's business.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
