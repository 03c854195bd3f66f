# cython: boundscheck=False, wraparound=False, cdivision=True
"""Thin binding of kernels.h. Arguments that arrive as integers are addresses of C-contiguous storage that the
caller (kernels/cpu/) has checked and keeps alive; the lock of the interpreter is released."""

import numpy as np

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free


cdef extern from "kernels.h" nogil:
    int KF_EXPERTS_MAX, KF_TABLES
    int KF_NO_MEMORY, KF_BAD_BLOCK, KF_BAD_CONTEXT, KF_BAD_POSITION, KF_BAD_TOKEN, KF_BAD_ROW
    ctypedef enum kf_epilogue:
        KF_STORE, KF_ADD, KF_SILU_MUL, KF_FLOAT, KF_GELU_MUL
    ctypedef struct kf_cache:
        void *base
        int64_t num_blocks, layers, kv_heads, block_size, head_dim
        int is_bf16
        const int32_t *planes
        int64_t plane_size, to_values, to_block
    ctypedef struct kf_step:
        const int64_t *positions
        const int64_t *slots
        const int32_t *cu_q
        const int32_t *context_lens
        const int32_t *tables
        int64_t tokens, rows, width
    ctypedef struct kf_attention_args:
        const kf_cache *kv
        const kf_step *step
        int64_t layer, heads, window
        float scale
        const void *q
        void *out
    ctypedef struct kf_rope_args:
        const kf_cache *kv
        const kf_step *step
        int64_t layer, heads, stride, rotated
        const float *cos
        const float *sin
        const float *q_norm
        const float *k_norm
        float eps
        int wide
        const void *qkv
        void *q
    ctypedef struct kf_norm_args:
        const void *x
        const float *weight
        void *out
        int64_t rows, n
        float eps
        int wide, add
    ctypedef enum kf_format:
        KF_DENSE, KF_INT8_ROW, KF_INT8_F16, KF_INT4_F16, KF_INT4_F16_MIN, KF_INT4_F32_MIN, KF_INT4_K
    ctypedef struct kf_weight:
        const void *w
        const void *bias
        kf_format format
        int64_t span
    ctypedef struct kf_cut:
        const int64_t *ends
        int64_t shards
    ctypedef struct kf_sum:
        kf_cut cut
        float limit
        int64_t *totals
        const int32_t *places
        int add
    ctypedef struct kf_linear_args:
        const void *x
        kf_weight w
        void *out
        void *prepared
        int64_t rows, k, n
        kf_epilogue epilogue
        int64_t first_panel
        const kf_sum *sum
    ctypedef struct kf_experts:
        kf_weight router
        const kf_weight *gate_up
        const kf_weight *down
        int64_t experts, chosen, intermediate
        int normalised
    ctypedef struct kf_layer:
        const float *attention_norm
        const float *mlp_norm
        const float *q_norm
        const float *k_norm
        const float *attention_out_norm
        const float *mlp_out_norm
        kf_weight qkv, o, gate_up, down
        const kf_experts *experts
        int64_t window, table
        kf_cut o_cut, down_cut
    ctypedef struct kf_routes:
        float *logits
        float *weights
        int32_t *expert
        int32_t *place
        int32_t *first
        void *gathered
        void *activated
        void *out
        void *prepared
    ctypedef struct kf_stage:
        const kf_layer *layers
        int64_t num_layers, hidden, intermediate, heads, vocab
        float eps, scale, embed_scale, softcap
        kf_epilogue gated
        int norm_wide
        const void *embed
        const float *norm
        kf_weight head
        int64_t head_rows
        const float *cos[2]
        const float *sin[2]
        int64_t table_rows, rotated
        void *residual
        void *normed
        void *qkv
        void *q
        void *attended
        void *activated
        void *picked
        void *prepared
        kf_routes routes
    ctypedef struct kf_io:
        const int64_t *tokens
        const void *hidden
        const int32_t *picked
        int64_t num_picked
        void *out
        int *nonfinite

    float KF_FIXED_LIMIT
    int kf_attention(kf_team *team, const kf_attention_args *a)
    int kf_rope_write(kf_team *team, const kf_rope_args *a, int64_t table_rows)
    void kf_rms_norm(kf_team *team, const kf_norm_args *a, int is_bf16)
    int kf_linear(kf_team *team, const kf_linear_args *a, int is_bf16)
    int kf_stage_forward(kf_team *team, const kf_stage *stage, const kf_cache *kv, const kf_step *step, const kf_io *io)
    int64_t kf_prepared_size(int64_t k)
    int64_t kf_panel_size(kf_format format, int64_t k, int64_t span)
    int kf_set_isa(int isa)
    int64_t kf_team_beats(const kf_team *team)
    int kf_isa()

cdef extern from "sums.h" nogil:
    int kf_sums_set_level(int level)

cdef extern from "exchange.h" nogil:
    ctypedef struct kf_exchange:
        pass

cdef extern from "rank.h" nogil:
    ctypedef struct kf_heads_layer:
        kf_weight qkv, o
    ctypedef struct kf_heads:
        const kf_heads_layer *layers
        kf_cache kv
        kf_cut cut
        int64_t heads
        void *normed
        void *qkv
        void *q
        void *attended
    ctypedef struct kf_rank:
        const kf_stage *stage
        kf_heads tensor_parallel, data_parallel
        const int64_t *intermediate
        const kf_cut *down_cuts
        float o_limit, down_limit
        kf_exchange *exchange
        int64_t timeout_ns
    int kf_rank_forward(kf_team *team, const kf_rank *rank, const kf_step *step, const kf_step *owned,
                        const int32_t *places, const kf_io *io, int *outcome)

cdef extern from *:
    const char *KF_SOURCES

SOURCES = KF_SOURCES.decode()  # digest of what this was built from: see setup.py
STORE, ADD, SILU_MUL, FLOAT, GELU_MUL = KF_STORE, KF_ADD, KF_SILU_MUL, KF_FLOAT, KF_GELU_MUL
EXPERTS_MAX, TABLES = KF_EXPERTS_MAX, KF_TABLES
DENSE, INT8_ROW, INT8_F16, INT4_F16 = KF_DENSE, KF_INT8_ROW, KF_INT8_F16, KF_INT4_F16
INT4_F16_MIN, INT4_F32_MIN, INT4_K = KF_INT4_F16_MIN, KF_INT4_F32_MIN, KF_INT4_K
kf_sums_set_level(-1)  # of this extension's copy


cdef int check(int code) except -1:
    if code == 0:
        return 0
    if code == KF_NO_MEMORY:
        raise MemoryError("no memory for the scratch space of a kernel")
    if code == KF_BAD_BLOCK:
        raise IndexError("a block or slot of this step is outside the KV cache")
    if code == KF_BAD_POSITION:
        raise IndexError("a position of this step is outside the rotary table")
    if code == KF_BAD_TOKEN:
        raise IndexError("a token of this step is outside the vocabulary")
    if code == KF_BAD_ROW:
        raise IndexError("logits are asked of a row that this step does not have")
    raise ValueError("layer, context lengths, cu_q and tables of this step do not fit together")


cdef kf_weight weight_of(place):
    """Of (address, address of the bias or 0, format, span)."""
    address, bias, format, span = place
    return kf_weight(<void *><size_t>address, <void *><size_t>bias, <kf_format><int>format, span)


cdef int check_ends(const int64_t[::1] ends, int64_t inputs, kf_weight weight) except -1:
    cdef int64_t before = 0
    if weight.format != KF_DENSE:
        raise ValueError("a quantised weight has no shards")
    if ends.shape[0] == 0:
        raise ValueError("a sum of no shards")
    for i in range(ends.shape[0]):
        if ends[i] <= before or ends[i] % 2:
            raise ValueError(f"shards cannot end at {np.asarray(ends).tolist()}")
        before = ends[i]
    if before != inputs:
        raise ValueError(f"shards of {before} inputs do not make up {inputs}")
    return 0


cdef class Team:
    """Threads that share one computation, the caller among them. Not usable in a forked child of its maker."""

    def __cinit__(self, int threads):
        self.c = kf_team_new(threads)
        if self.c == NULL:
            raise MemoryError(f"cannot start {threads} compute threads")

    def __dealloc__(self):
        if self.c != NULL:
            kf_team_free(self.c)

    @property
    def threads(self):
        return kf_team_threads(self.c)

    def beats(self):
        """Pieces of work done so far; -1 while no computation is under way. From any thread."""
        return kf_team_beats(self.c)

    cdef void *room(self, int64_t bytes) except NULL:
        """Scratch space of so many bytes for each thread, until somebody asks for more; the caller's is returned."""
        cdef void *scratch = kf_team_scratch(self.c, bytes)
        if scratch == NULL:
            raise MemoryError(f"no memory for {bytes} bytes of scratch space a thread")
        return scratch

    cdef void run(self, void (*fn)(kf_worker *, const void *) noexcept nogil, const void *arg) noexcept nogil:
        """On every thread, the caller among them. One run at a time."""
        kf_team_run(self.c, fn, arg)


cdef class Cache:
    """The address and shape of a KV cache."""

    cdef kf_cache c
    cdef object planes

    def __cinit__(self, size_t base, int64_t num_blocks, int64_t layers, int64_t kv_heads, int64_t block_size,
                  int64_t head_dim, bint is_bf16):
        self.c.base = <void *>base
        self.c.num_blocks = num_blocks
        self.c.layers = layers
        self.c.kv_heads = kv_heads
        self.c.block_size = block_size
        self.c.head_dim = head_dim
        self.c.is_bf16 = is_bf16
        self.c.to_values = kv_heads * block_size * head_dim
        self.c.to_block = layers * 2 * self.c.to_values

    def set_planes(self, const int32_t[:, ::1] planes, int64_t plane_size, int64_t to_values, int64_t to_block):
        """planes [layers, kv_heads]: see kf_cache."""
        if planes.shape[0] != self.c.layers or planes.shape[1] != self.c.kv_heads:
            raise ValueError(f"{planes.shape[0]} x {planes.shape[1]} planes for a cache of {self.c.layers} layers")
        self.planes = planes
        self.c.planes = &planes[0, 0]
        self.c.plane_size, self.c.to_values, self.c.to_block = plane_size, to_values, to_block


cdef class Step:
    """The arrays of one step, checked for consistent lengths once for all layers."""

    cdef kf_step c
    cdef object keep
    cdef readonly int64_t tokens
    cdef readonly int64_t context  # of the longest row

    def __cinit__(self, const int64_t[::1] positions, const int64_t[::1] slots, const int32_t[::1] cu_q,
                  const int32_t[::1] context_lens, const int32_t[:, ::1] tables):
        cdef Py_ssize_t rows = context_lens.shape[0], tokens = positions.shape[0]
        if slots.shape[0] != tokens or cu_q.shape[0] != rows + 1 or tables.shape[0] != rows:
            raise ValueError("the arrays of a step have different lengths")
        if cu_q[0] != 0 or cu_q[rows] != tokens:
            raise ValueError("cu_q must run from 0 to the number of tokens")
        self.keep = (positions, slots, cu_q, context_lens, tables)
        self.c.tokens = self.tokens = tokens
        self.c.rows = rows
        for i in range(rows):
            self.context = max(self.context, context_lens[i])
        self.c.width = tables.shape[1]
        self.c.positions = &positions[0] if tokens else NULL
        self.c.slots = &slots[0] if tokens else NULL
        self.c.cu_q = &cu_q[0]
        self.c.context_lens = &context_lens[0] if rows else NULL
        self.c.tables = &tables[0, 0] if rows and tables.shape[1] else NULL


cdef class Stage:
    """The layers of a stage: forward() runs them all over the buffers given to set_buffers()."""

    cdef kf_stage c
    cdef kf_layer *layers
    cdef kf_experts *experts  # of each layer that is a mixture
    cdef Team team
    cdef Cache kv

    def __cinit__(self, Team team, Cache kv, int64_t num_layers, int64_t hidden, int64_t intermediate, int64_t heads,
                  float eps, float scale):
        if heads <= 0 or heads % kv.c.kv_heads:
            raise ValueError("heads must be a multiple of kv_heads")
        self.layers = <kf_layer *>calloc(num_layers, sizeof(kf_layer))
        self.experts = <kf_experts *>calloc(num_layers, sizeof(kf_experts))
        if self.layers == NULL or self.experts == NULL:
            raise MemoryError("no memory for the addresses of the weights")
        self.team, self.kv = team, kv
        self.c.layers = self.layers
        self.c.num_layers = num_layers
        self.c.hidden = hidden
        self.c.intermediate = intermediate
        self.c.heads = heads
        self.c.eps = eps
        self.c.scale = scale
        self.c.embed_scale = 1.0
        self.c.gated = KF_SILU_MUL

    def __dealloc__(self):
        if self.experts != NULL:
            for i in range(self.c.num_layers):
                free(<void *>self.experts[i].gate_up)
                free(<void *>self.experts[i].down)
        free(self.experts)
        free(self.layers)

    def set_ways(self, bint gelu, bint norm_wide, float embed_scale, float softcap):
        """gelu: between gates and ups, else silu. norm_wide: norms round once. softcap 0: none."""
        self.c.gated = KF_GELU_MUL if gelu else KF_SILU_MUL
        self.c.norm_wide = norm_wide
        self.c.embed_scale = embed_scale
        self.c.softcap = softcap

    cdef kf_layer *layer(self, int64_t index) except NULL:
        if not 0 <= index < self.c.num_layers:
            raise IndexError(f"layer {index} is not one of {self.c.num_layers}")
        return &self.layers[index]

    def set_layer(self, int64_t index, norms, weights, int64_t window, int64_t table):
        """norms: addresses of float32 weights before attention and MLP, of queries and keys, and behind attention and
        MLP; 0: none. weights: (address, address of bias or 0, format, span) of qkv, o, gate_up and down, the last two
        None where set_experts() has them. window 0: all keys. table: of the rotary tables."""
        cdef kf_layer *layer = self.layer(index)
        cdef size_t at[6]
        if not 0 <= table < KF_TABLES:
            raise IndexError(f"rotary table {table} is not one of {KF_TABLES}")
        for i, norm in enumerate(norms):
            at[i] = norm
        layer.attention_norm, layer.mlp_norm = <float *>at[0], <float *>at[1]
        layer.q_norm, layer.k_norm = <float *>at[2], <float *>at[3]
        layer.attention_out_norm, layer.mlp_out_norm = <float *>at[4], <float *>at[5]
        qkv, o, gate_up, down = weights
        layer.qkv, layer.o = weight_of(qkv), weight_of(o)
        if gate_up is not None:
            layer.gate_up, layer.down = weight_of(gate_up), weight_of(down)
        layer.window = window
        layer.table = table

    def set_cuts(self, int64_t index, const int64_t[::1] o_ends, const int64_t[::1] down_ends):
        """The products o and down of a layer become sums over shards, which end there; kept alive by the caller."""
        cdef kf_layer *layer = self.layer(index)
        check_ends(o_ends, self.c.heads * self.kv.c.head_dim, layer.o)
        check_ends(down_ends, self.c.intermediate, layer.down)
        layer.o_cut = kf_cut(&o_ends[0], o_ends.shape[0])
        layer.down_cut = kf_cut(&down_ends[0], down_ends.shape[0])

    def set_experts(self, int64_t index, router, gate_ups, downs, int64_t chosen, int64_t intermediate,
                    bint normalised):
        """The weights, as those of set_layer(), of a layer that is a mixture of experts. Once for each layer."""
        cdef kf_layer *layer = self.layer(index)
        cdef kf_experts *made = &self.experts[index]
        cdef int64_t count = len(gate_ups)
        if not 0 < chosen <= count <= KF_EXPERTS_MAX or len(downs) != count or made.experts:
            raise ValueError(f"{chosen} of {count} experts, {len(downs)} with a second weight")
        cdef kf_weight *first = <kf_weight *>calloc(count, sizeof(kf_weight))
        cdef kf_weight *second = <kf_weight *>calloc(count, sizeof(kf_weight))
        made.gate_up, made.down = first, second
        if first == NULL or second == NULL:
            raise MemoryError("no memory for the addresses of the weights")
        for i in range(count):
            first[i], second[i] = weight_of(gate_ups[i]), weight_of(downs[i])
        made.router = weight_of(router)
        made.experts, made.chosen, made.intermediate, made.normalised = count, chosen, intermediate, normalised
        layer.experts = made

    def set_routes(self, size_t logits, size_t weights, size_t expert, size_t place, size_t first, size_t gathered,
                   size_t activated, size_t out, size_t prepared):
        """Where mixtures of experts keep a step's values: see kf_routes."""
        self.c.routes = kf_routes(<float *>logits, <float *>weights, <int32_t *>expert, <int32_t *>place,
                                  <int32_t *>first, <void *>gathered, <void *>activated, <void *>out,
                                  <void *>prepared)

    def set_ends(self, int64_t vocab, size_t embed, size_t norm, head, int64_t head_rows):
        """What a first or a last stage has besides layers; 0: it is none. head: as a weight of set_layer(), of so many
        tokens."""
        self.c.vocab = vocab
        self.c.embed = <void *>embed
        self.c.norm = <float *>norm
        self.c.head = weight_of(head)
        self.c.head_rows = head_rows

    def set_buffers(self, size_t residual, size_t normed, size_t qkv, size_t q, size_t attended, size_t activated,
                    size_t picked, size_t prepared):
        self.c.residual = <void *>residual
        self.c.normed = <void *>normed
        self.c.qkv = <void *>qkv
        self.c.q = <void *>q
        self.c.attended = <void *>attended
        self.c.activated = <void *>activated
        self.c.picked = <void *>picked
        self.c.prepared = <void *>prepared

    def set_rotary(self, int64_t table, size_t cos, size_t sin, int64_t table_rows, int64_t rotated):
        """cos, sin: float32 [table_rows, rotated / 2], of as many rows and values in each table."""
        if not 0 <= table < KF_TABLES:
            raise IndexError(f"rotary table {table} is not one of {KF_TABLES}")
        if not 0 < rotated <= self.kv.c.head_dim or rotated % 2:
            raise ValueError(f"cannot rotate {rotated} of {self.kv.c.head_dim} values of a head")
        self.c.cos[table] = <float *>cos
        self.c.sin[table] = <float *>sin
        self.c.table_rows = table_rows
        self.c.rotated = rotated

    cdef kf_io io_of(self, Step step, source, const int32_t[::1] picked, size_t out, int *nonfinite) except *:
        """Points into source and picked, which the caller keeps."""
        cdef const int64_t[::1] tokens
        cdef const unsigned char[::1] hidden
        cdef kf_io io = kf_io(NULL, NULL, NULL, 0, <void *>out, nonfinite)
        if self.c.embed != NULL:
            tokens = source
            if tokens.shape[0] != step.c.tokens:
                raise ValueError(f"the first stage needs {step.c.tokens} tokens, not {tokens.shape[0]}")
            io.tokens = &tokens[0]
        else:
            hidden = source
            size = step.c.tokens * self.c.hidden * (2 if self.kv.c.is_bf16 else 4)
            if hidden.shape[0] != size:
                raise ValueError(f"expected {size} bytes of activations, got {hidden.shape[0]}")
            io.hidden = &hidden[0]
        if self.c.norm != NULL and picked.shape[0]:
            io.picked = &picked[0]
            io.num_picked = picked.shape[0]
        return io

    def forward(self, Step step, source, const int32_t[::1] picked, size_t out):
        """A whole step. source: tokens int64 [T] on a first stage, elsewhere activations as bytes; picked int32 [K]:
        the rows to compute logits of, on a last stage. Returns whether any of the activations is not finite."""
        cdef int nonfinite = 0
        cdef kf_io io = self.io_of(step, source, picked, out, &nonfinite)
        cdef int code
        with nogil:
            code = kf_stage_forward(self.team.c, &self.c, &self.kv.c, &step.c, &io)
        check(code)
        return nonfinite != 0


cdef class Rank:
    """One rank of a stage: see rank.h. `stage` has norms, biases, own shards of the FFN, embedding and a part of the
    head."""

    cdef kf_rank c
    cdef Stage stage
    cdef kf_heads_layer *parts[2]
    cdef int64_t *intermediate
    cdef kf_cut *cuts

    def __cinit__(self, Stage stage, int64_t kv_heads, int64_t shards):
        """kv_heads, shards: of the whole stage."""
        cdef int64_t layers = stage.c.num_layers
        self.stage = stage
        for i in range(2):
            self.parts[i] = <kf_heads_layer *>calloc(layers, sizeof(kf_heads_layer))
        self.intermediate = <int64_t *>calloc(layers, sizeof(int64_t))
        self.cuts = <kf_cut *>calloc(layers, sizeof(kf_cut))
        if self.parts[0] == NULL or self.parts[1] == NULL or self.intermediate == NULL or self.cuts == NULL:
            raise MemoryError("no memory for the addresses of the weights")
        self.c.stage = &stage.c
        self.c.intermediate = self.intermediate
        self.c.down_cuts = self.cuts
        self.c.o_limit = KF_FIXED_LIMIT / <float>kv_heads
        self.c.down_limit = KF_FIXED_LIMIT / <float>shards

    def __dealloc__(self):
        free(self.parts[0])
        free(self.parts[1])
        free(self.intermediate)
        free(self.cuts)

    cdef kf_heads *part(self, bint data_parallel):
        return &self.c.data_parallel if data_parallel else &self.c.tensor_parallel

    def set_heads(self, bint data_parallel, Cache kv, int64_t heads, weights, const int64_t[::1] ends):
        """One of two parts. kv: of its KV heads, which `heads` query heads share; weights: for each layer those of qkv
        and of o, as in Stage.set_layer(); ends: of the shares of its KV heads in o. All kept alive by the caller."""
        cdef kf_heads *part = self.part(data_parallel)
        cdef kf_heads_layer *layers = self.parts[data_parallel]
        if heads <= 0 or heads % kv.c.kv_heads or len(weights) != self.stage.c.num_layers:
            raise ValueError(f"{heads} heads, {kv.c.kv_heads} KV heads, {len(weights)} layers")
        for i, (qkv, o) in enumerate(weights):
            layers[i] = kf_heads_layer(weight_of(qkv), weight_of(o))
            check_ends(ends, heads * kv.c.head_dim, layers[i].o)
        part.layers, part.kv, part.heads = layers, kv.c, heads
        part.cut = kf_cut(&ends[0], ends.shape[0])

    def set_room(self, bint data_parallel, size_t normed, size_t qkv, size_t q, size_t attended):
        """Addresses of room for the rows of a step; normed: of the data-parallel part only."""
        cdef kf_heads *part = self.part(data_parallel)
        part.normed, part.qkv = <void *>normed, <void *>qkv
        part.q, part.attended = <void *>q, <void *>attended

    def set_shards(self, int64_t index, int64_t inputs, const int64_t[::1] ends):
        """The rank's shards of a layer's FFN, which may be none; `ends` is kept alive by the caller."""
        cdef kf_layer *layer = self.stage.layer(index)
        self.intermediate[index] = inputs
        if inputs:
            check_ends(ends, inputs, layer.down)
            self.cuts[index] = kf_cut(&ends[0], ends.shape[0])

    def set_exchange(self, size_t exchange, int64_t timeout_ns):
        """exchange: address of the handle of this rank's end, kept alive by the caller."""
        self.c.exchange = <kf_exchange *>exchange
        self.c.timeout_ns = timeout_ns

    def forward(self, Step step, Step owned, const int32_t[::1] places, source, const int32_t[::1] picked, size_t out):
        """As Stage.forward(). owned: rows with data-parallel heads, of which token i is token places[i] of the step.
        Returns the exchange's outcome and whether any of the activations is not finite."""
        if places.shape[0] != owned.c.tokens:
            raise ValueError(f"{places.shape[0]} places for {owned.c.tokens} tokens")
        if self.c.exchange == NULL:
            raise ValueError("a rank needs an exchange")
        cdef int nonfinite = 0, outcome = 0, code
        cdef kf_io io = self.stage.io_of(step, source, picked, out, &nonfinite)
        cdef const int32_t *at = &places[0] if places.shape[0] else NULL
        with nogil:
            code = kf_rank_forward(self.stage.team.c, &self.c, &step.c, &owned.c, at, &io, &outcome)
        check(code)
        return outcome, nonfinite != 0


def attention(Team team, Cache kv, int64_t layer, Step step, size_t q, size_t out, int64_t heads, float scale,
              int64_t window):
    """softmax(scale q K) V over the paged cache; q and out: [tokens, heads, head_dim]."""
    if heads <= 0 or heads % kv.c.kv_heads:
        raise ValueError("heads must be a multiple of kv_heads")
    cdef kf_attention_args a = kf_attention_args(&kv.c, &step.c, layer, heads, window, scale, <void *>q, <void *>out)
    cdef int code
    with nogil:
        code = kf_attention(team.c, &a)
    check(code)


def rope_write(Team team, Cache kv, int64_t layer, Step step, size_t qkv, int64_t stride, size_t cos, size_t sin,
               int64_t table_rows, int64_t rotated, size_t q_norm, size_t k_norm, float eps, bint wide, int64_t heads,
               size_t q):
    """Splits, norms (0 = none), rotates the first `rotated` values of heads; writes K and V into the cache and the
    queries to q."""
    if heads <= 0 or stride < (heads + 2 * kv.c.kv_heads) * kv.c.head_dim:
        raise ValueError("qkv rows are shorter than its heads")
    if not 0 < rotated <= kv.c.head_dim or rotated % 2:
        raise ValueError(f"cannot rotate {rotated} of {kv.c.head_dim} values of a head")
    cdef kf_rope_args a = kf_rope_args(&kv.c, &step.c, layer, heads, stride, rotated, <float *>cos, <float *>sin,
                                       <float *>q_norm, <float *>k_norm, eps, wide, <void *>qkv, <void *>q)
    cdef int code
    with nogil:
        code = kf_rope_write(team.c, &a, table_rows)
    check(code)


def rms_norm(Team team, size_t x, size_t weight, size_t out, int64_t rows, int64_t n, float eps, bint wide, bint add,
             bint is_bf16):
    """out[rows, n] = (add: +=) weight * rms_norm(x); weight: float32. wide: rounded once."""
    cdef kf_norm_args a = kf_norm_args(<void *>x, <float *>weight, <void *>out, rows, n, eps, wide, add)
    with nogil:
        kf_rms_norm(team.c, &a, is_bf16)


def linear(Team team, size_t x, weight, size_t out, size_t prepared, int64_t rows, int64_t k, int64_t n, int epilogue,
           bint is_bf16, const int64_t[::1] ends=None):
    """out[rows, n] = x[rows, k] W^T + bias; see kf_epilogue for what is done with it. weight: as one of set_layer();
    prepared: room for prepared_size() bytes a row where it is quantised. ends: of the shards that are summed in fixed
    point, of a dense weight that is stored or added."""
    cdef kf_sum total
    cdef kf_linear_args a = kf_linear_args(<void *>x, weight_of(weight), <void *>out, <void *>prepared, rows, k, n,
                                           <kf_epilogue>epilogue, 0, NULL)
    cdef int code
    if ends is not None:
        check_ends(ends, k, a.w)
        total = kf_sum(kf_cut(&ends[0], ends.shape[0]), KF_FIXED_LIMIT / <float>ends.shape[0], NULL, NULL, 0)
        a.sum = &total
    with nogil:
        code = kf_linear(team.c, &a, is_bf16)
    check(code)


def prepared_size(int64_t k):
    """Bytes of a bfloat16 row of k inputs, as the products of quantised weights take it."""
    return kf_prepared_size(k)


def panel_size(int format, int64_t k, int64_t span):
    """Bytes of 64 outputs of a quantised weight with k inputs."""
    return kf_panel_size(<kf_format>format, k, span)


cdef int isa_in_use() noexcept nogil:
    return kf_isa()


def set_isa(int isa):
    """Limits the instruction set: 0 C, 1 AVX2, 2 AVX-512, 3 with bfloat16, -1 the best. Returns what is in use."""
    return kf_set_isa(isa)
