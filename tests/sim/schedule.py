"""What happens in a run: made from the seed before it begins, so that it can be cut down, step by step."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from tests.sim.requests import LONG, TEMPLATES


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happens `at` seconds after the cluster has formed. `what` names a method of Cluster."""

    at: float
    what: str
    args: tuple[str | float | int, ...] = ()

    def __str__(self) -> str:
        return f"{self.at:7.3f} s  {self.what} {' '.join(map(str, self.args))}"


@dataclass(frozen=True, slots=True)
class Shape:
    instances: int
    stages: int
    spares: int
    controllers: int
    gateways: int
    pool_blocks: int
    microbatches: int
    relays: int = 0  # hosts that have one; 0: nodes report by themselves
    code: str = ""  # parity protects KV, by this code; "": copies do
    parities: int = 0
    parity_blocks: int = 0  # that an encoder has room for; 0: enough
    mode: str = ""  # each request's copy has a holder of its own; "": one of the modes above

    @property
    def nodes(self) -> list[str]:
        return [f"n{k}" for k in range((self.instances + self.spares) * self.stages)]


@dataclass(frozen=True, slots=True)
class Schedule:
    seed: int
    shape: Shape
    steps: tuple[Step, ...]
    mild: bool  # one fault that has to be masked: no request may fail
    calm: bool = False  # nobody dies: nobody may lose a duty either

    def only(self, kept: list[int]) -> Schedule:
        """The same run with some of its steps."""
        steps = tuple(self.steps[index] for index in kept)
        return Schedule(self.seed, self.shape, steps, self.mild, self.calm)


# How often each kind of fault is drawn, besides those of chains.
WEIGHTS = {
    "kill": 3,
    "kill_process": 1,
    "gone": 2,
    "leave": 1,
    "pause": 2,
    "pause_process": 1,
    "isolate": 2,
    "hears_some": 2,
    "split": 1,
    "cut": 1,
    "one_way": 2,
    "flap": 1,
    "reset": 2,
    "slow": 1,
    "tamper": 2,
    "corrupt": 3,
    "etcd_down": 1,
    "etcd_kill": 1,
    "etcd_pause": 1,
    "fate_of_write": 3,
    "expire": 2,
    "compact": 1,
    "wall_jump": 1,
    "etcd_refuses": 2,
    "clash": 2,
    "upgrade": 2,
    "operate": 3,
    "cancel_operation": 1,
}

REFUSALS = ("space", "busy", "rights", "corrupt")

# Instances and stages. Small ones find most, and more of them can be tried.
SIZES = ((2, 1), (2, 2), (2, 2), (2, 2), (2, 2), (2, 3), (3, 1), (3, 2))


# One seed of so many has hosts with relays, and what befalls these on top of what else is drawn for it. None of those
# in which only some are heard, since a relay would carry the others.
RELAYED_EVERY, RELAYED = 8, 5

# Enough nodes for not everybody to be everybody's neighbour: for what goes wrong where only some hear each other. One
# seed of so many is such a run, and from the second number on each is.
LARGE = ((2, 4), (2, 4), (3, 4))
PARTIAL_EVERY, PARTIAL_FROM = 12, 10_000_000

# From this number on, tokens wait on their way to gateways while epochs end, in every seed: what only that finds is
# found whatever the code around it draws for the seeds before.
MUTED_FROM = 20_000_000


# One seed of so many has parity in the place of copies, with faults that are meant for it on top of the others.
CODED_EVERY, CODED = 6, 2
CODES = (("xor", 1), ("xor", 1), ("rs", 1), ("rs", 2), ("rdp", 2))


# In one seed of so many each request's copy has a holder of its own, and instances die while streams last.
PLACED_EVERY, PLACED = 10, 7


# In one seed of so many instances come and go meanwhile.
SCALED_EVERY, SCALED = 7, 4


# In one seed of so many etcd's topology is an old one again, as after a snapshot was restored.
RESTORED_EVERY, RESTORED = 10, 3


def generate(seed: int) -> Schedule:
    schedule = _played(seed)
    changed = seed < PARTIAL_FROM and not schedule.calm
    schedule = _scaled(schedule) if changed and seed % SCALED_EVERY == SCALED else schedule
    return _restored(schedule) if changed and seed % RESTORED_EVERY == RESTORED else schedule


def _restored(schedule: Schedule) -> Schedule:
    chance = random.Random(f"restored {schedule.seed}")
    window_s = max((step.at for step in schedule.steps), default=1.0)
    step = Step(chance.uniform(0.0, window_s), "restore", (chance.choice((1, 1, 2, 5, 100)),))
    return replace(schedule, steps=tuple(sorted((*schedule.steps, step), key=lambda step: step.at)))


def _scaled(schedule: Schedule) -> Schedule:
    """The same with instances added and removed, and streams that last meanwhile. Where one fault has to be masked,
    there is always a second instance to do so."""
    chance, shape = random.Random(f"scale {schedule.seed}"), schedule.shape
    window_s = max((step.at for step in schedule.steps), default=1.0)
    steps = list(schedule.steps)
    for number in range(chance.choice((1, 2, 2, 3))):
        at = chance.uniform(0.0, window_s + 2.0 * number)
        instances = max(chance.randrange(1, shape.instances + 2), 2 if schedule.mild else 1)
        asked = (300 + number, chance.randrange(1, shape.gateways + 1), chance.choice(LONG))
        steps.append(Step(at, "scale", (instances,)))
        steps.append(Step(at + chance.uniform(-0.3, 0.3), "submit", asked))
    steps.sort(key=lambda step: step.at)
    return replace(schedule, steps=tuple(steps))


def _played(seed: int) -> Schedule:
    schedule = _drawn(seed)
    if seed % CODED_EVERY == CODED and seed < PARTIAL_FROM:
        return _coded(schedule)
    if seed % RELAYED_EVERY == RELAYED and seed < PARTIAL_FROM:
        return _relayed(schedule)
    return _placed(schedule) if seed % PLACED_EVERY == PLACED and seed < PARTIAL_FROM else schedule


def _relayed(schedule: Schedule) -> Schedule:
    """With relays and faults of theirs, which have to be masked whatever else happens; in one of three such runs there
    is nothing else, and nobody may lose a duty."""
    chance = random.Random(f"relays {schedule.seed}")
    shape = replace(schedule.shape, relays=chance.choice((1, 2, 2)))
    steps = schedule.steps
    calm = chance.random() < 1 / 3
    if calm:
        steps = tuple(step for step in steps if step.what in ("submit", "cancel"))
    window_s = max((step.at for step in schedule.steps), default=1.0)
    faults = [_of_relay(chance, shape, chance.uniform(0.0, window_s)) for _ in range(chance.randrange(1, 5))]
    return Schedule(
        schedule.seed,
        shape,
        tuple(sorted((*steps, *faults), key=lambda step: step.at)),
        schedule.mild or calm,
        schedule.calm or calm,
    )


def _placed(schedule: Schedule) -> Schedule:
    """The same cluster with load-aware or fixed holders, and nodes that die while long streams last."""
    chance = random.Random(f"holders {schedule.seed}")
    mode = chance.choice(("load-aware", "load-aware", "fixed-neighbour"))
    shape = replace(schedule.shape, mode=mode)
    window_s = max((step.at for step in schedule.steps), default=1.0)
    steps = list(schedule.steps)
    for number in range(0 if schedule.mild or schedule.calm else chance.randrange(1, 4)):
        at = chance.uniform(0.0, window_s)
        for stream in range(3):
            asked = (400 + 10 * number + stream, chance.randrange(1, shape.gateways + 1), chance.choice(LONG))
            steps.append(Step(at, "submit", asked))
        steps.append(
            Step(
                at + chance.uniform(0.1, 0.6), "kill", (chance.choice(shape.nodes), chance.choice((0.4, 1.5)))
            )
        )
    steps.sort(key=lambda step: step.at)
    return Schedule(schedule.seed, shape, tuple(steps), schedule.mild, schedule.calm)


def _coded(schedule: Schedule) -> Schedule:
    """The same cluster with parity, for which bits turn and several stages die at once."""
    chance = random.Random(f"parity {schedule.seed}")
    code, parities = chance.choice(CODES)
    blocks = chance.choice((0, 0, 0, 12))
    shape = replace(schedule.shape, code=code, parities=parities, parity_blocks=blocks)
    window_s = max((step.at for step in schedule.steps), default=1.0)
    steps = list(schedule.steps)
    for _ in range(0 if schedule.mild else chance.randrange(1, 4)):
        at = chance.uniform(0.0, window_s)
        asked = (100 + len(steps), chance.randrange(1, shape.gateways + 1), chance.choice(LONG))
        node = chance.choice(shape.nodes)
        soon = at + chance.uniform(0.1, 0.5)
        steps.append(Step(at, "submit", asked))
        if chance.random() < 0.5:
            # All of it on one node: what is restored next is restored from it.
            picks = [(node, pick, chance.randrange(BLOCK_BITS)) for pick in range(chance.choice((1, 12)))]
            steps += [Step(soon, "flip", each) for each in picks]
        dead = chance.sample(shape.nodes, min(len(shape.nodes), chance.choice((1, 1, 2))))
        kill_at = soon + chance.uniform(0.0, 0.1)
        steps += [Step(kill_at, "kill", (name, chance.choice((0.4, 1.5)))) for name in dead]
    steps.sort(key=lambda step: step.at)
    return Schedule(schedule.seed, shape, tuple(steps), schedule.mild, schedule.calm)


def _of_relay(chance: random.Random, shape: Shape, at: float) -> Step:
    relay = f"r{chance.randrange(shape.relays) + 1}"
    controller = f"c{chance.randrange(shape.controllers) + 1}"
    span = chance.choice((chance.uniform(0.05, 0.5), chance.uniform(0.5, 3.0)))
    return chance.choice(
        (
            Step(at, "kill", (relay, chance.choice((0.05, 0.5, 3.0)))),
            Step(at, "pause", (relay, span)),
            Step(at, "cut", (relay, controller, span)),
            Step(at, "one_way", (*chance.choice(((relay, controller), (controller, relay))), span)),
            Step(at, "deaf", (relay, span)),
            Step(at, "reset", (relay, controller)),
            Step(at, "reset", (chance.choice(shape.nodes), relay)),
        )
    )


def _drawn(seed: int) -> Schedule:
    if seed >= MUTED_FROM:
        return _muted(seed)
    if seed % PARTIAL_EVERY == PARTIAL_EVERY - 1 or seed >= PARTIAL_FROM:
        return _partial(seed)
    chance = random.Random(f"schedule {seed}")
    instances, stages = chance.choice(SIZES)
    shape = Shape(
        instances=instances,
        stages=stages,
        spares=1 if instances * stages <= 4 and chance.random() < 0.15 else 0,
        controllers=chance.choice((1, 2, 2)),
        gateways=chance.choice((1, 2)),
        pool_blocks=chance.choice((40, 64, 128)),
        microbatches=chance.choice((1, 2, 3)),
    )
    mild = chance.random() < 0.25
    window_s = chance.uniform(0.6, 2.0)
    steps = _requests(chance, shape, window_s)
    faults = [_mild(chance, shape, window_s)] if mild else []
    for _ in range(0 if mild else chance.randrange(1, 7)):
        at = chance.uniform(0.0, window_s)
        faults += _chain(chance, shape, at) if chance.random() < 0.25 else [_fault(chance, shape, at)]
        if chance.random() < 0.5:  # a second one lands inside recovery
            faults.append(_fault(chance, shape, at + chance.uniform(0.0, 0.4)))
    return Schedule(seed, shape, tuple(sorted((*steps, *faults), key=lambda step: step.at)), mild)


def _muted(seed: int) -> Schedule:
    chance = random.Random(f"muted {seed}")
    instances, stages = chance.choice(SIZES)
    shape = Shape(
        instances, stages, 0, chance.choice((1, 2)), chance.choice((1, 2)), 128, chance.choice((1, 2, 3))
    )
    window_s = chance.uniform(0.6, 2.0)
    steps = _requests(chance, shape, window_s)
    for number in range(chance.randrange(1, 4)):
        at, gateway = chance.uniform(0.0, window_s), chance.randrange(1, shape.gateways + 1)
        for stream in range(3):
            steps.append(Step(at, "submit", (100 + 10 * number + stream, gateway, chance.choice(LONG))))
        steps += _mute(chance, shape, at + chance.uniform(0.01, 0.3), gateway)
    return Schedule(seed, shape, tuple(sorted(steps, key=lambda step: step.at)), mild=False)


def _partial(seed: int) -> Schedule:
    """Controllers or nodes that hear only some: with nothing else, or with deaths meanwhile."""
    chance = random.Random(f"partial {seed}")
    instances, stages = chance.choice(LARGE)
    shape = Shape(instances, stages, 0, chance.choice((1, 2, 2, 3)), chance.choice((1, 2)), 64, 2)
    window_s = chance.uniform(0.6, 1.5)
    steps = _requests(chance, shape, window_s)
    at = chance.uniform(0.0, window_s)
    calm = chance.random() < 0.5
    seconds = chance.uniform(1.5, 7.0)
    faults = [_hears_some(chance, shape, at, seconds)]
    # What is cut heals a moment after the last step: somebody asks until then.
    asked_at = at + seconds * chance.uniform(0.8, 1.0)
    steps.append(Step(asked_at, "submit", (200, 1, chance.randrange(TEMPLATES))))
    if not calm:
        if chance.random() < 0.5:
            faults = [Step(at, "split", ("leader", _mask(chance, shape), chance.uniform(0.5, 6.0)))]
        for _ in range(chance.randrange(1, 4)):
            what = chance.choice(("kill", "kill", "pause", "cut"))
            node, other = chance.sample(shape.nodes, 2)
            args = {"kill": (node, 0.5), "pause": (node, 1.5), "cut": (node, other, 1.5)}[what]
            faults.append(Step(at + chance.uniform(0.0, 4.0), what, args))
    steps = sorted((*steps, *faults), key=lambda step: step.at)
    return Schedule(seed, shape, tuple(steps), mild=calm, calm=calm)


def _hears_some(chance: random.Random, shape: Shape, at: float, seconds: float) -> Step:
    """The leader, or some controller, no longer hears all nodes; streams break at once, or fall silent."""
    who = chance.choice(("leader", "leader", f"c{chance.randrange(shape.controllers) + 1}"))
    return Step(
        at, "hears_some", (who, _mask(chance, shape), chance.randrange(2), chance.randrange(2), seconds)
    )


def _mask(chance: random.Random, shape: Shape) -> int:
    """Some of the nodes, as bits: one, a pipeline, a stage, any, all but one, nobody."""
    count = len(shape.nodes)
    every = (1 << count) - 1
    first = chance.randrange(shape.instances) * shape.stages
    pipeline = ((1 << shape.stages) - 1) << first
    stage = sum(1 << k for k in range(chance.randrange(shape.stages), count, shape.stages))
    one = 1 << chance.randrange(count)
    return chance.choice((one, one, pipeline, stage, chance.randrange(every), every & ~one, 0))


def _requests(chance: random.Random, shape: Shape, window_s: float) -> list[Step]:
    steps: list[Step] = []
    for number in range(chance.randrange(2, 7)):
        at = chance.uniform(0.0, window_s)
        steps.append(
            Step(at, "submit", (number, chance.randrange(1, shape.gateways + 1), chance.randrange(TEMPLATES)))
        )
        if chance.random() < 0.15:
            steps.append(Step(at + chance.uniform(0.0, 0.5), "cancel", (number,)))
    return steps


def _mild(chance: random.Random, shape: Shape, window_s: float) -> Step:
    """Anything that the design promises to mask while every stage has a peer and etcd, a controller and links work."""
    at = chance.uniform(0.0, window_s)
    node = chance.choice(shape.nodes)
    return chance.choice(
        (
            Step(at, "kill", (node, chance.choice((0.2, 0.5, 2.0)))),
            Step(at, "kill", (node, 0.2)),
            Step(at, "leave", (node,)),
            Step(at, "kill", ("c1", 0.5)),
            Step(at, "etcd_down", (3, chance.uniform(0.5, 3.0))),
            Step(at, "etcd_kill", (chance.randrange(3), 1.0)),
            Step(at, "etcd_refuses", (chance.choice(REFUSALS), chance.uniform(0.5, 3.0))),
            Step(at, "clash", (chance.choice([node, "c1", "g1"]), chance.uniform(0.5, 15.0))),
            Step(at, "upgrade", ("c1", 1)),
            Step(at, "pause", (node, chance.uniform(0.05, 0.4))),
            Step(at, "wall_jump", (chance.choice((-3600.0, 3600.0)),)),
            Step(at, "operate", ("drain", node, "")),
            Step(at, "operate", ("replace", node, "")),
            Step(at, "reset", (node, chance.choice(shape.nodes))),
        )
    )


def _chain(chance: random.Random, shape: Shape, at: float) -> list[Step]:
    """Faults that do harm only together, and would hardly ever meet by chance."""
    node, soon = chance.choice(shape.nodes), at + chance.uniform(0.01, 0.3)
    asked = ("submit", (100, chance.randrange(1, shape.gateways + 1), chance.choice(LONG)))
    which = chance.randrange(5)
    if which == 0:
        # A leader that does not hear how it is voted out, and then sees a reason to write.
        return [
            Step(at, "deaf", ("leader", chance.uniform(1.0, 2.0))),
            Step(soon, "expire", ("leader",)),
            Step(soon + chance.uniform(0.1, 0.8), "kill", (node, 0.4)),
        ]
    if which == 1:
        return [Step(at, *asked), *_mute(chance, shape, soon, asked[1][1])]
    if which == 2:
        # Steps and copies wait on their way between nodes while an epoch ends.
        return [
            Step(at, *asked),
            Step(soon + 0.1, "hush", (chance.uniform(0.2, 0.8),)),
            Step(soon + 0.1 + chance.uniform(0.0, 0.1), "kill", (chance.choice(shape.nodes), 0.4)),
        ]
    if which == 3 and shape.controllers > 1:
        # The older leads, then the newer, then the older again, and each has something to write.
        terms = [at + 0.1 + turn * chance.uniform(2.2, 2.8) for turn in (1, 2)]
        return [
            Step(at, "upgrade", ("leader", chance.choice((1, 2)))),
            *(Step(when, "expire", ("leader",)) for when in terms),
            *(Step(when + 0.1, "kill", (chance.choice(shape.nodes), 0.4)) for when in (at, *terms)),
        ]
    # A copy goes bad, and is needed a moment later.
    return [
        Step(at, *asked),
        Step(soon + 0.2, "corrupt", (node, chance.randrange(1 << 16), chance.randrange(BLOCK_BITS))),
        Step(soon + 0.2 + chance.uniform(0.0, 0.1), "kill", (chance.choice(shape.nodes), 0.4)),
    ]


def _mute(chance: random.Random, shape: Shape, soon: float, gateway: int) -> list[Step]:
    """Tokens wait on their way to the gateway while an epoch ends."""
    return [
        Step(soon + 0.1, "mute", (f"g{gateway}", chance.uniform(0.3, 1.2))),
        Step(soon + 0.1 + chance.uniform(0.0, 0.2), "kill", (chance.choice(shape.nodes), 0.4)),
    ]


def _fault(chance: random.Random, shape: Shape, at: float) -> Step:
    nodes = shape.nodes
    controllers = [f"c{k + 1}" for k in range(shape.controllers)]
    gateways = [f"g{k + 1}" for k in range(shape.gateways)]
    members = ["e0", "e1", "e2"]
    node, other = chance.choice(nodes), chance.choice(nodes)
    everybody = [*nodes, *controllers, *gateways, *members]
    short, long = chance.uniform(0.02, 0.5), chance.uniform(0.5, 2.0)
    span = chance.choice((short, long))
    (what,) = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))
    match what:
        case "kill":
            return Step(at, "kill", (node, chance.choice((0.2, 0.2, 0.6, 1.5))))
        case "gone":  # with its machine: a blank one comes much later
            return Step(at, "kill", (node, 4.0))
        case "kill_process":
            return Step(at, "kill", (chance.choice([*controllers, *gateways]), chance.choice((0.2, 1.0))))
        case "pause":
            return Step(at, "pause", (node, span))
        case "pause_process":
            return Step(at, "pause", (chance.choice([*controllers, *gateways]), span))
        case "isolate":
            return Step(at, "isolate", (chance.choice(everybody), span))
        case "hears_some":
            return _hears_some(chance, shape, at, span)
        case "split":
            return Step(at, what, ("leader", _mask(chance, shape), span))
        case "cut" | "one_way":
            return Step(at, what, (chance.choice(everybody), chance.choice(everybody), span))
        case "flap":
            return Step(at, what, (node, chance.choice(everybody), chance.randrange(2, 6), short))
        case "etcd_down":
            return Step(at, what, (chance.choice((2, 3)), span))
        case "etcd_kill" | "etcd_pause":
            return Step(at, what, (chance.randrange(3), span))
        case "etcd_refuses":
            return Step(at, what, (chance.choice(REFUSALS), chance.choice((short, long, 4.0))))
        case "clash":
            name = chance.choice([*nodes, *controllers, *gateways])
            return Step(at, what, (name, chance.choice((0.3, 2.0, 20.0))))
        case "upgrade":
            return Step(at, what, (chance.choice([*controllers, *controllers, node]), chance.randrange(3)))
        case "fate_of_write":
            return Step(at, what, (chance.choice(("lost", "landed", "late")),))
        case "expire":
            return Step(at, what, (chance.choice([*nodes, *controllers, *controllers, *gateways]),))
        case "wall_jump":
            return Step(at, what, (chance.choice((-3600.0, -5.0, 5.0, 3600.0)),))
        case "slow":
            return Step(at, what, (chance.choice((0.02, 0.1)), span))
        case "tamper":
            return Step(at, what, (node, other, chance.choice(("duplicate", "reorder", "drop", "corrupt"))))
        case "corrupt":
            return Step(at, what, (node, chance.randrange(1 << 16), chance.randrange(BLOCK_BITS)))
        case "operate":
            kind = chance.choice(("drain", "drain", "undrain", "replace"))
            spare = nodes[-shape.stages :] if shape.spares else []
            substitute = chance.choice(["", *spare]) if kind == "replace" else ""
            return Step(at, what, (kind, node, substitute))
        case "reset":
            return Step(at, what, (node, chance.choice(everybody)))
        case "leave":
            return Step(at, what, (node,))
        case _:  # compact, cancel_operation
            return Step(at, what)


BLOCK_BITS = 4 * 64  # of a KV block of the oracle: one word for each of four positions
