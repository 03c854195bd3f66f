# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""What all Triton kernels share."""

import torch
import triton
import triton.language as tl

# The interpreter runs kernels on CPU tensors with numpy. Its own product would multiply the 16 bits of a bfloat16 as
# integers, and calls a BLAS whose bits depend on where in a tile a row is; no tensor core does either.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32: tensor cores for bfloat16, IEEE multiply-adds (no TF32) for float32."""
    if _INTERPRETED:
        return acc + tl.sum(a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :], 1)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


# Products and sums are not fused behind our back: what is fused is written so, and the same on every compiler version.
OPTIONS = {"enable_fp_fusion": False}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, low: int = 1) -> int:
    """The least power of two that is at least n and low."""
    return max(low, 1 << (n - 1).bit_length())


def check(rows: int, dtype: torch.dtype, *tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless each is contiguous, of that dtype and has at least `rows` rows."""
    for t in tensors:
        if t is not None and (t.dtype is not dtype or not t.is_contiguous() or t.shape[0] < rows):
            raise ValueError(
                f"expected contiguous {dtype} with at least {rows} rows, got {t.dtype} {tuple(t.shape)}"
            )
