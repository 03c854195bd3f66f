"""config.json of a Hugging Face checkpoint, parsed once into an immutable value.

Llama, Mistral, Mixtral, Phi-3 (and 4), Qwen2, Qwen3, Qwen3-MoE and Gemma 3 (text). They are one architecture with a
few switches, and this is where the families end: nothing later asks for the family, except for the order in which GGUF
has some outputs. Defaults are those of transformers' config classes, because a saved config.json may leave out what
equals its class's default. Where two keys say one thing, the one that transformers takes counts; what it would take and
we cannot do is refused by name. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from controlplane.gguf.files import config_of
from controlplane.gguf.header import GgufError, is_gguf, read_header
from controlplane.positions import POSITIONS, positions_max
from dataplane.model.errors import ModelError
from dataplane.model.fields import Fields, read_json
from dataplane.model.mixtures import ExpertsConfig, read_experts
from dataplane.model.ropes import Layout, RopeConfig, read_gemma_ropes, read_rope
from dataplane.model.schemes import Scheme, scheme_of

ModelDtype = Literal["float32", "bfloat16"]


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
    float16: bool = False  # of the checkpoint: `dtype` is bfloat16 then
    fused: bool = False  # queries, keys and values are one tensor of the checkpoint, gates and ups another
    experts: ExpertsConfig | None = None
    local_rope: RopeConfig | None = None  # of layers with a window, where that is another one
    attention_scale: float | None = None  # None: head_dim ** -0.5
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_offset: bool = False  # the weights of norms are kept as one less, and norms round once
    norms_around: bool = False  # attention and MLP have a norm behind them as well
    scaled_embeddings: bool = False  # by the root of hidden_size
    logit_softcap: float = 0.0  # 0: none


FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "Phi3ForCausalLM": "phi3",
    "Gemma3ForCausalLM": "gemma3_text",
    "Gemma3ForConditionalGeneration": "gemma3_text",
}
# The configuration of the text is a section of that of a model for images too; the file's own model_type.
WITH_IMAGES = {"Gemma3ForConditionalGeneration": "gemma3"}
OF_THE_WHOLE = ("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings", "quantization_config")


# Of their classes, where config.json says nothing.
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32, "qwen3_moe": 4, "mixtral": 8, "gemma3_text": 4}
HEAD_DIMS = {"qwen3": 128, "gemma3_text": 256}
MAX_POSITIONS = {
    "llama": 2048, "mistral": 4096 * 32, "qwen2": 32768, "qwen3": 32768, "qwen3_moe": 32768,
    "mixtral": 4096 * 32, "phi3": 4096, "gemma3_text": 131072,
}  # fmt: skip
NORM_EPS = {"phi3": 1e-5, "mixtral": 1e-5}

BIAS_BY_FLAG = (
    "llama",
    "qwen3",
    "qwen3_moe",
    "gemma3_text",
)  # attention_bias counts for all four projections
HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3_text")


def _values(model: Path) -> tuple[Path, dict[str, Any]]:
    """Of config.json, or what a GGUF file says in its place."""
    if not is_gguf(model):
        return model / "config.json", read_json(model / "config.json")
    try:
        return model, config_of(model, read_header(model))
    except (GgufError, OSError) as error:
        raise ModelError(model, None, str(error)) from error


def load_config(model_dir: Path, context_max: int = 0) -> ModelConfig:
    """Reads config.json (and the end tokens of generation_config.json), or a GGUF file. context_max: of the longest
    context that is to be served (0: as long as the model takes), by which longrope chooses its frequencies. Raises
    ModelError."""
    path, values = _values(model_dir)
    f = _of_text(Fields(path, values))
    family = _family(f)
    gemma = family == "gemma3_text"
    layers = f.integer("num_hidden_layers", high=4096)
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads", 8 if gemma else None)
    # Absent means the class's default, null as many as there are attention heads.
    kv_default = heads if "num_key_value_heads" in f.values else KV_HEADS.get(family, heads)
    kv_heads = f.integer("num_key_value_heads", kv_default)
    if family in HEAD_DIMS and f.values.get("head_dim", 128) is None:
        raise f.error("head_dim", "expected an integer, found null")
    head_dim = f.integer("head_dim", HEAD_DIMS.get(family, max(hidden // heads, 1)))
    if heads % kv_heads:
        raise f.error("num_key_value_heads", f"{heads} attention heads are no multiple of {kv_heads}")
    if head_dim % 2 or head_dim > 512:
        raise f.error("head_dim", f"must be even and at most 512, found {head_dim}")
    vocab, bias = f.integer("vocab_size", 262208 if gemma else None), f.flag("attention_bias")
    intermediate = f.integer("intermediate_size")
    positions = f.integer(POSITIONS, MAX_POSITIONS[family])
    layout = Layout(family, head_dim, positions, context_max)
    rope, local_rope = read_gemma_ropes(f, layout) if gemma else (read_rope(f, layout), None)
    experts = read_experts(f, family, layers)
    inputs = [hidden, heads * head_dim, intermediate]
    outputs = [hidden, heads * head_dim, kv_heads * head_dim, intermediate]
    if experts:
        inputs.append(experts.intermediate)
        outputs.append(experts.intermediate)
    return ModelConfig(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=positions_max(f.values, positions) or positions,
        rms_norm_eps=f.number("rms_norm_eps", NORM_EPS.get(family, 1e-6)),
        rope=rope,
        tie_embeddings=f.flag("tie_word_embeddings", gemma),
        qkv_bias=family == "qwen2" or (family in BIAS_BY_FLAG and bias),
        o_bias=family in BIAS_BY_FLAG and bias,
        mlp_bias=family == "llama" and f.flag("mlp_bias"),
        qk_norm=family in HEAD_NORMS,
        fused=family == "phi3",
        experts=experts,
        local_rope=local_rope,
        attention_scale=f.number("query_pre_attn_scalar", 256) ** -0.5 if gemma else head_dim**-0.5,
        activation="gelu_tanh" if gemma else "silu",
        norm_offset=gemma,
        norms_around=gemma,
        scaled_embeddings=gemma,
        logit_softcap=f.optional("final_logit_softcapping") or 0.0 if gemma else 0.0,
        windows=_windows(f, family, layers),
        dtype=_dtype(f),
        float16=_stored_dtype(f)[1] == "float16",
        eos_token_ids=_eos(f, model_dir / "generation_config.json", vocab),
        scheme=_scheme(f, inputs, outputs),
    )


def _of_text(f: Fields) -> Fields:
    """The configuration of a model's text. Raises ModelError."""
    names = f.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in WITH_IMAGES:
        return f
    if f.values.get("model_type", WITH_IMAGES[names[0]]) != WITH_IMAGES[names[0]]:
        found = f.values["model_type"]
        raise f.error("model_type", f"{found!r:.80} does not fit the architecture {names[0]}")
    text = f.section("text_config")
    if text is None:
        raise f.error("text_config", "expected an object, found null")
    around = {key: f.values[key] for key in OF_THE_WHOLE if f.values.get(key) is not None}
    return Fields(f.path, {**text.values, **around, "architectures": names}, text.prefix)


def _family(f: Fields) -> str:
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
    if family == "gemma3_text":
        _only_of_gemma(f)
    elif f.values.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise f.error("hidden_act", f"only silu is supported, found {f.values['hidden_act']!r:.80}")
    return family


def _only_of_gemma(f: Fields) -> None:
    wanted = "gelu_pytorch_tanh"
    found = f.values.get("hidden_activation", wanted)
    if found != wanted:
        raise f.error("hidden_activation", f"only {wanted} is supported, found {found!r:.80}")
    if f.values.get("attn_logit_softcapping") is not None:
        raise f.error("attn_logit_softcapping", "is not supported: transformers does not apply it either")
    if f.values.get("use_bidirectional_attention"):
        raise f.error(
            "use_bidirectional_attention", "is not supported: a token's KV would depend on later ones"
        )


def _scheme(f: Fields, inputs: Sequence[int], outputs: Sequence[int]) -> Scheme | None:
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


def _windows(f: Fields, family: str, layers: int) -> tuple[int | None, ...]:
    match family:
        case "phi3" | "mixtral":
            if f.values.get("sliding_window") is None:
                return (None,) * layers
            return (f.integer("sliding_window"),) * layers
        case "qwen3_moe":  # all layers, or none
            return (_window(f) if f.flag("use_sliding_window") else None,) * layers
        case "gemma3_text":
            window, sliding_layers = _window(f), _gemma_sliding_layers(f, layers)
            if window is None and any(sliding_layers):
                raise f.error("sliding_window", "expected an integer, found null: some layers have a window")
            return tuple(window if sliding else None for sliding in sliding_layers)
        case "mistral":
            return (_window(f),) * layers
        case "qwen2" | "qwen3":
            window = _window(f) if f.flag("use_sliding_window") else None
            sliding_layers = _sliding_layers(f, layers)
            if window is None and f.values.get("layer_types") is not None and any(sliding_layers):
                raise f.error("layer_types", "sliding_attention without a window in use (use_sliding_window)")
            return tuple(window if sliding else None for sliding in sliding_layers)
        case _:
            return (None,) * layers


def _window(f: Fields) -> int | None:
    """Absent means the classes' default; only an explicit null means none."""
    return None if f.values.get("sliding_window", 4096) is None else f.integer("sliding_window", 4096)


def _sliding_layers(f: Fields, layers: int) -> list[bool]:
    if f.values.get("layer_types") is None:
        first = f.integer("max_window_layers", 28, low=0)
        return [i >= first for i in range(layers)]
    return _layer_types(f, layers)


def _gemma_sliding_layers(f: Fields, layers: int) -> list[bool]:
    if f.values.get("layer_types") is None:
        pattern = f.integer("sliding_window_pattern", 6)
        return [(i + 1) % pattern != 0 for i in range(layers)]
    return _layer_types(f, layers)


def _layer_types(f: Fields, layers: int) -> list[bool]:
    """Whether each layer has a window."""
    kinds = f.values["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise f.error("layer_types", f"expected a list of {layers} names")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise f.error("layer_types", f"{kind!r:.80} is not supported")
    return [kind == "sliding_attention" for kind in kinds]


def _stored_dtype(f: Fields) -> tuple[str, Any]:
    key = "dtype" if f.values.get("dtype") is not None else "torch_dtype"
    return key, f.values.get(key)


def _dtype(f: Fields) -> ModelDtype:
    key, stored = _stored_dtype(f)
    match stored:
        case None | "float32":
            return "float32"
        case "bfloat16" | "float16":
            # float16 checkpoints run in bfloat16: their range fits, and no kernel of ours is float16.
            return "bfloat16"
        case other:
            raise f.error(key, f"{other!r:.80} is not supported; supported: float32, bfloat16, float16")


def _eos(f: Fields, generation: Path, vocab: int) -> tuple[int, ...]:
    source = f
    if generation.exists():
        g = Fields(generation, read_json(generation))
        if g.values.get("eos_token_id") is not None:
            source = g
    value = source.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise source.error("eos_token_id", f"expected token ids, found {value!r:.80}")
    # Random-weight test models keep their class's default ids, which may be outside a small vocabulary.
    return tuple(token for token in ids if token < vocab)
