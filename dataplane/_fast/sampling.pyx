# cython: boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""What every running request's next token depends on, and draws for whole batches without the interpreter.

The arithmetic is in draw.h, estimate.h, weights.h and passes.h. All checks are made before anything is written."""

from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport calloc, free

from kernels.cpu._native cimport isa_in_use

import numpy as np

cdef extern from *:
    const char *KF_SOURCES
    int KF_POISONED, KF_NONE_LEFT, KF_REJECTED

SOURCES = KF_SOURCES.decode()  # digest of what this was built from: see setup.py

# Logits that are weighed before another thread has woken up, about.
cdef Py_ssize_t ALONE = 1 << 17

# In the place of a token: see draw.h.
POISONED, NONE_LEFT, REJECTED = KF_POISONED, KF_NONE_LEFT, KF_REJECTED

# kf_top of weights.h: one of a row's largest logits.
TOP = np.dtype([("token", np.int32), ("logit", np.float32)])


class SlotsFull(MemoryError):
    """No free slot."""


cdef class DrawTable:
    """Slots of sampling state, one a request; their number is fixed at construction. One thread at a time."""

    def __cinit__(self, Py_ssize_t max_rows, Py_ssize_t vocab_size, Team team=None):
        """`team`: threads that rows are shared among, which nobody else may use meanwhile; none: the caller's own."""
        if max_rows <= 0 or not 0 < vocab_size <= KF_VOCAB_MAX:
            raise ValueError(f"no table for {max_rows} rows of {vocab_size} tokens (at most {KF_VOCAB_MAX})")
        self.rows = <kf_row *>calloc(max_rows, sizeof(kf_row))
        if self.rows == NULL:
            raise MemoryError("no memory for the sampling table")
        self.team = Team(1) if team is None else team
        self.max_rows = max_rows
        self.vocab_size = vocab_size
        self.free = list(range(max_rows - 1, -1, -1))
        self.held = [None] * max_rows
        self.banned = [None] * max_rows

    def __dealloc__(self):
        cdef Py_ssize_t i
        if self.rows != NULL:
            for i in range(self.max_rows):
                kf_row_clear(&self.rows[i])
            free(self.rows)

    cdef kf_row *row(self, Py_ssize_t slot) except NULL:
        self.check_idle()
        if slot < 0 or slot >= self.max_rows or not self.rows[slot].in_use:
            raise IndexError(f"slot {slot} is not in use")
        return &self.rows[slot]

    cdef int see(self, kf_row *row, const int32_t[:] tokens, int32_t count) except -1:
        cdef Py_ssize_t i
        for i in range(tokens.shape[0]):
            if kf_see(row, tokens[i], count) < 0:
                raise MemoryError("no memory for a request's token counts")
        return 0

    cdef int extend(self, kf_row *row, int64_t token) except -1:
        if row.counts_output and kf_see(row, <int32_t>token, 1) < 0:
            raise MemoryError("no memory for a request's token counts")
        row.length += 1
        return 0

    cdef int check_idle(self) except -1:
        if self.sampling:
            raise RuntimeError("another thread is sampling from this table")
        return 0

    cdef int check(self, const int32_t[:] tokens) except -1:
        cdef Py_ssize_t i
        for i in range(tokens.shape[0]):
            if not 0 <= tokens[i] < self.vocab_size:
                raise ValueError(f"token id {tokens[i]} is outside the vocabulary of {self.vocab_size}")
        return 0

    def admit(
        self, spec, const int32_t[::1] prompt, const int32_t[::1] output, const int32_t[:, ::1] masks=None
    ):
        """A slot for a request of this contract.requests.Sampling and token log. `masks` [max_rows, vocab / 32 rounded
        up]: row `slot` of it is read at each draw, a bit for each token that may be drawn.

        Raises SlotsFull, ValueError for a token id outside the vocabulary or masks of another shape."""
        cdef const int32_t[::1] bias_tokens = np.array([t for t, _ in spec.logit_bias], np.int32)
        cdef const float[::1] bias = np.array([b for _, b in spec.logit_bias], np.float32)
        cdef const int32_t[::1] stops = np.array(
            sorted(set(spec.stop_token_ids)) if spec.min_tokens > 0 else (), np.int32
        )
        if masks is not None and not (
            masks.shape[0] == self.max_rows and masks.shape[1] == (self.vocab_size + 31) // 32
        ):
            raise ValueError(f"masks of shape {masks.shape[0], masks.shape[1]} do not fit the table")
        self.check(prompt)
        self.check(output)
        self.check(bias_tokens)
        self.check(stops)
        self.check_idle()
        if not self.free:
            raise SlotsFull(f"all {self.max_rows} slots of the sampling table are in use")
        cdef Py_ssize_t slot = self.free[len(self.free) - 1]
        cdef kf_row *row = &self.rows[slot]
        kf_row_clear(row)
        row.seed = spec.seed & 0xFFFFFFFFFFFFFFFF
        row.length = output.shape[0]
        row.min_tokens = spec.min_tokens
        row.top_k = spec.top_k
        row.temperature = spec.temperature
        row.top_p = spec.top_p
        row.min_p = spec.min_p
        row.repetition = spec.repetition_penalty
        row.presence = spec.presence_penalty
        row.frequency = spec.frequency_penalty
        row.logprobs = -1 if spec.logprobs is None else min(spec.logprobs, self.vocab_size)
        row.counts_prompt = row.repetition != 1.0
        row.counts_output = row.counts_prompt or row.presence != 0.0 or row.frequency != 0.0
        row.num_bias = bias.shape[0]
        row.num_stops = stops.shape[0]
        if bias.shape[0]:
            row.bias_tokens = &bias_tokens[0]
            row.bias = &bias[0]
        if stops.shape[0]:
            row.stops = &stops[0]
        if row.counts_output:
            seen = np.concatenate([prompt, output]) if row.counts_prompt else np.asarray(output)
            self.see(row, np.unique(seen), 0)  # ascending: nothing moves
            self.see(row, output, 1)
        if masks is not None:
            row.mask = &masks[slot, 0]
        self.banned[slot] = None
        self.held[slot] = (bias_tokens, bias, stops, masks)  # the row points into them
        self.free.pop()
        row.in_use = 1
        return slot

    def append(self, const int32_t[:] slots, const int64_t[:] tokens):
        """The output of slots[i] grows by tokens[i]. Raises IndexError, ValueError."""
        cdef Py_ssize_t i
        if slots.shape[0] != tokens.shape[0]:
            raise ValueError(f"{tokens.shape[0]} tokens for {slots.shape[0]} slots")
        for i in range(slots.shape[0]):
            self.row(slots[i])
            if not 0 <= tokens[i] < self.vocab_size:
                raise ValueError(f"token id {tokens[i]} is outside the vocabulary of {self.vocab_size}")
        for i in range(slots.shape[0]):
            self.extend(&self.rows[slots[i]], tokens[i])

    def ban(self, Py_ssize_t slot, const int32_t[::1] tokens):
        """The next token of a slot is none of these, in place of those that were named before. Raises IndexError,
        ValueError for a token id outside the vocabulary."""
        cdef kf_row *row = self.row(slot)
        self.check(tokens)
        row.num_bans = tokens.shape[0]
        row.bans = &tokens[0] if tokens.shape[0] else NULL
        self.banned[slot] = tokens  # the row points into them

    def length(self, Py_ssize_t slot):
        """How many tokens the output has: the position of the next draw."""
        return self.row(slot).length

    def seek(self, Py_ssize_t slot, Py_ssize_t length):
        """The slot's output has so many tokens, whichever they are. Raises IndexError for a slot not in use, ValueError
        where they matter: a request with penalties."""
        cdef kf_row *row = self.row(slot)
        if row.counts_output or length < 0:
            raise ValueError(f"no draw of slot {slot} depends on the length {length} of its output alone")
        row.length = length

    def release(self, Py_ssize_t slot):
        """Gives the slot and what it held back."""
        kf_row_clear(self.row(slot))
        self.held[slot] = self.banned[slot] = None
        self.free.append(slot)

    @property
    def in_use(self):
        return self.max_rows - len(self.free)

    cdef void *room(self) except NULL:
        """What a thread needs for a row, of each; the caller's is returned."""
        cdef kf_scratch s
        return self.team.room(kf_scratch_place(&s, self.vocab_size, NULL))

    def sample(
        self, const float[:, ::1] logits, const int32_t[::1] slots, const int32_t[::1] depths=None,
        const int32_t[::1] drafts=None, const int32_t[:, ::1] masks=None, const unsigned char[::1] foreseen=None
    ):
        """Tokens int64 [K] drawn from logits [K, vocab], POISONED for a row that is not finite, NONE_LEFT for one whose
        mask, or what is banned, allows no token; and, for those that asked for log probabilities, the logarithms of
        the sums of exponentials float64 [K] and the largest logits TOP [K, most], of the tokens that a mask leaves.
        No state changes.

        Where a request has drafts its rows follow one another: row r is drawn behind `depths[r]` of them, the last of
        which is `drafts[r]`, and is REJECTED unless each of these is what the row before it drew. Where the request has
        a mask, masks[r] is that of the row, if `foreseen[r]`; else it is REJECTED.

        Raises IndexError for a slot not in use, ValueError for shapes that do not fit."""
        cdef Py_ssize_t k = slots.shape[0], i
        if logits.shape[0] != k or logits.shape[1] != self.vocab_size:
            raise ValueError(
                f"logits of shape {logits.shape[0], logits.shape[1]} do not fit {k} slots of a vocabulary "
                f"of {self.vocab_size}"
            )
        cdef bint ahead = depths is not None
        if ahead:
            self.check_drafts(slots, depths, drafts)
        if masks is not None and (
            foreseen is None or foreseen.shape[0] != k
            or masks.shape[0] != k or masks.shape[1] != (self.vocab_size + 31) // 32
        ):
            raise ValueError(f"masks of drafts do not fit {k} slots")
        cdef int64_t most = 0
        for i in range(k):
            most = max(most, self.row(slots[i]).logprobs)
        tokens, norms, top = np.empty(k, np.int64), np.empty(k), np.empty((k, most), TOP)
        cdef int64_t[::1] drawn = tokens
        cdef double[::1] sums = norms
        cdef size_t largest = top.ctypes.data
        cdef kf_batch batch
        cdef kf_worker alone
        cdef Team team = self.team
        if k:
            alone.scratch = self.room()
            batch.next = 0
            batch.logits, batch.rows, batch.vocab, batch.top_stride = &logits[0, 0], k, self.vocab_size, most
            batch.slots, batch.states, batch.isa = &slots[0], self.rows, isa_in_use()
            batch.depths = &depths[0] if ahead else NULL
            batch.drafts = &drafts[0] if ahead else NULL
            batch.masks = &masks[0, 0] if masks is not None else NULL
            batch.tokens, batch.norms, batch.top = &drawn[0], &sums[0], <kf_top *>largest
            self.sampling = True
            with nogil:
                if k * self.vocab_size <= ALONE:
                    kf_sample_rows(&alone, &batch)
                else:
                    team.run(kf_sample_rows, &batch)
            self.sampling = False
            if ahead:
                for i in range(1, k):
                    if depths[i] and (
                        drawn[i - 1] != drafts[i]
                        or (self.rows[slots[i]].mask != NULL and (foreseen is None or not foreseen[i]))
                    ):
                        drawn[i] = KF_REJECTED
        return tokens, norms, top

    cdef int check_drafts(
        self, const int32_t[::1] slots, const int32_t[::1] depths, const int32_t[::1] drafts
    ) except -1:
        cdef Py_ssize_t k = slots.shape[0], i
        if drafts is None or depths.shape[0] != k or drafts.shape[0] != k:
            raise ValueError(f"depths and drafts do not fit {k} slots")
        for i in range(k):
            if depths[i] and (i == 0 or depths[i] != depths[i - 1] + 1 or slots[i] != slots[i - 1]):
                raise ValueError("the rows of a request's drafts do not follow one another")
            if depths[i] and not 0 <= drafts[i] < self.vocab_size:
                raise ValueError(f"token id {drafts[i]} is outside the vocabulary of {self.vocab_size}")
        return 0

    def log_sum_exp(self, const float[::1] logits):
        """log(sum(exp(logits))) of one row [vocab] of finite values, with the same bits on every machine."""
        if logits.shape[0] != self.vocab_size:
            raise ValueError(f"{logits.shape[0]} logits for a vocabulary of {self.vocab_size}")
        self.check_idle()
        cdef kf_scratch s
        s.passes = kf_passes_for(isa_in_use())
        kf_scratch_place(&s, self.vocab_size, <char *>self.room())
        return kf_log_sum_exp(&logits[0], &s)

    def estimates(self, const float[::1] logits, double temperature):
        """What each block of 1,024 tokens of a row [vocab] of finite values weighs at this temperature, for tests:
        exactly int64 [blocks], by the estimate float64 [blocks], and how far that may be off; both are None with
        numbers or an instruction set that have no estimate. Raises ValueError for another shape."""
        if logits.shape[0] != self.vocab_size:
            raise ValueError(f"{logits.shape[0]} logits for a vocabulary of {self.vocab_size}")
        self.check_idle()
        cdef kf_scratch s
        cdef int finite
        s.passes = kf_passes_for(isa_in_use())
        kf_scratch_place(&s, self.vocab_size, <char *>self.room())
        cdef double scale = KF_LOG2E / temperature
        cdef double best = logits[s.passes.best(&logits[0], self.vocab_size, &finite, s.tops)]
        s.passes.sum(&logits[0], self.vocab_size, best, scale, s.sums)
        exact = np.array(<int64_t[:s.blocks]>s.sums)
        if kf_estimate(&s, &logits[0], best, scale, False) < 0.0:
            return exact, None, None
        about = np.array(<double[:s.blocks]>s.estimates)
        return exact, about, KF_ESTIMATE_OFF * about + KF_TOKEN_OFF * KF_BLOCK
