"""Compiles what a stage launches, without a GPU: python -m tests.gpu.compile_kernels CAPABILITY DTYPE

Runs the launchers on CPU tensors; in place of each launch the kernel is compiled for the given architecture, down to
machine code. Prints one JSON object for each distinct kernel, with the phases ("prefill", "decode") that use it."""

import json
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dataplane._fast.blocktable import BlockTable
from dataplane.model.ropes import RopeConfig
from dataplane.model.rotary import RotaryTable
from kernels.base import DTYPES, Experts, Head, Layer, Linear, Mlp, StageSpec
from kernels.cuda.cache import DeviceCache
from kernels.cuda.coding import make_device_code
from kernels.cuda.stage import CudaStage
from kernels.cuda.transfer import BlockTransfer

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64"}
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB = 4096, 32, 8, 128, 14336, 32000


class Compiler:
    """Takes the place of launching."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        self.phase = ""
        self.found: dict[str, dict[str, Any]] = {}

    def run(self, function: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(function.arg_names, args, strict=False))
        constants = {name: kwargs.pop(name) for name in function.arg_names if name in kwargs}
        signature = {
            name: TYPES[v.dtype] if isinstance(v, torch.Tensor) else "i32" for name, v in values.items()
        }
        for parameter in function.params:
            assert (
                parameter.is_constexpr or parameter.do_not_specialize or signature[parameter.name] != "i32"
            ), f"{function.__name__} is compiled anew for values of {parameter.name}"
        key = f"{function.__name__} {signature} {constants} {kwargs}"
        if key not in self.found:
            aligned: dict[Any, Any] = {}
            for i, value in enumerate(args):
                if isinstance(value, torch.Tensor):
                    assert value.data_ptr() % 16 == 0, "another alignment would be another kernel"
                    aligned[i,] = [["tt.divisibility", 16]]
            signature |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(function, signature, constants, aligned)
            built = triton.compile(source, target=self.target, options=kwargs)
            self.found[key] = {
                "name": function.__name__, "phases": [], "shared_bytes": built.metadata.shared,
                "machine_code_bytes": len(built.asm["cubin"]), "ptx": built.asm["ptx"],
            }  # fmt: skip
        if self.phase not in self.found[key]["phases"]:
            self.found[key]["phases"].append(self.phase)


def stage(dtype: Any) -> CudaStage:
    """Layers of an 8B model: a plain one, one with every option, a mixture; weights are never read."""
    kind = DTYPES[dtype]

    def linear(n: int, k: int, bias: bool) -> Linear:
        return Linear(torch.empty(n, k, dtype=kind), torch.empty(n, dtype=kind) if bias else None)

    qkv = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    hidden, head = torch.empty(HIDDEN), torch.empty(HEAD_DIM)
    layers = tuple(
        Layer(
            hidden, linear(qkv, HIDDEN, options), head if options else None, head if options else None,
            linear(HIDDEN, HEADS * HEAD_DIM, options), hidden,
            Mlp(linear(2 * FFN, HIDDEN, options), linear(HIDDEN, FFN, options)), 1000 if options else None,
            hidden if options else None, hidden if options else None, int(options),
        )
        for options in (False, True)
    )  # fmt: skip
    experts = tuple(Mlp(linear(2 * 768, HIDDEN, False), linear(HIDDEN, 768, False)) for _ in range(16))
    mixture = Experts(torch.empty(16, HIDDEN, dtype=kind), experts, 4, True)
    layers += (replace(layers[0], mlp=mixture),)
    rotary = tuple(
        RotaryTable(RopeConfig("default", 10000.0, part=part), HEAD_DIM, 4096) for part in (1.0, 0.75)
    )
    output = Head(hidden, torch.empty(VOCAB, HIDDEN, dtype=kind))
    spec = StageSpec(HIDDEN, FFN, HEADS, 1e-6, rotary, layers, torch.empty(VOCAB, HIDDEN, dtype=kind), output)
    return CudaStage(spec, DeviceCache(256, 3, KV_HEADS, 16, HEAD_DIM, dtype, "cpu"), 128)


def code() -> None:
    """Every kernel of the erasure codes, over whole words and over single bytes."""
    for size in (1024, 1023):
        shards = [torch.empty(size, dtype=torch.uint8) for _ in range(4)]
        for name, parity in (("xor", 1), ("rdp", 2), ("rs", 3)):
            built = make_device_code(name, 4, parity)
            checks = [torch.empty(built.parity_bytes(size), dtype=torch.uint8) for _ in range(parity)]
            built.encode(shards, checks)
            built.update(checks, 1, shards[1])
            built.decode(shards, checks, range(parity))


def main() -> None:
    compiler = Compiler(int(sys.argv[1]))
    JITFunction.run = lambda self, *args, **kwargs: compiler.run(self, *args, **kwargs)  # type: ignore[assignment]
    built = stage(sys.argv[2])
    table = BlockTable(4, 128, 16)
    rows = np.array([table.new_row() for _ in range(3)], np.int32)
    for row in rows:
        table.extend(int(row), range(int(row) * 70, int(row) * 70 + 70))
    for phase, starts, counts in [("prefill", [0, 500, 7], [64, 33, 1]), ("decode", [64, 533, 8], [1, 1, 1])]:
        compiler.phase = phase
        step = table.fill(rows, np.array(starts, np.int32), np.array(counts, np.int32))
        built.forward(np.zeros(step.num_tokens, np.int64), step, np.arange(len(counts), dtype=np.int32))
    compiler.phase = "wire"
    transfer = BlockTransfer(built.kv)
    data, _ = transfer.gather([2])
    transfer.sums_of(data)
    transfer.scatter([3], data, [0])
    compiler.phase = "coding"
    code()
    for kernel in compiler.found.values():
        print(json.dumps(kernel))


if __name__ == "__main__":
    main()
