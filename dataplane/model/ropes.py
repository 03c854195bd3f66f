"""Which rotary embedding config.json asks for. The rules of precedence are those of transformers. Needs no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from controlplane.positions import ORIGINAL, PARTIAL
from dataplane.model.fields import Fields

Kind = Literal["default", "linear", "llama3", "yarn", "dynamic", "longrope"]

THETAS = {"mixtral": 1000000.0}  # of their classes, where config.json says nothing


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `part`: of a head's values, from its first on, that are rotated; the others stay as they are.
    attention_factor: what sines and cosines are multiplied by. original_max_positions: what the model was trained with
    before it was stretched. Where a kind has no use for a value, it is as here."""

    kind: Kind
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    part: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()  # longrope: of each frequency, those of short or those of long contexts

    def rotated(self, head_dim: int) -> int:
        """How many values of a head are rotated."""
        return int(head_dim * self.part)


@dataclass(frozen=True, slots=True)
class Layout:
    """Of the model. positions: max_position_embeddings. context_max: of the longest context that is to be served, 0: as
    long as there are positions."""

    family: str
    head_dim: int
    positions: int
    context_max: int = 0


def read_rope(f: Fields, model: Layout) -> RopeConfig:
    """The one rotary embedding of all layers. Raises ModelError."""
    # rope_parameters is the form of transformers 5; rope_scaling, with rope_theta beside it, the older one. With both
    # it takes the older one whole, and nothing of the other; an empty one is none.
    sections = [
        s for key in ("rope_scaling", "rope_parameters") if (s := f.section(key)) is not None and s.values
    ]
    section = sections[0] if sections else Fields(f.path, {}, "rope_parameters.")
    for name, value in section.values.items():
        if isinstance(value, dict):
            raise section.error(name, "rotary parameters for each type of layer are not supported")
    if section.values.get("rope_theta", 0.0) is None:
        raise section.error("rope_theta", "expected a positive number, found null")
    theta = section.number("rope_theta", f.number("rope_theta", THETAS.get(model.family, 10000.0)))
    part = section.number(PARTIAL, f.number(PARTIAL, 1.0))
    if model.family != "phi3":
        for fields in (f, section):
            if fields.number(PARTIAL, 1.0) != 1.0:
                raise fields.error(PARTIAL, f"only 1.0 is supported in the family {model.family}")
    dims = int(model.head_dim * part)
    if part > 1.0 or dims < 2 or dims % 2:
        raise section.error(PARTIAL, f"{dims} of a head's {model.head_dim} values cannot be rotated")
    return read_kind(f, section, model, theta, part)


def read_gemma_ropes(f: Fields, model: Layout) -> tuple[RopeConfig, RopeConfig]:
    """Of layers that see everything, and of those with a window. Raises ModelError."""
    both = f.section("rope_parameters") or Fields(f.path, {}, "rope_parameters.")
    names = ("full_attention", "sliding_attention")
    if unknown := [name for name in both.values if name not in names]:
        raise both.error(unknown[0], f"expected {' and '.join(names)}")
    made = []
    for name, theta_key, theta in zip(names, ("rope_theta", "rope_local_base_freq"), (1e6, 1e4), strict=True):
        section = both.section(name) or Fields(f.path, {}, f"rope_parameters.{name}.")
        older = f.section("rope_scaling") if name == "full_attention" else None
        if older is not None:
            if both.values and not section.values:
                raise f.error("rope_scaling", "rope_parameters beside it say nothing of full_attention")
            # Of `rope_type` and its oldest name, `type`, transformers takes the first, whichever section has it.
            said, oldest = section.values.get("rope_type"), older.values.get("type")
            if said and oldest and said != oldest and "rope_type" not in older.values:
                raise older.error("type", f"rope_parameters.{name} beside it says {said!r:.80}")
            section = Fields(f.path, {**section.values, **older.values}, older.prefix)
        for fields in (f, section):
            if fields.number(PARTIAL, 1.0) != 1.0:
                raise fields.error(PARTIAL, f"only 1.0 is supported in the family {model.family}")
        made.append(read_kind(f, section, model, section.number("rope_theta", f.number(theta_key, theta))))
    return made[0], made[1]


def read_kind(f: Fields, section: Fields, model: Layout, theta: float, part: float = 1.0) -> RopeConfig:
    """What one section of rotary parameters asks for. Raises ModelError."""
    key = "rope_type" if "rope_type" in section.values else "type"
    kind = section.values.get(key, "default")
    if model.family == "phi3":
        kind = "longrope" if kind in ("su", "yarn") else kind  # older names
        if kind not in ("default", "longrope"):
            raise section.error(key, f"{kind!r:.80} is not supported in phi3; supported: default, longrope")
    match kind:
        case "default":
            return RopeConfig("default", theta, part=part)
        case "linear":
            return RopeConfig("linear", theta, section.number("factor"))
        case "llama3":
            low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
            if low >= high:
                raise section.error("high_freq_factor", f"must be above low_freq_factor ({low})")
            original = _original(f, section, model)
            return RopeConfig("llama3", theta, section.number("factor"), low, high, original)
        case "dynamic":
            if model.head_dim < 4:
                raise section.error(key, "dynamic needs heads of at least 4 values")
            return RopeConfig(
                "dynamic", theta, section.number("factor"), original_max_positions=model.positions
            )
        case "yarn":
            return _yarn(f, section, model, theta)
        case "longrope":
            return _longrope(f, section, model, theta, part)
        case other:
            kinds = "default, linear, dynamic, yarn, longrope, llama3"
            raise section.error(key, f"{other!r:.80} is not supported; supported: {kinds}")


def _original(f: Fields, section: Fields, model: Layout) -> int:
    if model.family == "phi3":
        return f.integer(ORIGINAL, 4096)
    if ORIGINAL in f.values and model.family != "gemma3_text":
        return f.integer(ORIGINAL)  # beside the section it goes first
    return section.integer(ORIGINAL, model.positions)


def _yarn(f: Fields, section: Fields, model: Layout, theta: float) -> RopeConfig:
    """Peng et al., YaRN (2309.00071), with what checkpoints have added to it."""
    if theta == 1.0:
        raise section.error("rope_theta", "1 has no frequencies to stretch")
    original = _original(f, section, model)
    factor = model.positions / original if "factor" in section.values else None
    factor = section.number("factor", factor)
    attention = section.optional("attention_factor")
    if attention is None:
        scale, all_scale = section.optional("mscale"), section.optional("mscale_all_dim")
        attention = _mscale(factor, 1.0)
        if scale and all_scale:
            attention = _mscale(factor, scale) / _mscale(factor, all_scale)
    return RopeConfig(
        "yarn",
        theta,
        factor,
        original_max_positions=original,
        attention_factor=attention,
        beta_fast=section.optional("beta_fast") or 32.0,
        beta_slow=section.optional("beta_slow") or 1.0,
        truncate=section.flag("truncate", True),
    )


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(f: Fields, section: Fields, model: Layout, theta: float, part: float) -> RopeConfig:
    """Ding et al., LongRoPE (2402.13753). Which factors count is decided once, by the longest context that is served:
    KV of a position may not depend on how long its sequence is going to be."""
    original = _original(f, section, model)
    factor = section.optional("factor") or model.positions / original
    attention = section.optional("attention_factor")
    if attention is None:
        if original < 2:
            raise f.error(ORIGINAL, f"must be at least 2, found {original}")
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    count = int(model.head_dim * part) // 2
    short, long = section.numbers("short_factor", count), section.numbers("long_factor", count)
    served = min(model.positions, model.context_max or model.positions)
    return RopeConfig(
        "longrope",
        theta,
        factor,
        original_max_positions=original,
        part=part,
        attention_factor=attention,
        factors=long if served > original else short,
    )
