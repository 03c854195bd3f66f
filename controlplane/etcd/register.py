"""Keeps one leased key in etcd for as long as a process lives, through any absence of etcd."""

from __future__ import annotations

import asyncio
import logging

from controlplane.etcd.client import EtcdClient
from controlplane.etcd.errors import EtcdError
from controlplane.etcd.lease import LeaseKeeper

log = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.05
BACKOFF_MAX_S = 1.0


class Registration:
    """Puts `key` = `value` under a lease of `ttl_s`; when the lease is lost, does so again.

    `run` never returns by itself: a process that cannot register keeps serving what it serves.
    """

    def __init__(self, client: EtcdClient, key: str, value: bytes, ttl_s: int) -> None:
        self.key = key
        self.times_registered = 0
        self._client = client
        self._value = value
        self._ttl_s = ttl_s
        self._keeper: LeaseKeeper | None = None

    async def run(self) -> None:
        delay_s = BACKOFF_FIRST_S
        while True:
            try:
                keeper = await self._client.lease_keeper(self._ttl_s)
                self._keeper = keeper
                await self._client.put(self.key, self._value, lease=keeper.lease_id)
            except EtcdError as error:
                log.warning("cannot register %s: %s", self.key, error)
                await self._close_keeper()
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, BACKOFF_MAX_S)
                continue
            delay_s = BACKOFF_FIRST_S
            self.times_registered += 1
            await keeper.lost.wait()
            await self._close_keeper()

    async def withdraw(self, timeout_s: float = 1.0) -> None:
        """Give the lease back, so that the key goes at once. Best effort: the lease expires anyway."""
        keeper = self._keeper
        if keeper is None:
            return
        await self._close_keeper()
        try:
            await self._client.lease_revoke(keeper.lease_id, timeout_s=timeout_s)
        except EtcdError as error:
            log.warning("cannot withdraw %s: %s", self.key, error)

    async def _close_keeper(self) -> None:
        if self._keeper is not None:
            keeper, self._keeper = self._keeper, None
            await keeper.close()
