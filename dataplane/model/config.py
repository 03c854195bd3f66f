"""config.json of a Hugging Face checkpoint, parsed once into an immutable value.

Llama, Mistral, Qwen2 and Qwen3 dense. They are one architecture with a few switches, and this is where the
families end: nothing later asks for the family. Defaults are those of transformers' config classes, because a
saved config.json may leave out what equals its class's default. Where two keys say one thing, the one that
transformers takes counts; what it would take and we cannot do is refused by name. Needs no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from controlplane.gguf.files import config_of
from controlplane.gguf.header import GgufError, is_gguf, read_header
from dataplane.model.errors import ModelError
from dataplane.model.schemes import Scheme, scheme_of

ModelDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `factor` is 1 for "default"; the last three are used by "llama3" only."""

    kind: Literal["default", "linear", "llama3"]
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything the stages need to know. Sizes are counts of values; windows[i] is layer i's sliding window."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    dtype: ModelDtype
    eos_token_ids: tuple[int, ...]
    scheme: Scheme | None = None  # how weights are quantised in the checkpoint


FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

# Of their classes, where config.json says nothing.
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
MAX_POSITIONS = {"llama": 2048, "mistral": 4096 * 32, "qwen2": 32768, "qwen3": 32768}


class _Fields:
    """Typed access to one JSON object; everything wrong becomes a ModelError naming file and key."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def error(self, key: str, reason: str) -> ModelError:
        return ModelError(self.path, self.prefix + key, reason)

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 2**31 - 1) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"expected an integer from {low} to {high}, found {value!r:.80}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.error(key, f"expected a positive number, found {value!r:.80}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, found {value!r:.80}")
        return value

    def section(self, key: str) -> "_Fields | None":
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"expected an object, found {value!r:.80}")
        return _Fields(self.path, value, f"{self.prefix}{key}.")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(path, None, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(path, None, f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(path, None, "is not a JSON object")
    return value


def _values(model: Path) -> tuple[Path, dict[str, Any]]:
    """Of config.json, or what a GGUF file says in its place."""
    if not is_gguf(model):
        return model / "config.json", read_json(model / "config.json")
    try:
        return model, config_of(model, read_header(model))
    except (GgufError, OSError) as error:
        raise ModelError(model, None, str(error)) from error


def load_config(model_dir: Path) -> ModelConfig:
    """Reads config.json (and the end tokens of generation_config.json), or a GGUF file. Raises ModelError."""
    path, values = _values(model_dir)
    f = _Fields(path, values)
    family = _family(f)
    layers = f.integer("num_hidden_layers", high=4096)
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    # Absent means the class's default, null as many as there are attention heads.
    kv_default = heads if "num_key_value_heads" in f.values else KV_HEADS.get(family, heads)
    kv_heads = f.integer("num_key_value_heads", kv_default)
    if family == "qwen3" and f.values.get("head_dim", 128) is None:
        raise f.error("head_dim", "expected an integer, found null")
    head_dim = f.integer("head_dim", 128 if family == "qwen3" else max(hidden // heads, 1))
    if heads % kv_heads:
        raise f.error("num_key_value_heads", f"{heads} attention heads are no multiple of {kv_heads}")
    if head_dim % 2 or head_dim > 512:
        raise f.error("head_dim", f"must be even and at most 512, found {head_dim}")
    vocab, bias = f.integer("vocab_size"), f.flag("attention_bias")
    intermediate = f.integer("intermediate_size")
    outputs = (hidden, heads * head_dim, kv_heads * head_dim, intermediate)
    max_positions = f.integer("max_position_embeddings", MAX_POSITIONS[family])
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        rope=_rope(f, max_positions),
        tie_embeddings=f.flag("tie_word_embeddings"),
        qkv_bias=family == "qwen2" or (family in ("llama", "qwen3") and bias),
        o_bias=family in ("llama", "qwen3") and bias,
        mlp_bias=family == "llama" and f.flag("mlp_bias"),
        qk_norm=family == "qwen3",
        windows=_windows(f, family, layers),
        dtype=_dtype(f),
        eos_token_ids=_eos(f, model_dir / "generation_config.json", vocab),
        scheme=_scheme(f, (hidden, heads * head_dim, intermediate), outputs),
    )


def _family(f: _Fields) -> str:
    names = f.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise f.error("architectures", f"expected one architecture name, found {names!r:.80}")
    if names[0] not in FAMILIES:
        raise f.error("architectures", f"{names[0]!r:.80} is not supported; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[names[0]]
    if f.values.get("model_type", family) != family:
        found = f.values["model_type"]
        raise f.error("model_type", f"{found!r:.80} does not fit the architecture {names[0]}")
    if f.values.get("text_config") is not None:
        raise f.error("text_config", "models with a configuration inside the configuration are not supported")
    if f.values.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise f.error("hidden_act", f"only silu is supported, found {f.values['hidden_act']!r:.80}")
    return family


def _scheme(f: _Fields, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Scheme | None:
    for key in ("quantization_config", "compression_config"):
        if (section := f.section(key)) is not None:
            try:
                scheme = scheme_of(section.values)
            except ValueError as error:
                raise f.error(key, str(error)) from error
            if fault := scheme.fault(inputs, outputs):
                raise f.error(key, fault)
            return scheme
    return None


def _rope(f: _Fields, max_positions: int) -> RopeConfig:
    # rope_parameters is the form of transformers 5; rope_scaling, with rope_theta beside it, the older one. With both
    # it takes the older one whole, and nothing of the other; an empty one is none.
    sections = [
        s for key in ("rope_scaling", "rope_parameters") if (s := f.section(key)) is not None and s.values
    ]
    section = sections[0] if sections else _Fields(f.path, {}, "rope_parameters.")
    for name, value in section.values.items():
        if isinstance(value, dict):
            raise section.error(name, "rotary parameters for each type of layer are not supported")
    if section.values.get("rope_theta", 0.0) is None:
        raise section.error("rope_theta", "expected a positive number, found null")
    theta = section.number("rope_theta", f.number("rope_theta", 10000.0))
    key = "rope_type" if "rope_type" in section.values else "type"
    for fields in (f, section):
        if fields.number("partial_rotary_factor", 1.0) != 1.0:
            raise fields.error("partial_rotary_factor", "only 1.0 is supported")
    match section.values.get(key, "default"):
        case "default":
            return RopeConfig("default", theta)
        case "linear":
            return RopeConfig("linear", theta, section.number("factor"))
        case "llama3":
            low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
            if low >= high:
                raise section.error("high_freq_factor", f"must be above low_freq_factor ({low})")
            key = "original_max_position_embeddings"  # beside the section it goes first
            original = f.integer(key) if key in f.values else section.integer(key, max_positions)
            return RopeConfig("llama3", theta, section.number("factor"), low, high, original)
        case other:
            raise section.error(key, f"{other!r:.80} is not supported; supported: default, linear, llama3")


def _windows(f: _Fields, family: str, layers: int) -> tuple[int | None, ...]:
    match family:
        case "mistral":
            # Absent means the class's default; only an explicit null means none.
            if "sliding_window" in f.values and f.values["sliding_window"] is None:
                return (None,) * layers
            return (f.integer("sliding_window", 4096),) * layers
        case "qwen2" | "qwen3":
            if not f.flag("use_sliding_window") or f.values.get("sliding_window", 4096) is None:
                window = None
            else:
                window = f.integer("sliding_window", 4096)
            sliding_layers = _sliding_layers(f, layers)
            if window is None and f.values.get("layer_types") is not None and any(sliding_layers):
                raise f.error("layer_types", "sliding_attention without a window in use (use_sliding_window)")
            return tuple(window if sliding else None for sliding in sliding_layers)
        case _:
            return (None,) * layers


def _sliding_layers(f: _Fields, layers: int) -> list[bool]:
    kinds = f.values.get("layer_types")
    if kinds is None:
        first = f.integer("max_window_layers", 28, low=0)
        return [i >= first for i in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise f.error("layer_types", f"expected a list of {layers} names")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise f.error("layer_types", f"{kind!r:.80} is not supported")
    return [kind == "sliding_attention" for kind in kinds]


def _dtype(f: _Fields) -> ModelDtype:
    key = "dtype" if f.values.get("dtype") is not None else "torch_dtype"
    match f.values.get(key):
        case None | "float32":
            return "float32"
        case "bfloat16" | "float16":
            # float16 checkpoints run in bfloat16: their range fits, and no kernel of ours is float16.
            return "bfloat16"
        case other:
            raise f.error(key, f"{other!r:.80} is not supported; supported: float32, bfloat16, float16")


def _eos(f: _Fields, generation: Path, vocab: int) -> tuple[int, ...]:
    source = f
    if generation.exists():
        g = _Fields(generation, read_json(generation))
        if g.values.get("eos_token_id") is not None:
            source = g
    value = source.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise source.error("eos_token_id", f"expected token ids, found {value!r:.80}")
    # Random-weight test models keep their class's default ids, which may be outside a small vocabulary.
    return tuple(token for token in ids if token < vocab)
