"""A blank node's weights over a real connection: complete, verified, gone on from, and refused in words."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from controlplane.contract import auth
from controlplane.contract.config import ClusterConfig, EngineConfig
from controlplane.contract.errors import ConfigError, Unavailable
from controlplane.contract.ids import Member
from controlplane.contract.records import NodeRecord
from controlplane.kfadmin.up import demo_model
from dataplane import executor, fetch, shelf, weights_service
from dataplane.frontdoor import Frontdoor
from dataplane.model import digests
from dataplane.model.bundle import Bundle, holds_stage, open_bundle
from dataplane.model.checkpoint import checkpoint_of
from dataplane.model.config import load_config
from dataplane.model.digests import digest_as
from dataplane.model.split import split_layers
from dataplane.model.weights import INDEX, SINGLE, load_weights, stage_shapes, weights_digest
from dataplane.weights_service import Ask, Chunk, Manifest, WeightsService, checksum

STAGE, STAGES = 1, 4
CHUNK = 100_000  # small, so that there are many

Answer = Callable[[Bundle, Ask], Manifest | Chunk]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_service, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(fetch, "CHUNK_BYTES", CHUNK)


def digest_of(model_dir: Path, stage: int = STAGE) -> str:
    config = load_config(model_dir)
    layers = split_layers(config.num_layers, STAGES)[stage]
    return weights_digest(load_weights(model_dir, config, layers))


def settings(tmp_path: Path) -> ClusterConfig:
    secret = tmp_path / "secret"
    if not secret.exists():
        auth.create_secret(secret)
    return ClusterConfig(str(tmp_path), str(tmp_path / "nothing"), (), stages=STAGES)


@contextlib.asynccontextmanager
async def peer(
    config: ClusterConfig,
    *,
    digest: str = "",
    token: str = "",
    wrap: Callable[[Answer], Answer] = lambda answer: answer,
    model_dir: Path | None = None,
    checkpoint: str = "",
    said: str | None = None,
) -> AsyncIterator[NodeRecord]:
    """A node that serves the demo model's weights; `wrap` changes what it answers. `said`: the checkpoint that it
    tells who fetches, if that is not what it registers."""
    token = token or auth.derive(auth.load_secret(config.secret_file), "grpc")
    digest = digest or digest_of(demo_model())
    tells = checkpoint if said is None else said
    service = WeightsService(token, model_dir or demo_model(), STAGE, STAGES, digest, checkpoint=tells)
    service._answer = wrap(service._answer)  # type: ignore[method-assign]
    door = Frontdoor(token, lambda *_: None, lambda *_: None, service.handler)
    address = await door.start("127.0.0.1")
    try:
        yield msgspec.structs.replace(record_of(address, digest), checkpoint=checkpoint)
    finally:
        await door.close()


def record_of(address: str, digest: str, name: str = "n5") -> NodeRecord:
    return NodeRecord(Member(name, "a"), "default", STAGE, STAGES, "", address, digest, 1, 16, 1)


def fetched(config: ClusterConfig, **more: Any) -> Path:
    target = Path(config.run_dir) / "weights" / "stage1of4-x"
    target.parent.mkdir(exist_ok=True)

    async def run() -> None:
        async with peer(config, **more) as record:
            await fetch._fetch(config, "n9", [record], target)

    asyncio.run(run())
    return target


def test_weights_that_are_quantised_when_they_are_loaded(tmp_path: Path) -> None:
    """A peer of the same settings registers another digest of the same tensors."""
    config = msgspec.structs.replace(settings(tmp_path), engine=EngineConfig(weights="int8"))
    digest = digest_as(digest_of(demo_model()), "int8")
    assert digest != digest_of(demo_model())
    assert digest_of(fetched(config, digest=digest)) == digest_of(demo_model())
    shutil.rmtree(tmp_path / "weights")
    with pytest.raises(Unavailable, match="the digest of what came"):
        fetched(config, digest=digest_of(demo_model()))


def test_what_was_fetched_is_the_stage_and_nothing_else(tmp_path: Path) -> None:
    target = fetched(settings(tmp_path))
    assert digest_of(target) == digest_of(demo_model())
    assert holds_stage(target, STAGE, STAGES)
    config = load_config(demo_model())
    names = set(stage_shapes(config, split_layers(config.num_layers, STAGES)[STAGE]))
    assert set(load_file(target / SINGLE)) == names
    assert (target / SINGLE).stat().st_size < (demo_model() / SINGLE).stat().st_size / 3
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (demo_model() / name).read_bytes()
    # It can be given on: a second blank node may ask the first.
    again = open_bundle(target, STAGE, STAGES)
    assert again.read(SINGLE, 0, 1 << 30) == open_bundle(demo_model(), STAGE, STAGES).read(SINGLE, 0, 1 << 30)


def test_equal_tensors_are_equal_bytes_whatever_files_they_come_from(tmp_path: Path) -> None:
    tensors = load_file(demo_model() / SINGLE)
    where = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_bytes((demo_model() / "config.json").read_bytes())
    for stage in range(STAGES):
        assert holds_stage(tmp_path, stage, STAGES)
        one, many = open_bundle(demo_model(), stage, STAGES), open_bundle(tmp_path, stage, STAGES)
        assert one.read(SINGLE, 0, 1 << 30) == many.read(SINGLE, 0, 1 << 30)
    (tmp_path / "part-0.safetensors").unlink()
    assert not holds_stage(tmp_path, STAGE, STAGES)
    assert not holds_stage(tmp_path / "nothing", STAGE, STAGES)


def test_pieces_join_at_every_offset() -> None:
    bundle = open_bundle(demo_model(), STAGE, STAGES)
    whole = bundle.read(SINGLE, 0, 1 << 30)
    assert len(whole) == bundle.size(SINGLE)
    (header,) = struct.unpack("<Q", whole[:8])
    for at in (
        0,
        1,
        7,
        8,
        header + 7,
        header + 8,
        header + 9,
        999_999,
        len(whole) - 1,
        len(whole),
        len(whole) + 5,
    ):
        assert bundle.read(SINGLE, at, 70_001) == whole[at : at + 70_001]


def test_an_interrupted_fetch_goes_on_where_it_was(tmp_path: Path) -> None:
    config = settings(tmp_path)
    asked: list[int] = []

    def breaks_off(answer: Answer) -> Answer:
        def wrapped(bundle: Bundle, ask: Ask) -> Manifest | Chunk:
            if ask.name == SINGLE and ask.offset >= 10 * CHUNK:
                raise OSError("the disk is gone")
            return answer(bundle, ask)

        return wrapped

    def counts(answer: Answer) -> Answer:
        def wrapped(bundle: Bundle, ask: Ask) -> Manifest | Chunk:
            if ask.name == SINGLE:
                asked.append(ask.offset)
            return answer(bundle, ask)

        return wrapped

    with pytest.raises(Unavailable, match=r"the disk is gone.*is kept"):
        fetched(config, wrap=breaks_off)
    partial = tmp_path / "weights" / "stage1of4-x.partial"
    assert (partial / SINGLE).stat().st_size >= 5 * CHUNK
    target = fetched(config, wrap=counts)
    assert asked[0] >= 5 * CHUNK
    assert digest_of(target) == digest_of(demo_model())
    assert not partial.exists()


def flipped(answer: Answer) -> Answer:
    """One bit of one chunk changes on the way."""

    def wrapped(bundle: Bundle, ask: Ask) -> Manifest | Chunk:
        said = answer(bundle, ask)
        if isinstance(said, Chunk) and ask.offset == 3 * CHUNK:
            return Chunk(said.name, said.offset, bytes([said.data[0] ^ 1]) + said.data[1:], said.checksum)
        return said

    return wrapped


def changed(answer: Answer) -> Answer:
    """The peer's disk has something else than what it loaded: the checksum is right, the weights are not."""

    def wrapped(bundle: Bundle, ask: Ask) -> Manifest | Chunk:
        said = flipped(answer)(bundle, ask)
        return (
            Chunk(said.name, said.offset, said.data, checksum(said.data)) if isinstance(said, Chunk) else said
        )

    return wrapped


def lies(answer: Answer) -> Answer:
    def wrapped(bundle: Bundle, ask: Ask) -> Manifest | Chunk:
        said = answer(bundle, ask)
        if isinstance(said, Manifest):
            return Manifest(said.stage, said.num_stages, said.weights_digest, {**said.sizes, "../../evil": 4})
        return said

    return wrapped


@pytest.mark.parametrize(
    ("wrap", "word"), [(flipped, "not what was sent"), (changed, "digest"), (lies, "manifest names")]
)
def test_what_is_not_right_never_counts(tmp_path: Path, wrap: Callable[[Answer], Answer], word: str) -> None:
    config = settings(tmp_path)
    with pytest.raises(Unavailable, match=word):
        fetched(config, wrap=wrap)
    assert not (tmp_path / "weights" / "stage1of4-x").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"secret", "weights"}
    assert digest_of(fetched(config)) == digest_of(demo_model())  # and an honest peer mends it


def test_the_next_peer_is_asked(tmp_path: Path) -> None:
    config = settings(tmp_path)
    target = tmp_path / "weights" / "stage1of4-x"
    target.parent.mkdir()

    async def run() -> None:
        async with peer(config, wrap=flipped) as bad, peer(config) as good:
            gone = record_of("127.0.0.1:1", good.weights_digest, "n9")
            await fetch._fetch(config, "n9", [gone, bad, good], target)

    asyncio.run(run())
    assert digest_of(target) == digest_of(demo_model())


def test_a_stranger_gets_nothing_and_a_third_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path)
    with pytest.raises(Unavailable, match="token is missing or wrong"):
        fetched(config, token="another cluster's")
    monkeypatch.setattr(weights_service, "FETCHES_MAX", 0)
    with pytest.raises(Unavailable, match="gives weights to others already"):
        fetched(config)


def test_a_full_disk_is_said_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path)
    monkeypatch.setattr(fetch, "ROOM_BYTES", 1 << 60)  # more than any disk has
    with pytest.raises(ConfigError, match=r"no room for the weights .* MiB are free. Free some"):
        fetched(config)
    monkeypatch.undo()


def test_nothing_here_and_nobody_to_ask(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with pytest.raises(ConfigError, match="copy the checkpoint there, or start a node that has it first"):
        fetch._kept(config, tmp_path / "weights", STAGE)
    kept = fetched(config)
    assert fetch._kept(config, tmp_path / "weights", STAGE) == kept


def test_a_start_does_not_hash_what_was_hashed_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_S", 0.0)
    model, kept = tmp_path / "model", tmp_path / "run" / "digests" / "stage1of4.json"
    shutil.copytree(demo_model(), model)
    hashed: list[int] = []
    original = executor.weights_digest

    def counted(weights: Any) -> str:
        hashed.append(len(weights))
        return original(weights)

    monkeypatch.setattr(executor, "weights_digest", counted)

    def start(stage: int = STAGE) -> str:
        made = executor.StageExecutor(model, stage, STAGES, num_blocks=4, digest_file=kept)
        return made.weights_digest

    digest = start()
    assert digest == digest_of(demo_model())
    assert start() == digest
    assert len(hashed) == 1
    assert start(2) == digest_of(demo_model(), 2)  # other tensors of the same file
    assert len(hashed) == 2
    assert start() == digest
    kept.write_bytes(b"{}")  # of another version, or cut short
    assert start() == digest
    assert len(hashed) == 4

    # One byte of it changes, its size and times do not: the inode's own time does.
    stat = (model / SINGLE).stat()
    data = bytearray((model / SINGLE).read_bytes())
    tensors = open_bundle(model, STAGE, STAGES).files[SINGLE]
    data[tensors[1].offset] ^= 1
    (model / SINGLE).write_bytes(data)
    os.utime(model / SINGLE, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert start() == digest_of(model) != digest
    assert len(hashed) == 5


def test_a_digest_is_not_kept_of_files_that_have_just_been_written(tmp_path: Path) -> None:
    file, kept = tmp_path / "weights", tmp_path / "kept.json"
    file.write_bytes(b"one")
    seen = digests.identities([file])
    assert digests.digest_once(lambda: "1", ["a"], seen, kept) == "1"
    assert not kept.exists()
    # Nor one of files that changed while they were read, and a kept one is not taken for them.
    file.write_bytes(b"another")
    assert digests.digest_once(lambda: "2", ["a"], seen, kept) == "2"
    assert not kept.exists()


def bundle_of(shelf: Path, name: str, at: int) -> Path:
    path = shelf / name
    path.mkdir(parents=True)
    (path / SINGLE).write_bytes(b"tensors")
    os.utime(path, ns=(at, at))
    return path


def test_old_weights_are_removed_unless_they_are_needed_or_in_use(tmp_path: Path) -> None:
    shelf_dir = tmp_path / "weights"
    names = [
        "stage1of4-old", "stage1of4-used", "stage1of4-older.partial", "stage1of4-now",
        "stage2of4-old", "stage2of4-now", "stage2of4-next.partial", "stage0of8-old",
    ]  # fmt: skip
    at = {name: bundle_of(shelf_dir, name, 10**9 * (number + 1)) for number, name in enumerate(names)}
    (shelf_dir / "somebody else's").mkdir()
    # Another process serves from one of them.
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(at["stage1of4-used"])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        gone = shelf.tidy(shelf_dir, at["stage1of4-now"], "stage1of4-")
        assert {path.name for path in gone} == {
            "stage1of4-old", "stage1of4-older.partial", "stage2of4-old", "stage0of8-old"
        }  # fmt: skip
        assert not any(path.exists() for path in gone)
        assert (at["stage1of4-used"] / SINGLE).read_bytes() == b"tensors"
    finally:
        holder.stdin.close()
        assert holder.wait(10) == 0
        holder.stdout.close()
    assert [path.name for path in shelf.tidy(shelf_dir, at["stage1of4-now"], "stage1of4-")] == [
        "stage1of4-used"
    ]
    assert {path.name for path in shelf_dir.iterdir()} == {
        "stage1of4-now", "stage2of4-now", "stage2of4-next.partial", "somebody else's"
    }  # fmt: skip


def provisioned(
    config: ClusterConfig, monkeypatch: pytest.MonkeyPatch, checkpoint: str | None = None, **more: Any
) -> fetch.Source:
    """What a node of the stage loads, where one other has it and says that it is of `checkpoint`; None: where none is
    registered."""

    async def found(*_: object) -> list[NodeRecord]:
        return peers

    peers: list[NodeRecord] = []
    monkeypatch.setattr(fetch, "find_peers", found)

    async def run() -> fetch.Source:
        async with peer(config, checkpoint=checkpoint or "", **more) as record:
            peers[:] = [record] if checkpoint is not None else []
            return await asyncio.to_thread(fetch.provision, config, "n9", STAGE)

    return asyncio.run(run())


def test_fetched_weights_are_of_the_checkpoint_of_who_gave_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path)
    source = provisioned(config, monkeypatch, "a")
    assert source.checkpoint == "a"
    assert provisioned(config, monkeypatch) == source, "also when nobody is there to ask"
    # Another checkpoint has the same tensors in this stage, and other files beside them.
    other = provisioned(config, monkeypatch, "tuned")
    assert (other.checkpoint, other.path == source.path) == ("tuned", False)
    assert digest_of(other.path) == digest_of(source.path)
    assert provisioned(config, monkeypatch) == other


def test_what_earlier_code_fetched_is_used_and_gets_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path)
    source = provisioned(config, monkeypatch, "")  # from one that runs it
    assert source.checkpoint == ""
    for path in source.path.glob("of-*"):
        path.unlink()
    assert provisioned(config, monkeypatch) == source
    assert provisioned(config, monkeypatch, "a") == fetch.Source(source.path, "a")
    assert provisioned(config, monkeypatch, "") == fetch.Source(source.path, "a"), "one that does not say"


def test_weights_of_another_model_are_not_taken_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path)
    provisioned(config, monkeypatch, "a")
    for changes in ({"model": str(tmp_path / "another")}, {"group": "another"}):
        with pytest.raises(ConfigError, match=r"copy the checkpoint there.*weights of other models only"):
            provisioned(msgspec.structs.replace(config, **changes), monkeypatch)


def test_a_peer_whose_checkpoint_is_not_what_it_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unavailable, match="another checkpoint than it registered"):
        provisioned(settings(tmp_path), monkeypatch, "a", said="tuned")


def test_peers_are_of_the_checkpoint_that_the_group_serves() -> None:
    """At this stage most nodes have another one."""

    def record(node: str, digest: str, checkpoint: str, stage: int = STAGE) -> NodeRecord:
        return msgspec.structs.replace(record_of("", digest, node), checkpoint=checkpoint, stage=stage)

    nodes = [
        record("n1", "tuned-1", "tuned"), record("n5", "tuned-1", "tuned"), record("n9", "a-1", "a"),
        record("n0", "a-0", "a", 0), record("n2", "a-2", "a", 2), record("n13", "a-1", ""),
    ]  # fmt: skip

    def ranked(*serving: str) -> list[str]:
        busy = {r.member for r in nodes if r.member.node in serving}
        return [r.member.node for r in fetch.rank_peers(nodes, busy, STAGE)]

    assert ranked() == ["n13", "n9"]
    assert ranked("n9") == ["n13", "n9"]
    assert ranked("n1") == ["n5", "n1"]


def test_a_host_that_has_its_own_checkpoint_keeps_no_fetched_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path)
    provisioned(config, monkeypatch, "a")
    os.close(shelf._in_use.pop())  # as the end of the process does
    others = bundle_of(tmp_path / "weights", "stage2of4-x", 10**9)
    own = msgspec.structs.replace(config, model=str(demo_model()))
    source = fetch.provision(own, "n9", STAGE)
    assert source == fetch.Source(demo_model(), checkpoint_of(demo_model(), None))
    assert [path for path in (tmp_path / "weights").iterdir() if path.is_dir()] == [others]
    # Not where what was fetched is itself the model of the settings.
    here = msgspec.structs.replace(config, model=str(provisioned(config, monkeypatch, "a").path))
    os.close(shelf._in_use.pop())
    assert fetch.provision(here, "n9", STAGE).path.is_dir()


def test_groups_that_share_a_host_keep_each_others_weights(tmp_path: Path) -> None:
    shelf_dir = tmp_path / "weights"
    at = {
        name: bundle_of(shelf_dir, f"stage1of4-{name}", 10**9) for name in ("mine", "theirs", "both", "now")
    }
    at["part"] = bundle_of(shelf_dir, "stage1of4-y.partial", 10**9)
    at["sizes"] = bundle_of(shelf_dir, "stage1of8-theirs", 10**9)
    for name, groups in {
        "mine": "a",
        "theirs": "b",
        "both": "ab",
        "now": "a",
        "part": "b",
        "sizes": "b",
    }.items():
        for group in groups:
            shelf.note(at[name], group, shelf.Note("model"))
    assert shelf.tidy(shelf_dir, at["now"], "stage1of4-", "a") == [at["mine"]]
    assert set(shelf.notes(at["both"])) == {"b"}
    (at["both"] / "of-b.json").write_bytes(b"\xff")
    assert shelf.notes(at["both"]) == {"b": shelf.Note("")}
    gone = shelf.tidy(shelf_dir, at["theirs"], "stage1of4-", "b")
    assert set(gone) == {at["both"], at["part"], at["sizes"]}


def test_weights_that_are_half_removed_are_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, shelf_dir = settings(tmp_path), tmp_path / "weights"
    old = bundle_of(shelf_dir, f"stage{STAGE}of{STAGES}-old", 10**9)

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shelf.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            shelf.tidy(shelf_dir, None, f"stage{STAGE}of{STAGES}-")
    assert not old.exists()
    with pytest.raises(ConfigError, match="copy the checkpoint there"):
        fetch._kept(config, shelf_dir, STAGE)
    (left,) = shelf_dir.iterdir()
    busy = os.open(left, os.O_RDONLY)  # as another process has it that removes it
    fcntl.flock(busy, fcntl.LOCK_EX)
    shelf.tidy(shelf_dir, None, "stage2of4-", "another")
    assert left.exists()
    os.close(busy)
    shelf.tidy(shelf_dir, None, "stage2of4-", "another")
    assert not left.exists()


def test_weights_that_are_removed_while_a_process_waits_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has those that were fetched again, or knows that there are none."""
    bundle = bundle_of(tmp_path, "stage1of4-x", 10**9)
    lock, again = fcntl.flock, [True, False]

    def removed_first(fd: int, how: int) -> None:
        if again and how == fcntl.LOCK_SH:
            shutil.rmtree(bundle)
            if again.pop(0):
                bundle_of(tmp_path, bundle.name, 10**9)
        lock(fd, how)

    monkeypatch.setattr(shelf.fcntl, "flock", removed_first)
    with pytest.raises(FileNotFoundError):
        shelf.use(bundle)  # which is fetched again once, and removed again
    assert not again
    bundle_of(tmp_path, bundle.name, 10**9)
    again[:] = [True]
    shelf.use(bundle)
    held = shelf._in_use.pop()
    assert os.path.samestat(os.fstat(held), bundle.stat())
    os.close(held)


def test_weights_that_were_replaced_are_not_removed_for_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of(tmp_path, "stage1of4-x", 10**9)
    lock = fcntl.flock

    def replaced_first(fd: int, how: int) -> None:
        shutil.rmtree(bundle)
        bundle_of(tmp_path, bundle.name, 10**9)
        lock(fd, how)

    monkeypatch.setattr(shelf.fcntl, "flock", replaced_first)
    assert shelf.tidy(tmp_path, None, "stage1of4-") == []
    assert (bundle / SINGLE).exists()


HOLDS = """
import sys
from pathlib import Path
from dataplane.shelf import use
use(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""
