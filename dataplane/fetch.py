"""Where a node loads its weights from: its own disk, or a peer of its stage over the network.

A machine that has just been put in place of another may have no checkpoint. Its node then asks etcd who serves its
stage, and copies that stage's tensors and the checkpoint's small files from one of them (weights_service.py) to
`RUN_DIR/weights/stageKofN-DIGEST`. Every chunk has a checksum; the whole counts only when the digest of its tensors is
the one that the group serves, and is put in place by one rename. What was fetched before an interruption is kept
and gone on from. Memory is bounded by the stream's flow control.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from controlplane.contract import auth, rpc
from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import ConfigError, PeerError, Unavailable
from controlplane.contract.identity import Identity, ProcessName, ProcessRole
from controlplane.contract.ids import Member, NodeId
from controlplane.contract.keys import Keys
from controlplane.contract.records import NodeRecord
from controlplane.keyspace.connect import etcd_client
from dataplane.model.bundle import SMALL, holds_stage
from dataplane.model.checkpoint import checkpoint_of
from dataplane.model.config import load_config
from dataplane.model.digests import digest_as
from dataplane.model.errors import ModelError
from dataplane.model.split import split_layers
from dataplane.model.weights import SINGLE, load_weights, weights_digest
from dataplane.shelf import Note, note, notes, tidy, use
from dataplane.weights_service import CHUNK_BYTES, FETCH, Ask, Chunk, Manifest, checksum, decode_answer
from dataplane.world import World

log = logging.getLogger(__name__)

ANSWER_LIMIT_S = 20.0
ETCD_LIMIT_S = 10.0
LOCK_LIMIT_S = 3600.0  # another node of this host and stage fetches the same
LOCK_POLL_S = 0.2
ROUNDS = 2  # times each peer is tried
ROOM_BYTES = 64 << 20  # left free on the disk
MESSAGE_BYTES_MAX = 8 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """Where to load a stage from, and the checkpoint that it is of ("": not known)."""

    path: Path
    checkpoint: str = ""


def provision(config: ClusterConfig, node: NodeId, stage: int) -> Source:
    """The directory to load the stage from; fetched from a peer if it is nowhere on this disk.

    Raises ConfigError (nothing here and nobody to ask, or no room), Unavailable (no peer could give it), ModelError.
    """
    own, shelf = Path(config.model), _shelf(config)
    if not holds_stage(own, stage, config.stages):
        return asyncio.run(_provision(config, node, stage))
    if shelf.is_dir() and shelf.resolve() not in own.resolve().parents:
        _clear(config, shelf, stage)
    if config.engine.executor == "oracle":  # has no tensors
        return Source(own)
    return Source(own, checkpoint_of(own, Path(config.run_dir) / "digests" / "checkpoint.json"))


async def _provision(config: ClusterConfig, node: NodeId, stage: int) -> Source:
    shelf, prefix = _shelf(config), _prefix(config, stage)
    peers = await find_peers(config, node, stage)
    if not peers:
        kept = _kept(config, shelf, stage)
        return Source(kept, _noted(config, kept).checkpoint)
    checkpoint = next((peer.checkpoint for peer in peers if peer.checkpoint), "")
    shelf.mkdir(mode=0o700, parents=True, exist_ok=True)
    async with _lock(_lock_file(config, shelf, stage)):
        target = _target(shelf / f"{prefix}{peers[0].weights_digest[:16]}", checkpoint)
        if not target.is_dir():
            await _fetch(config, node, peers, target)
        checkpoint = checkpoint or _noted(config, target).checkpoint
        note(target, config.group, Note(_model(config), checkpoint))
        use(target)
        await asyncio.to_thread(tidy, shelf, target, prefix, config.group)
    return Source(target, checkpoint)


def _target(plain: Path, checkpoint: str) -> Path:
    """Two checkpoints may have the tensors of a stage in common, and not the files beside them."""
    known = {said.checkpoint for said in notes(plain).values()} - {""}
    if not checkpoint or not known or checkpoint in known:
        return plain
    return plain.with_name(f"{plain.name}-{checkpoint[:16]}")


def _clear(config: ClusterConfig, shelf: Path, stage: int) -> None:
    """The host has a checkpoint of its own now: what was fetched for the stage takes up room for nothing."""
    try:
        with _lock_file(config, shelf, stage).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            tidy(shelf, None, _prefix(config, stage), config.group)
    except OSError as error:  # also where another group fetches the same stage: at the next start, then
        log.info("what was fetched earlier stays in %s: %s", shelf, error.strerror or error)


def _shelf(config: ClusterConfig) -> Path:
    return Path(config.run_dir) / "weights"


def _prefix(config: ClusterConfig, stage: int) -> str:
    return f"stage{stage}of{config.stages}-"


def _lock_file(config: ClusterConfig, shelf: Path, stage: int) -> Path:
    return shelf / f"{_prefix(config, stage)}fetch.lock"


def _model(config: ClusterConfig) -> str:
    return str(Path(config.model).absolute())


def _noted(config: ClusterConfig, bundle: Path) -> Note:
    return notes(bundle).get(config.group, Note(""))


def _kept(config: ClusterConfig, shelf: Path, stage: int) -> Path:
    """What was fetched at an earlier time for the model of the settings, the newest. The whole group may be starting:
    nobody is there to compare. (Whether it is of the checkpoint that the group serves, controllers compare.)"""
    found = [path for path in shelf.glob(f"{_prefix(config, stage)}*") if path.is_dir() and not path.suffix]
    ours = [path for path in found if _noted(config, path).model == _model(config)]
    # Of code that left no notes it is not known. Who refused it would end a group of which nobody has anything else.
    bundles = ours or [path for path in found if not notes(path)]
    if not bundles:
        others = f" ({shelf} has weights of other models only)" if found else ""
        raise ConfigError(
            f"{config.model} has no checkpoint for stage {stage} of {config.stages}, and no node that has one is "
            f"registered: copy the checkpoint there, or start a node that has it first{others}"
        )
    newest = max(bundles, key=lambda path: path.stat().st_mtime)
    if not ours:
        log.warning("%s does not say which model it is of: taken for %s", newest, config.model)
    use(newest)
    return newest


async def find_peers(config: ClusterConfig, node: NodeId, stage: int) -> list[NodeRecord]:
    """Nodes with the stage's weights that the group serves, of the checkpoint that it serves; those that serve nothing
    themselves first."""
    world = World(Keys.of(config), config.group)
    try:
        async with (
            asyncio.timeout(ETCD_LIMIT_S),
            etcd_client(config, Identity.of(config, ProcessRole.NODE, node)) as client,
            aclosing(client.watch_prefix(world.names.root)) as watch,
        ):
            world.apply(await anext(aiter(watch)))
    except TimeoutError:
        log.warning("etcd does not answer: nobody can be asked for weights")
        return []
    serving = {m for p in world.topology.pipelines for m in p.members()} if world.topology else set()
    others = [r for r in world.nodes.values() if r.num_stages == config.stages and r.member.node != node]
    return rank_peers(others, serving, stage)


def rank_peers(others: Sequence[NodeRecord], serving: Collection[Member], stage: int) -> list[NodeRecord]:
    """Who of the group's other nodes can give a stage's weights, the best first. `serving`: who of all has a duty."""
    checkpoint = _most((r.checkpoint, r.member in serving) for r in others)
    able = [r for r in others if r.stage == stage and r.checkpoint in ("", checkpoint)]
    wanted = _most((r.weights_digest, r.member in serving) for r in able)
    return sorted(
        (r for r in able if r.weights_digest == wanted), key=lambda r: (r.member in serving, r.member)
    )


def _most(votes: Iterable[tuple[str, bool]]) -> str:
    """What serves, else what most nodes hold; "" counts for nothing."""
    found: Counter[str] = Counter()
    for one, serves in votes:
        found[one] += 1000 if serves else 1
    return max(sorted(found.keys() - {""}), key=lambda one: found[one], default="")


async def _fetch(config: ClusterConfig, node: NodeId, peers: Sequence[NodeRecord], target: Path) -> None:
    """Try the peers in turn. Raises ConfigError when the disk is full, Unavailable when nobody could give it."""
    token = auth.derive(auth.load_secret(config.secret_file), "grpc")
    identity = Identity.of(config, ProcessRole.NODE, node)
    partial = target.with_suffix(".partial")
    partial.mkdir(mode=0o700, exist_ok=True)
    note(partial, config.group, Note(_model(config)))
    troubles: list[str] = []
    for peer in [*peers] * ROUNDS:
        began = time.monotonic()
        try:
            size = await _fetch_from(peer, token, partial, identity)
            await asyncio.to_thread(_verify, partial, peer, config.engine.weights)
        except (PeerError, ModelError, grpc.aio.AioRpcError, TimeoutError) as error:
            reason = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error) or "no answer"
            troubles.append(f"{peer.member.node}: {reason}")
            log.warning("weights from %s: %s", peer.member.node, reason)
            continue
        except OSError as error:
            raise _told(error, partial) from error
        note(partial, config.group, Note(_model(config), peer.checkpoint))
        partial.rename(target)
        _sync(target.parent)
        took_s = time.monotonic() - began
        log.info(
            "weights of stage %d from %s: %d bytes in %.1f s", peer.stage, peer.member.node, size, took_s
        )
        return
    raise Unavailable(
        f"no peer could give the weights ({'; '.join(troubles)}); what came so far is kept in {partial}"
    )


async def _fetch_from(peer: NodeRecord, token: str, partial: Path, identity: Identity) -> int:
    """Complete the files in `partial`; how many bytes they have."""
    options = [("grpc.max_receive_message_length", MESSAGE_BYTES_MAX)]
    giver = ProcessName(ProcessRole.NODE, peer.member.node)
    async with identity.channel(peer.rpc_address, giver, options) as channel:
        ask = channel.unary_stream(FETCH, request_serializer=rpc.encode, response_deserializer=decode_answer)
        metadata = (("authorization", f"Bearer {token}"),)
        manifest = await _answer(ask(Ask(), metadata=metadata))
        if not isinstance(manifest, Manifest):
            raise PeerError("its first answer is no manifest")
        _check(manifest, peer)
        missing = {name: size - _held(partial / name, size) for name, size in manifest.sizes.items()}
        _make_sure_of_room(partial, sum(missing.values()))
        for name, size in sorted(manifest.sizes.items()):
            held = size - missing[name]
            await _copy(ask(Ask(name, held), metadata=metadata), name, held, size, partial / name)
    return sum(manifest.sizes.values())


def _check(manifest: Manifest, peer: NodeRecord) -> None:
    """A peer must not make us write anything but a checkpoint's files, nor another stage's."""
    said = (manifest.stage, manifest.num_stages, manifest.weights_digest)
    if said != (peer.stage, peer.num_stages, peer.weights_digest):
        raise PeerError(f"it has other weights than it registered: {said}")
    if manifest.checkpoint != peer.checkpoint:
        raise PeerError("it has another checkpoint than it registered")
    if not {SINGLE, "config.json"} <= set(manifest.sizes) <= {SINGLE, *SMALL}:
        raise PeerError(f"its manifest names {', '.join(sorted(manifest.sizes))[:200]}")
    if any(size <= 0 for size in manifest.sizes.values()):
        raise PeerError("its manifest has an empty file")


def _held(path: Path, size: int) -> int:
    """Bytes of a file that need not be asked for again: whole chunks of the tensors; small files come anew."""
    if path.name != SINGLE or not path.exists():
        return 0
    have = min(path.stat().st_size, size)
    return have if have == size else have // CHUNK_BYTES * CHUNK_BYTES


async def _copy(call: Any, name: str, at: int, size: int, path: Path) -> None:
    """Write what comes, from `at` on."""
    with path.open("r+b" if at else "wb") as file:
        file.seek(at)
        file.truncate()
        while at < size:
            chunk = await _answer(call)
            if not isinstance(chunk, Chunk) or (chunk.name, chunk.offset) != (name, at):
                raise PeerError(f"it answered something else than {name} from {at} on")
            if len(chunk.data) != min(CHUNK_BYTES, size - at) or checksum(chunk.data) != chunk.checksum:
                raise PeerError(f"{name} from {at} on is not what was sent")
            await asyncio.to_thread(file.write, chunk.data)
            at += len(chunk.data)
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())


async def _answer(call: Any) -> Manifest | Chunk:
    async with asyncio.timeout(ANSWER_LIMIT_S):
        answer = await call.read()
    if answer is grpc.aio.EOF:
        raise PeerError("it broke off")
    assert isinstance(answer, Manifest | Chunk)
    return answer


def _verify(partial: Path, peer: NodeRecord, weights: str) -> None:
    """The tensors are those that the group serves. If not, nothing of them is worth keeping."""
    config = load_config(partial)
    layers = split_layers(config.num_layers, peer.num_stages)[peer.stage]
    try:
        found = digest_as(weights_digest(load_weights(partial, config, layers)), weights)
    except ModelError:
        (partial / SINGLE).unlink()
        raise
    if found != peer.weights_digest:
        (partial / SINGLE).unlink()
        raise PeerError(f"the digest of what came is {found[:16]}, not {peer.weights_digest[:16]}")


def _make_sure_of_room(partial: Path, needed: int) -> None:
    free = shutil.disk_usage(partial).free
    if free < needed + ROOM_BYTES:
        raise OSError(errno.ENOSPC, f"{needed >> 20} MiB are needed, {free >> 20} MiB are free")


def _told(error: OSError, partial: Path) -> ConfigError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigError(
            f"no room for the weights in {partial.parent}: {error.strerror}. Free some, or give another run_dir, and "
            "start the node again: it goes on where it stopped"
        )
    return ConfigError(f"cannot write the weights to {partial}: {error.strerror or error}")


def _sync(folder: Path) -> None:
    """A rename is on disk once its directory is."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@asynccontextmanager
async def _lock(path: Path) -> AsyncIterator[None]:
    """One fetch of the same weights at a time on this host."""
    deadline = time.monotonic() + LOCK_LIMIT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"another node has been fetching for {LOCK_LIMIT_S:g} s ({path})"
                    ) from None
            await asyncio.sleep(LOCK_POLL_S)
        yield
