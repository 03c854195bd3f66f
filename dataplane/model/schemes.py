"""How a checkpoint's weights are quantised: what its `quantization_config` says, and which tensors stand for a weight.

All are of four or eight bits with a scale for each `group` inputs (0: for all of an output):

gptq                `qweight` int32 [k / 8, n], eight inputs in one; `qzeros` int32 [groups, n / 8];
                    `scales` [groups, n]; `g_idx` int32 [k], the group of each input
awq                 `qweight` int32 [k, n / 8], eight outputs in one in the order of AWQ_ORDER; `qzeros` and `scales`
                    as gptq
compressed-tensors  `weight_packed` int32 [n, k / 8]; `weight_scale` [n, groups]; where it is asymmetric
                    `weight_zero_point` int32 [n / 8, groups]; of eight bits `weight` int8 [n, k]
gguf                the weight's own name with the type of its blocks behind it, uint8 [n, bytes of a row]

Needs no torch: a node of the oracle executor reads configurations as well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Method = Literal["gptq", "awq", "compressed-tensors", "gguf"]
Shapes = dict[str, tuple[int, ...]]

PER_WORD = 8  # values of four bits in one of 32
GROUP_UNIT = 32  # inputs: groups that are no multiple have no kernel
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that is in the lowest four bits, the next ones


@dataclass(frozen=True, slots=True)
class Scheme:
    """`one_less`: zero points are kept as one less. `skipped`: names, or parts of them, of what is not quantised."""

    method: Method
    bits: int = 4
    group: int = 0
    symmetric: bool = False
    one_less: bool = False
    skipped: tuple[str, ...] = ()

    def skips(self, name: str) -> bool:
        """Whether the weight of this name is dense."""
        modules = f".{name.removesuffix('.weight')}."
        return any(f".{part.strip('.')}." in modules for part in self.skipped)

    def shapes(self, name: str, n: int, k: int) -> Shapes:
        """The tensors that stand for the weight `name` [n, k] of a layer."""
        base = name.removesuffix(".weight")
        if self.method == "gguf" or self.skips(name):
            return {name: (n, k)}
        groups = 1 if not self.group else k // self.group
        match self.method:
            case "gptq" | "awq":
                packed = (k // PER_WORD, n) if self.method == "gptq" else (k, n // PER_WORD)
                shapes: Shapes = {
                    f"{base}.qweight": packed,
                    f"{base}.qzeros": (groups, n // PER_WORD),
                    f"{base}.scales": (groups, n),
                }
                return shapes | ({f"{base}.g_idx": (k,)} if self.method == "gptq" else {})
            case _:
                if self.bits == 8:
                    return {name: (n, k), f"{base}.weight_scale": (n, groups)}
                shapes = {f"{base}.weight_packed": (n, k // PER_WORD), f"{base}.weight_scale": (n, groups)}
                zeros = {} if self.symmetric else {f"{base}.weight_zero_point": (-(-n // PER_WORD), groups)}
                return shapes | zeros

    def fault(self, inputs: Iterable[int], outputs: Iterable[int]) -> str | None:
        """Why weights of these sizes cannot be kept like this; None if they can."""
        if self.method == "gguf":
            return None
        unit = self.group or (1 if self.bits == 8 else PER_WORD)
        if wrong := [k for k in inputs if k % unit]:
            return f"{wrong[0]} inputs are no multiple of {unit}"
        if self.method in ("gptq", "awq") and (wrong := [n for n in outputs if n % PER_WORD]):
            return f"{wrong[0]} outputs are no multiple of {PER_WORD}"
        return None


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """Of a `quantization_config`. Raises ValueError naming what is not supported."""
    method = config.get("quant_method")
    match method:
        case "gguf":
            return Scheme("gguf")
        case "gptq":
            kind = config.get("checkpoint_format", "gptq")
            _only("checkpoint_format", kind, "gptq", "gptq_v2")
            _only("bits", config.get("bits"), 4)
            group = _group(config.get("group_size"))
            return Scheme("gptq", 4, group, one_less=kind == "gptq", skipped=_names(config))
        case "awq":
            _only("bits", config.get("bits", config.get("w_bit")), 4)
            _only("version", str(config.get("version", "gemm")).lower(), "gemm")
            _only("zero_point", config.get("zero_point", True), True)
            group = _group(config.get("group_size", config.get("q_group_size")))
            return Scheme("awq", 4, group, skipped=_names(config))
        case "compressed-tensors":
            return _compressed(config)
        case _:
            raise ValueError(
                f"quant_method {method!r:.80} is not supported; supported: gptq, awq, compressed-tensors"
            )


def _compressed(config: Mapping[str, Any]) -> Scheme:
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise ValueError("config_groups: only one group is supported")
    (group,) = groups.values()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise ValueError("config_groups: expected settings of weights")
    _only("targets", group.get("targets"), ["Linear"])
    kind = group.get("format") or config.get("format")
    _only("kv_cache_scheme", config.get("kv_cache_scheme"), None)
    _only("weights.type", weights.get("type", "int"), "int")
    _only("weights.num_bits", weights.get("num_bits"), 4, 8)
    bits: int = weights["num_bits"]
    _only("format", kind, *(("pack-quantized",) if bits == 4 else ("int-quantized", "naive-quantized")))
    strategy = weights.get("strategy")
    _only("weights.strategy", strategy, "group", "channel")
    _only("weights.actorder", weights.get("actorder"), None, "weight", "static", False)
    symmetric = weights.get("symmetric", True)
    if bits == 8:
        _only("weights.symmetric with eight bits", symmetric, True)
        _only("weights.strategy with eight bits", strategy, "channel")
    size = _group(weights.get("group_size")) if strategy == "group" else 0
    return Scheme("compressed-tensors", bits, size, bool(symmetric), skipped=_names(config))


def _only(key: str, value: Any, *allowed: Any) -> None:
    if value not in allowed:
        names = ", ".join(repr(one) for one in allowed)
        raise ValueError(f"{key} {value!r:.80} is not supported; supported: {names}")


def _group(value: Any) -> int:
    if value == -1:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value % GROUP_UNIT:
        raise ValueError(f"group_size {value!r:.80} is not supported: a multiple of {GROUP_UNIT}, or -1")
    return value


def _names(config: Mapping[str, Any]) -> tuple[str, ...]:
    for key in ("modules_to_not_convert", "ignore"):
        if names := config.get(key):
            if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                raise ValueError(f"{key}: expected names")
            if any(name.startswith("re:") for name in names):
                raise ValueError(f"{key}: regular expressions are not supported")
            return tuple(names)
    return ()
