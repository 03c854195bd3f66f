"""The shipped demo models: complete, small enough, readable, and made by a script that can be run again."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path

import jinja2
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from dataplane.demo import corpus, draft_dir, model_dir, tokens
from dataplane.demo import train as training
from dataplane.demo.net import Llama

FOLDERS = {"kevlar-demo": model_dir(), "kevlar-demo-draft": draft_dir()}
PROMPTS = (
    "It was a fine morning, and the whole party",
    "She had never been so happy in her life, for",
    '"My dear sir," said the old lady, "I',
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(model_dir(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(model_dir() / "tokenizer.json"))


def share_of_words(text: str) -> float:
    """The part of the text's words (an unfinished last one left out) that the novels use often."""
    known = set((model_dir() / "words.txt").read_text(encoding="utf-8").split())
    assert 1_000 <= len(known) <= 5_000
    found = re.findall(r"[A-Za-z]+", text.rsplit(" ", 1)[0].lower())
    assert len(found) >= 10
    return sum(w in known for w in found) / len(found)


def render(messages: list[dict[str, object]], **extra: object) -> str:
    """The chat template, rendered as a server does it: sandboxed, blocks trimmed."""
    config = json.loads((model_dir() / "tokenizer_config.json").read_text(encoding="utf-8"))

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(config["chat_template"])
    return template.render(messages=messages, bos_token=config["bos_token"], **extra)


def test_size_and_completeness() -> None:
    files = [p for folder in FOLDERS.values() for p in folder.iterdir()]
    assert sum(p.stat().st_size for p in files) < 20_000_000
    need = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for folder in FOLDERS.values():
        assert need <= {p.name for p in folder.iterdir()}
        assert "Apache License" in (folder / "LICENSE").read_text(encoding="utf-8")
        assert "public domain" in (folder / "CORPUS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_configuration(name: str) -> None:
    config = json.loads((FOLDERS[name] / "config.json").read_text(encoding="utf-8"))
    assert config == training.SHAPES[name].config()
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["max_position_embeddings"] >= 2048
    if name == "kevlar-demo":
        assert config["num_hidden_layers"] >= 8
    ends = json.loads((FOLDERS[name] / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    assert [tokens.SPECIAL[i] for i in ends] == [tokens.EOS, tokens.END]


def test_tokenizer(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(t) for t in tokens.SPECIAL] == list(range(len(tokens.SPECIAL)))
    assert tokenizer.get_vocab_size() == training.VOCAB
    text = "It is a truth: 1 + 1 = 2, naïve 日本 🙂\n\n  and  spaces."
    encoded = tokenizer.encode(text)
    assert encoded.ids[0] == 0
    assert tokenizer.decode(encoded.ids) == text
    assert (draft_dir() / "tokenizer.json").read_bytes() == (model_dir() / "tokenizer.json").read_bytes()


def test_chat_template() -> None:
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Good "}, {"type": "text", "text": "day. "}]},
        {"role": "assistant", "content": "Good day, sir."},
        {"role": "user", "content": "Go on."},
    ]
    want = (
        "<|bos|><|system|>Be kind.<|end|><|user|>Good day.<|end|><|assistant|>Good day, sir.<|end|>"
        "<|user|>Go on.<|end|>"
    )
    assert render(messages) == want
    assert render(messages, add_generation_prompt=True) == want + "<|assistant|>"
    theirs = AutoTokenizer.from_pretrained(model_dir())
    assert theirs.apply_chat_template(messages, tokenize=False) == want
    assert theirs("Hello").input_ids[0] == 0
    with pytest.raises(jinja2.TemplateError, match="unknown role"):
        render([{"role": "parrot", "content": "x"}])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_continuations_are_words(
    prompt: str, reference: LlamaForCausalLM, tokenizer: Tokenizer
) -> None:
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    out = reference.generate(ids, max_new_tokens=80, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    text = tokenizer.decode(out.tolist())
    assert share_of_words(text) >= 0.9, text


def test_long_sampled_story_stays_readable(reference: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """The last 200 of 1,200 tokens are still words: the context length in the configuration is real."""
    torch.manual_seed(5)
    ids = torch.tensor([tokenizer.encode(PROMPTS[0]).ids])
    out = reference.generate(
        ids, max_new_tokens=1_200, do_sample=True, temperature=0.8, top_k=0, eos_token_id=None, pad_token_id=1
    )
    text = tokenizer.decode(out[0, -200:].tolist())
    assert share_of_words(text) >= 0.9, text


def test_chat_answers_are_words_and_end(reference: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    questions = (
        "What is love?",
        "Tell me about Emma.",
        "Hello!",
        "Explain happiness.",
        "Go on.",
        "Who are you?",
    )
    ended, answers = 0, []
    for seed, question in enumerate(questions):
        torch.manual_seed(seed)
        prompt = render([{"role": "user", "content": question}], add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
        out = reference.generate(
            ids,
            max_new_tokens=300,
            do_sample=True,
            temperature=0.8,
            top_k=0,
            eos_token_id=[1, 2],
            pad_token_id=1,
        )[0, ids.shape[1] :].tolist()
        ended += out[-1] == tokens.SPECIAL.index(tokens.END)
        answers.append(tokenizer.decode(out))
    assert share_of_words(" ".join(answers)) >= 0.9, answers
    assert ended >= 2, answers


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_training_model_equals_transformers(name: str) -> None:
    ours = Llama(training.SHAPES[name], seed=0).eval()
    ours.load_state_dict(load_file(FOLDERS[name] / "model.safetensors"))
    theirs = LlamaForCausalLM.from_pretrained(FOLDERS[name], dtype=torch.float32).eval()
    ids = torch.randint(0, training.VOCAB, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-3, rtol=1e-4)


def test_draft_often_agrees(reference: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """A draft is of use if its best token is often the model's: one time in three here, by chance one in 2,048."""
    draft = LlamaForCausalLM.from_pretrained(draft_dir(), dtype=torch.float32).eval()
    torch.manual_seed(2)
    ids = torch.tensor([tokenizer.encode(PROMPTS[1]).ids])
    out = reference.generate(
        ids, max_new_tokens=200, do_sample=True, temperature=0.7, eos_token_id=None, pad_token_id=1
    )
    with torch.no_grad():
        same = draft(out).logits.argmax(-1) == reference(out).logits.argmax(-1)
    assert same.float().mean().item() >= 0.33


def _package(folder: Path, chapters: int) -> Path:
    """A stand-in for the Debian package: one novel of `chapters` chapters, in R's lazy-load format."""
    lines = ["A NOVEL", ""]
    for number in range(chapters):
        lines += [f"CHAPTER {number + 1}", "", "It was a fine day", f"for walk {number}, and she _walked_."]
        lines += ["", f'"I am here," said Mr. {"AB"[number % 2]}. "Are you?"', ""]
    blob = b"X\n" + struct.pack(">iii", 2, 0x40201, 0x20300) + struct.pack(">ii", 16, len(lines))
    blob += b"".join(struct.pack(">ii", 0x40009, len(s)) + s.encode() for s in lines)
    path = folder / corpus.RDB
    path.parent.mkdir(parents=True)
    path.write_bytes(struct.pack(">I", len(blob)) + zlib.compress(blob))
    return folder


def test_corpus_reader(tmp_path: Path) -> None:
    texts = corpus.load(_package(tmp_path / "packages", 250))
    assert len(texts) == 250
    spoken = '"I am here," said Mr. B. "Are you?"'
    assert texts[1].paragraphs == ("It was a fine day for walk 1, and she walked.", spoken)
    assert corpus.sentences(spoken) == [spoken]
    assert corpus.sentences('"Yes." She went. Mrs. Hill came!') == ['"Yes."', "She went.", "Mrs. Hill came!"]
    assert corpus.documents(texts, 3) == corpus.documents(texts, 3) != corpus.documents(texts, 4)
    with pytest.raises(corpus.CorpusError):
        corpus.load(tmp_path / "empty")


def test_interrupted_training_resumes_with_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = corpus.load(_package(tmp_path / "packages", 250))
    whole = training.Settings("kevlar-demo-draft", tmp_path / "whole", steps=4, seed=1, save_every=2)
    training.train(whole, texts)
    parts = training.Settings("kevlar-demo-draft", tmp_path / "parts", steps=4, seed=1, save_every=100)
    training.train(parts, texts, until=2)
    first = load_file(tmp_path / "parts" / whole.name / "model.safetensors")
    capsys.readouterr()
    training.train(parts, texts)
    assert "step 2 of 4" in capsys.readouterr().err  # it went on, and did not start again
    want = load_file(tmp_path / "whole" / whole.name / "model.safetensors")
    have = load_file(tmp_path / "parts" / whole.name / "model.safetensors")
    assert all(torch.equal(want[k], have[k]) for k in want)
    assert any(not torch.equal(want[k], first[k]) for k in want)
