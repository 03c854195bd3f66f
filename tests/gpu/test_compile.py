"""All kernels compile for GPUs of today (no GPU is needed for it), and prefill and decode run the same machine code."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install 'kevlarflow[gpu]')")

SHARED_BYTES = {
    80: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
}  # what one program may have; 80: also for 86 and 89
PRODUCTS = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}  # the tensor cores' instructions


@pytest.mark.parametrize(
    ("capability", "dtype"), [(80, "bfloat16"), (90, "bfloat16"), (90, "float32"), (100, "bfloat16")]
)
def test_kernels_compile(capability: int, dtype: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu.compile_kernels", str(capability), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["name"] for k in kernels} == {
        "_attend", "_merge", "_linear", "_add_rms_norm", "_gated_mul", "_rope_write", "_copy_blocks", "_sum_blocks",
        "_route", "_expert_linear", "_add_pairs", "_combine", "_lines", "_walk",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], kernel["name"]
        assert kernel["machine_code_bytes"] > 0
        # Equal bits: whatever one of them runs, the other runs, too.
        assert kernel["phases"] in (["prefill", "decode"], ["wire"], ["coding"]), kernel["name"]
    products = [k["ptx"] for k in kernels if k["name"] in ("_linear", "_attend")]
    for ptx in products:
        assert "tf32" not in ptx
        if dtype == "float32":
            assert "mma" not in ptx
            assert "fma.rn.f32" in ptx
        else:
            assert PRODUCTS[capability] in ptx
