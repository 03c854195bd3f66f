"""Gives a blank node the weights of this node's own stage, piece by piece.

    Weights.Fetch   node -> node   Ask -> Manifest, or stream Chunk

The stream's own flow control bounds what is on its way. Files are read in threads, and at most `FETCHES_MAX` are given
at once, so that serving goes before.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import msgspec

from controlplane.contract import rpc
from controlplane.contract.auth import bearer_matches
from controlplane.contract.identity import PLAIN, Identity, ProcessRole, no_role
from dataplane.model.bundle import Bundle, open_bundle
from dataplane.model.errors import ModelError

WEIGHTS = "kevlarflow.Weights"
FETCH = f"/{WEIGHTS}/Fetch"
CHUNK_BYTES = 1 << 20
FETCHES_MAX = 2


class Ask(msgspec.Struct, frozen=True):
    """For a file from `offset` on; without a name, for the manifest."""

    name: str = ""
    offset: int = 0


class Manifest(msgspec.Struct, frozen=True, tag="manifest"):
    """What there is: file name -> bytes. `weights_digest` is that of the stage's tensors, `checkpoint` as in
    NodeRecord."""

    stage: int
    num_stages: int
    weights_digest: str
    sizes: dict[str, int]
    checkpoint: str = ""


class Chunk(msgspec.Struct, frozen=True, tag="chunk"):
    name: str
    offset: int
    data: bytes
    checksum: bytes  # blake2b of `data`, 16 bytes


decode_ask = msgspec.msgpack.Decoder(Ask).decode
decode_answer = msgspec.msgpack.Decoder(Manifest | Chunk).decode


def checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class WeightsService:
    """The handler goes to the server of the front door."""

    def __init__(
        self,
        token: str,
        model_dir: Path,
        stage: int,
        num_stages: int,
        weights_digest: str,
        identity: Identity = PLAIN,
        checkpoint: str = "",
    ) -> None:
        self.handler = rpc.stream_handler(WEIGHTS, "Fetch", self._fetch, decode_ask)
        self._token = token
        self._identity = identity
        self._model_dir = model_dir
        self._stage, self._num_stages = stage, num_stages
        self._digest, self._checkpoint = weights_digest, checkpoint
        self._fetches = 0

    async def _fetch(
        self, asks: AsyncIterator[Ask], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[Manifest | Chunk]:
        metadata = dict(context.invocation_metadata() or ())
        if not bearer_matches(metadata.get("authorization"), self._token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the cluster's token is missing or wrong")
        if not self._identity.admits(context, ProcessRole.NODE):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, no_role(ProcessRole.NODE))
        if self._fetches >= FETCHES_MAX:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "it gives weights to others already")
        self._fetches += 1
        try:
            bundle = await asyncio.to_thread(open_bundle, self._model_dir, self._stage, self._num_stages)
            ask = await anext(aiter(asks))
            if ask.name and (ask.name not in bundle.files or ask.offset < 0):
                await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no {ask.name!r:.80}")
            end = bundle.size(ask.name) if ask.name else ask.offset + 1
            for at in range(ask.offset, end, CHUNK_BYTES):
                yield await asyncio.to_thread(self._answer, bundle, Ask(ask.name, at))
        except (ModelError, OSError) as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"the checkpoint here is gone: {error}")
        finally:
            self._fetches -= 1

    def _answer(self, bundle: Bundle, ask: Ask) -> Manifest | Chunk:
        if not ask.name:
            sizes = {name: bundle.size(name) for name in bundle.files}
            return Manifest(self._stage, self._num_stages, self._digest, sizes, self._checkpoint)
        data = bundle.read(ask.name, ask.offset, CHUNK_BYTES)
        return Chunk(ask.name, ask.offset, data, checksum(data))
