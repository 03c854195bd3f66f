# cython: boundscheck=False, wraparound=False, cdivision=True
"""Thin binding of attention.c. Arguments that arrive as integers are addresses of C-contiguous storage that the
caller (kernels/cpu/__init__.py) has checked and keeps alive; the lock of the interpreter is released."""

from libc.stdint cimport int32_t, int64_t


cdef extern from "attention.h" nogil:
    int KF_NO_MEMORY, KF_BAD_BLOCK, KF_BAD_CONTEXT, KF_BAD_POSITION

    ctypedef struct kf_cache:
        void *base
        int64_t num_blocks, layers, kv_heads, block_size, head_dim
        int is_bf16

    ctypedef struct kf_step:
        const int64_t *positions
        const int64_t *slots
        const int32_t *cu_q
        const int32_t *context_lens
        const int32_t *tables
        int64_t tokens, rows, width

    int kf_attention(const kf_cache *kv, int64_t layer, const kf_step *step, const void *q, void *out,
                     int64_t heads, float scale, int64_t window)
    int kf_rope_write(const kf_cache *kv, int64_t layer, const kf_step *step, const void *qkv, int64_t stride,
                      const float *cos, const float *sin, int64_t table_rows, const void *q_norm,
                      const void *k_norm, float eps, int64_t heads, void *q)
    void kf_add_rms_norm(const void *x, void *residual, const void *weight, void *out, int64_t rows, int64_t n,
                         float eps, int is_bf16)
    void kf_silu_mul(const void *x, void *out, int64_t rows, int64_t n, int is_bf16)
    int kf_linear(const void *x, const void *w, const void *bias, void *out, int64_t rows, int64_t k, int64_t n,
                  int is_bf16)
    int kf_set_isa(int isa)


cdef int fail(int code) except -1:
    if code == KF_NO_MEMORY:
        raise MemoryError("no memory for the scratch space of a kernel")
    if code == KF_BAD_BLOCK:
        raise IndexError("a block or slot of this step is outside the KV cache")
    if code == KF_BAD_POSITION:
        raise IndexError("a position of this step is outside the rotary table")
    raise ValueError("layer, context lengths, cu_q and tables of this step do not fit together")


cdef class Cache:
    """The address and shape of a KV cache."""

    cdef kf_cache c

    def __cinit__(self, size_t base, int64_t num_blocks, int64_t layers, int64_t kv_heads, int64_t block_size,
                  int64_t head_dim, bint is_bf16):
        self.c.base = <void *>base
        self.c.num_blocks = num_blocks
        self.c.layers = layers
        self.c.kv_heads = kv_heads
        self.c.block_size = block_size
        self.c.head_dim = head_dim
        self.c.is_bf16 = is_bf16


cdef class Step:
    """The arrays of one step, checked for consistent lengths once for all layers."""

    cdef kf_step c
    cdef object keep

    def __cinit__(self, const int64_t[::1] positions, const int64_t[::1] slots, const int32_t[::1] cu_q,
                  const int32_t[::1] context_lens, const int32_t[:, ::1] tables):
        cdef Py_ssize_t rows = context_lens.shape[0], tokens = positions.shape[0]
        if slots.shape[0] != tokens or cu_q.shape[0] != rows + 1 or tables.shape[0] != rows:
            raise ValueError("the arrays of a step have different lengths")
        if cu_q[0] != 0 or cu_q[rows] != tokens:
            raise ValueError("cu_q must run from 0 to the number of tokens")
        self.keep = (positions, slots, cu_q, context_lens, tables)
        self.c.tokens = tokens
        self.c.rows = rows
        self.c.width = tables.shape[1]
        self.c.positions = &positions[0] if tokens else NULL
        self.c.slots = &slots[0] if tokens else NULL
        self.c.cu_q = &cu_q[0]
        self.c.context_lens = &context_lens[0] if rows else NULL
        self.c.tables = &tables[0, 0] if rows and tables.shape[1] else NULL


def attention(Cache kv, int64_t layer, Step step, size_t q, size_t out, int64_t heads, float scale, int64_t window):
    """softmax(scale q K) V over the paged cache; q and out: [tokens, heads, head_dim]."""
    cdef int code
    if heads <= 0 or heads % kv.c.kv_heads:
        raise ValueError("heads must be a multiple of kv_heads")
    with nogil:
        code = kf_attention(&kv.c, layer, &step.c, <void *>q, <void *>out, heads, scale, window)
    if code:
        fail(code)


def rope_write(Cache kv, int64_t layer, Step step, size_t qkv, int64_t stride, size_t cos, size_t sin,
               int64_t table_rows, size_t q_norm, size_t k_norm, float eps, int64_t heads, size_t q):
    """Splits, norms (0 = none), rotates; writes K and V into the cache and the queries to q."""
    cdef int code
    if heads <= 0 or stride < (heads + 2 * kv.c.kv_heads) * kv.c.head_dim:
        raise ValueError("qkv rows are shorter than its heads")
    with nogil:
        code = kf_rope_write(&kv.c, layer, &step.c, <void *>qkv, stride, <float *>cos, <float *>sin, table_rows,
                             <void *>q_norm, <void *>k_norm, eps, heads, <void *>q)
    if code:
        fail(code)


def add_rms_norm(size_t x, size_t residual, size_t weight, size_t out, int64_t rows, int64_t n, float eps,
                 bint is_bf16):
    """residual += x (unless x is 0); out = weight * rms_norm(residual) (unless out is 0)."""
    with nogil:
        kf_add_rms_norm(<void *>x, <void *>residual, <void *>weight, <void *>out, rows, n, eps, is_bf16)


def silu_mul(size_t x, size_t out, int64_t rows, int64_t n, bint is_bf16):
    """out[rows, n] = silu(x[:, :n]) * x[:, n:2n]"""
    with nogil:
        kf_silu_mul(<void *>x, <void *>out, rows, n, is_bf16)


def linear(size_t x, size_t w, size_t bias, size_t out, int64_t rows, int64_t k, int64_t n, bint is_bf16):
    """out[rows, n] = x[rows, k] W^T + bias (0 = none), W packed as [ceil(n / 16), k, 16]."""
    cdef int code
    with nogil:
        code = kf_linear(<void *>x, <void *>w, <void *>bias, <void *>out, rows, k, n, is_bf16)
    if code:
        fail(code)


def set_isa(int isa):
    """Limits the instruction set: 0 plain C, 1 AVX2, 2 AVX-512, -1 the best. Returns what is in use. For tests."""
    return kf_set_isa(isa)
