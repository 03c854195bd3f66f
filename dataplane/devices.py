"""Devices and networks that the executor `oracle` is timed like, where they are not at hand."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import ConfigError
from dataplane.moment import MOMENT
from dataplane.transport.base import Part
from dataplane.transport.driver import Driver
from dataplane.transport.emulated import EmulatedDriver, Network, Weigh
from dataplane.transport.frames import CHECKED, HEADER

LIGHT_TOKENS_MAX = 1024


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """How long one stage takes for a step, and how large what it reads and writes is."""

    fixed_s: float
    per_token_s: float
    per_context_token_s: float  # for each position that attention reads
    kv_bytes_per_token: int
    activation_bytes_per_token: int

    def step_s(self, tokens: int, context: int) -> float:
        """`context`: positions that attention reads, over all sequences of the step."""
        return self.fixed_s + tokens * self.per_token_s + context * self.per_context_token_s

    @property
    def light_tokens(self) -> int:
        """A step of so many tokens takes at most twice the time of none: who is merged into one waits no longer."""
        if self.fixed_s >= LIGHT_TOKENS_MAX * self.per_token_s:
            return LIGHT_TOKENS_MAX
        return int(self.fixed_s / self.per_token_s)


class EmulatedDevice:
    """Is busy with one step after another."""

    def __init__(self) -> None:
        self._free_at = 0.0
        self._spent = time.thread_time()  # of this thread, when the last step was done

    async def run(self, came: float, began: float, seconds: float) -> None:
        """Returns when it is done with a step of `seconds` whose inputs came at `came`; it was taken up at `began`.

        From then until `MOMENT.end()` it is the moment at which it was done, not when the loop found time for us."""
        ready = max(came, self._free_at)
        start = ready + MOMENT.counted(max(0.0, began - ready), time.thread_time() - self._spent)
        self._free_at = start + seconds
        await asyncio.sleep(self._free_at - time.monotonic())
        MOMENT.begin(self._free_at)
        self._spent = time.thread_time()


# Llama-3.1-8B has 32 layers, 8 KV heads of 128, 4096 hidden; a quarter of it has about 2e9 parameters.
# - A token costs 2 FLOP a parameter. An A10 offers 125 dense bf16 TFLOP/s on paper and is held to 150 W.
# - A token has 8 layers x 2 (K and V) x 8 heads x 128 x 2 bytes = 32 KiB of KV, read at 600 GB/s.
# Two things are not derived but such that an undisturbed pipeline of four is like the published one: the fixed part (a
# token takes 163 ms, and a step with its share of 95 requests 38; reading 4 GB of weights would be 7, the rest is the
# published engine's own), and that 85 TFLOP/s are reached (by calculation a first token takes 0.21 s in the mean and
# 0.33 s at p99; published are 0.20 and 0.33).
A10_LLAMA_8B_QUARTER = DeviceProfile(
    fixed_s=0.0353,
    per_token_s=2 * 2e9 / 85e12,
    per_context_token_s=32_768 / 600e9,
    kv_bytes_per_token=32_768,
    activation_bytes_per_token=4096 * 2,
)

PROFILES = {
    "a10-llama-8b-quarter": A10_LLAMA_8B_QUARTER,
    "instant": DeviceProfile(0.0, 0.0, 0.0, 8, 8),
}


def profile_of(config: ClusterConfig) -> DeviceProfile:
    """Raises ConfigError for a name that is not one of PROFILES."""
    name = config.emulation.profile
    if name not in PROFILES:
        raise ConfigError(f"emulation.profile: {name!r} is not one of {', '.join(PROFILES)}")
    return PROFILES[name]


def message_bytes(profile: DeviceProfile, real_bytes_per_token: int) -> Weigh:
    """How long a message would be on the wire with payloads of the profile's sizes, not the oracle's."""
    kv_factor = profile.kv_bytes_per_token / real_bytes_per_token
    activation_factor = profile.activation_bytes_per_token / real_bytes_per_token

    def weigh(parts: Sequence[Part]) -> int:
        head = parts[0]
        if len(parts) < 2:
            return len(head)
        _, _, checked, _, _, _, payload, _ = HEADER.unpack_from(head)
        return len(head) + int(payload * (kv_factor if checked == CHECKED else activation_factor))

    return weigh


def emulate_network(
    config: ClusterConfig, node: str, real_bytes_per_token: int
) -> Callable[[Driver], Driver] | None:
    """What to wrap a transport's driver in so that its links are those of the settings; None: as they are."""
    emulation = config.emulation
    if not emulation.network:
        return None
    number = int(node.removeprefix("n"))
    network = Network(
        site=emulation.sites[number % len(emulation.sites)] if emulation.sites else 0,
        latency_s=tuple(tuple(s / emulation.time_scale for s in row) for row in emulation.latency_s),
        bytes_per_s=emulation.link_bytes_per_s * emulation.time_scale,
    )
    weigh = message_bytes(profile_of(config), real_bytes_per_token)
    return lambda driver: EmulatedDriver(driver, network, weigh)


def precise_loop() -> asyncio.AbstractEventLoop:
    """An event loop whose timers are not rounded up to the next millisecond, as epoll's are: emulated times are of that
    size. It bears fewer than 1024 descriptors, which a node is far from."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())
