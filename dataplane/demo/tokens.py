"""The demo models' tokenizer: special tokens, chat template, training and the Hugging Face files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, END = "<|bos|>", "<|eos|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL = (BOS, EOS, END, SYSTEM, USER, ASSISTANT)  # ids 0 to 5, in this order

# `developer` is the newer name of `system`; a tool's result reaches the model as words of the user.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['content'] is string -%}
    {%- set text = message['content'] -%}
  {%- else -%}
    {%- set parts = namespace(text='') -%}
    {%- for part in message['content'] or [] -%}
      {%- if part['type'] == 'text' -%}
        {%- set parts.text = parts.text + part['text'] -%}
      {%- endif -%}
    {%- endfor -%}
    {%- set text = parts.text -%}
  {%- endif -%}
  {%- if message['role'] in ['system', 'developer'] -%}
    {{- '<|system|>' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '<|assistant|>' -}}
  {%- elif message['role'] in ['user', 'tool'] -%}
    {{- '<|user|>' -}}
  {%- else -%}
    {{- raise_exception('unknown role: ' + message['role']) -}}
  {%- endif -%}
  {{- text | trim + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>' -}}
{%- endif -%}
"""


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens, special tokens first; encoding adds BOS unless told not to."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The sequence also keeps the byte offsets right, as the published Llama 3 tokenizers do.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, SPECIAL.index(BOS))]
            ),
        ]
    )
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        "additional_special_tokens": [END, SYSTEM, USER, ASSISTANT],
        **named,
    }
    ends = [SPECIAL.index(EOS), SPECIAL.index(END)]
    generation = {"bos_token_id": SPECIAL.index(BOS), "eos_token_id": ends, "pad_token_id": ends[0]}
    for name, value in (
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", named),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
