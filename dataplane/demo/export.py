"""Write a trained demo model as a Hugging Face checkpoint folder, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from safetensors.torch import save_file
from tokenizers import Tokenizer

from dataplane.demo import model_dir, tokens
from dataplane.demo.net import CONTEXT, Llama


def write_model(folder: Path, model: Llama, tokenizer: Tokenizer, words: list[str]) -> None:
    """Write config, weights (float32), tokenizer, template, `words.txt` (one word a line) and licence to `folder`.

    Every file is written beside its place and renamed, so a reader never sees half a file.
    """
    new = folder.with_name(folder.name + ".new")
    tokens.write(tokenizer, new, CONTEXT)
    (new / "config.json").write_text(json.dumps(model.shape.config(), indent=2) + "\n", encoding="utf-8")
    (new / "words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    for name in ("LICENSE", "CORPUS.md"):
        shutil.copyfile(model_dir() / name, new / name)
    weights = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(new.iterdir()):
        path.chmod(0o644)  # safetensors writes for the owner alone; an installed package is for all
        os.replace(path, folder / path.name)
    new.rmdir()
