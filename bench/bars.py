"""What our benches have to reach, as one list: `python -m bench.measurements` compares committed results with it."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.contract.topology import Mode


@dataclass(frozen=True, slots=True)
class Bar:
    bench: str
    figure: str  # "ratios.NAME" or "metrics.NAME" of its result
    bound: float
    most: bool  # the figure is to be at most that; else at least
    what: str  # in words

    def held(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound


def _most(bench: str, figure: str, bound: float, what: str) -> Bar:
    return Bar(bench, figure, bound, True, what)


def _least(bench: str, figure: str, bound: float, what: str) -> Bar:
    return Bar(bench, figure, bound, False, what)


# Of the time, in LUMEN's evaluation (arXiv 2606.17787), that load-aware saves: by number of instances and baseline;
# mean time to first token, mean time per output token, recovery time.
LUMEN_SAVED = {
    (4, Mode.STOP_RESTART): (0.444, 0.159, 0.500),
    (4, Mode.FIXED_NEIGHBOUR): (0.071, 0.070, 0.349),
    (8, Mode.STOP_RESTART): (0.296, 0.071, 0.641),
    (8, Mode.FIXED_NEIGHBOUR): (0.159, 0.042, 0.639),
}
LUMEN_MEASURES = {"ttft_mean": "mean TTFT", "tpot_mean": "mean TPOT", "recovery_mean": "recovery time"}
_LUMEN = tuple(
    _least(
        "lumen",
        f"ratios.n{size}_{name}_{mode.value}",
        1 / (1 - share),
        f"{size} instances, {what} against {mode.value}",
    )
    for (size, mode), saved in LUMEN_SAVED.items()
    for (name, what), share in zip(LUMEN_MEASURES.items(), saved, strict=True)
)

BARS = (
    _most("takeover", "metrics.growth_s_per_gb", 0.05, "pause without the first step, seconds more for each GB of KV"),
    _most("takeover", "metrics.suspected_others", 0, "others that were suspected meanwhile"),
    _most("takeover", "metrics.tokens_different", 0, "tokens that differ"),
    _most("scale", "metrics.cpu_share_1000", 0.25, "share of a core with 1,000 calm nodes"),
    _most("scale", "metrics.kill_to_write_p99_s_1000", 0.1, "kill to written topology in a storm, 1,000 nodes, s"),
    _most("scale", "metrics.kill_to_write_p99_s_4000", 0.4, "the same with 4,000 nodes"),
    _most("scale", "metrics.cost_per_node_growth", 1.5, "cost of a node, 4,000 against 64"),
    _most("recovery", "metrics.pause_p99_s", 0.1, "longest pause of a stream around a kill, p99, seconds"),
    _most("recovery", "metrics.tokens_different", 0, "tokens that differ"),
    _least("overhead", "ratios.latency_mean", 1 / 1.02, "mean latency without copies against with them"),
    _least("overhead", "ratios.latency_mean_parity", 1 / 1.02, "mean latency without parity (XOR) against with it"),
    _most("protection", "metrics.memory_xor41_share", 0.27, "bytes of parity, XOR (4,1), against those of copies"),
    _most("protection", "metrics.memory_rs41_share", 0.27, "the same, Reed-Solomon (4,1)"),
    _most("protection", "metrics.memory_rs82_share", 0.27, "the same, Reed-Solomon (8,2)"),
    _most("protection", "metrics.memory_share_error", 0.03, "how far the worst of these is from K of N"),
    _most("protection", "metrics.cost_parity_latency", 0.02, "mean latency that parity adds, emulated A10s"),
    _most("protection", "metrics.cost_parity_tokens_per_s", 0.02, "tokens/s that parity costs, the same"),
    _most("protection", "metrics.cost_replicate_latency", 0.02, "mean latency that copies add, emulated A10s"),
    _least("protection", "ratios.recovery_16k_xor41", 2, "kill to next token, 16K tokens, parity against recomputing"),
    _least("protection", "metrics.predicted_within_share", 0.9, "failures whose predicted cost is within 25 %"),
    _most("protection", "metrics.tokens_wrong", 0, "tokens lost, doubled or different"),
    _most("protection", "metrics.streams_failed", 0, "streams that ended with an error"),
    _least("kevlarflow", "ratios.rate2_ttft_mean", 378.9, "scene 1, 2 requests/s: mean TTFT against stop-restart"),
    _least("kevlarflow", "ratios.rate2_ttft_p99", 574.6, "scene 1, 2 requests/s: p99 TTFT"),
    _least("kevlarflow", "ratios.rate7_latency_mean", 3.1, "scene 3, 7 requests/s: mean latency"),
    _least("kevlarflow", "ratios.rate7_latency_p99", 2.8, "scene 3, 7 requests/s: p99 latency"),
    _least("prefix", "ratios.hit_rate", 0.98, "hit rate against an ideal cache of the same size"),
    _least("prefix", "ratios.hit_rate_two", 0.95, "two pipelines against one cache of the sum"),
    _least("prefix", "ratios.ttft", 10, "first token of 1,024 cached tokens against uncached"),
    _most("prefix", "metrics.miss_cost", 0.01, "what prompts that miss pay"),
    *_LUMEN,
    _least("parity", "ratios.encode_xor", 1.1, "XOR, encoding, against ISA-L"),
    _least("parity", "ratios.decode_xor", 1.1, "XOR, decoding"),
    _least("parity", "ratios.encode_rs42", 1.3, "Reed-Solomon (4,2), encoding"),
    _least("parity", "ratios.decode_rs42", 1.3, "Reed-Solomon (4,2), decoding"),
    _least("parity", "ratios.encode_rs82", 1.3, "Reed-Solomon (8,2), encoding"),
    _least("parity", "ratios.decode_rs82", 1.3, "Reed-Solomon (8,2), decoding"),
    _least("failsafe", "ratios.recovery", 100, "simulated: a lost rank restored against computing 16K contexts again"),
    _least("failsafe", "ratios.throughput_traces", 2, "simulated: tokens/s under traces of faults against standard"),
    _least("failsafe", "metrics.lost3_share", 0.55, "simulated: tokens/s of five ranks of eight"),
    _most("failsafe", "metrics.kv_max_min_worst", 1.05, "simulated: KV of the fullest rank against the emptiest"),
    _most("failsafe", "metrics.compute_max_mean_worst", 1.05, "simulated: computing of the slowest rank, and the mean"),
    _least("speculate", "ratios.ngram_b1", 1.8, "n-grams on text that repeats, batch 1"),
    _least("speculate", "ratios.draft_b1", 1.3, "draft model, batch 1"),
    _least("speculate", "ratios.ngram_b32", 0.98, "n-grams on text that repeats, batch 32"),
    _least("speculate", "ratios.ngram_text_b32", 0.98, "n-grams on other text, batch 32"),
    _least("speculate", "ratios.draft_text_b32", 0.98, "draft model, batch 32"),
    _least("decode", "ratios.b1_node_int8_node", 1.6, "int8 against our bfloat16, batch 1"),
    _least("decode", "ratios.b1_node_int4_node", 2.5, "int4 against our bfloat16, batch 1"),
    _least("decode", "ratios.b32_node_int8_node", 1, "int8 against our bfloat16, batch 32"),
    _least("decode", "ratios.b32_node_int4_node", 1, "int4 against our bfloat16, batch 32"),
    _least("decode", "ratios.b32_openvino", 1, "our 16 or 32 bits against OpenVINO's, batch 32"),
    _least("decode", "ratios.prefill_openvino", 1, "the same, a prompt of 512"),
    _most("decode", "metrics.node_inter_token_mixed_p99_over_p50", 2.5, "token to token beside prompts, p99 / median"),
    _most("decode", "metrics.pipeline4_inter_token_mixed_p99_over_p50", 2.5, "the same, a pipeline of four"),
    _most("decode", "metrics.sampler_t1_ms_b32_avx2_t2", 3, "sampler, 32 rows at temperature 1, two AVX2 cores, ms"),
    _least("structured", "ratios.json_of_free", 0.95, "JSON at batch 32 against free text"),
    _least("gateway", "metrics.tokens_per_s", 15000, "streamed tokens/s of one core, 64 streams, TLS and keys on"),
    _most("gateway", "metrics.ttft_added_p50_s", 0.002, "added to the time to first token, TLS and keys on, p50, s"),
    _least("secure", "ratios.tokens_per_s", 0.95, "tokens/s with sealed links against without"),
    _least("allreduce", "ratios.vs_gloo_1k", 1, "sum of 1 KB between two ranks against gloo"),
    _least("allreduce", "ratios.vs_gloo_64k", 2, "the same of 64 KB"),
    _least("allreduce", "ratios.vs_gloo_4m", 1, "the same of 4 MB"),
)  # fmt: skip
