"""What msgspec raises for bytes that it cannot read: who decodes what others wrote catches all of it, never a part."""

from __future__ import annotations

import msgspec

# Beside its own errors: text that is no UTF-8, and nesting that exceeds the interpreter's stack.
UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
