"""The demo model shipped with the package, and its smaller draft; `train.py` made both."""

from __future__ import annotations

from pathlib import Path


def model_dir() -> Path:
    """The demo model's Hugging Face checkpoint folder (8 layers, float32)."""
    return Path(__file__).parent / "kevlar-demo"


def draft_dir() -> Path:
    """The draft model's folder: the same tokenizer, 2 narrow layers."""
    return Path(__file__).parent / "kevlar-demo-draft"
