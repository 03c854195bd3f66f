"""Traces of a node (OpenTelemetry): what its schedulers' requests go through, and what their prompts cost its stage.

Gateways send with a request whose trace is kept the span that theirs is below (`Submit.trace`); without
`gateway.otlp_endpoint` there is no Tracer, and nobody asks for one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from msgspec.structs import replace

from controlplane.contract.config import ClusterConfig
from controlplane.contract.ids import Member
from controlplane.contract.otlp import Otlp, ns
from controlplane.contract.requests import Cancel, GatewayMessage, RefusalCode, Submit
from controlplane.contract.topology import Pipeline, change_of
from controlplane.contract.trace_context import parsed
from controlplane.contract.version import code_version
from dataplane._fast.blocktable import Rows
from dataplane.core.events import Deliver, Effect, Refuse, RunStep
from dataplane.core.messages import StepMeta, step_tokens
from dataplane.core.request import Phase
from dataplane.core.scheduler import Scheduler
from dataplane.core.spans import Span, Spans

GOES_ON = (RefusalCode.DROPPED, RefusalCode.SUPERSEDED)  # elsewhere: no error
CAUSES = {  # of a request that had rows before, and is in such a phase
    Phase.WAITING: "it made room for others: their KV needed its blocks",
    Phase.RECOVERING: "its scheduler asks the stages what they hold of it",
}


class Tracer:
    """Belongs to one event loop; the exporter's thread is its own."""

    def __init__(self, endpoint: str, me: Member, stage: int, model: str) -> None:
        """Raises ConfigError."""
        self._otlp = Otlp(endpoint, "kevlarflow-node", me.node, code_version())
        self._me = me
        self._stage = stage
        self._common = {"gen_ai.provider.name": "kevlarflow", "gen_ai.request.model": model}
        self._spans = Spans()

    @classmethod
    def of(cls, config: ClusterConfig, me: Member, stage: int) -> Tracer | None:
        """None: the settings name no collector. Raises ConfigError."""
        endpoint = config.gateway.otlp_endpoint
        return cls(endpoint, me, stage, config.model_name) if endpoint else None

    # ---- schedulers

    def on_gateway(self, session: int, message: GatewayMessage) -> None:
        """Before a scheduler of ours gets it."""
        now = time.monotonic()
        match message:
            case Submit():
                self._spans.submitted(message, session, now)
            case Cancel(rid):
                self._send(self._spans.gone(rid, "cancelled by its gateway", now, session))

    def before(self, effects: list[Effect]) -> list[Effect]:
        """The effects to be performed: steps with prompts of traced requests say so to the stages."""
        if not self._spans:
            return effects
        now = time.monotonic()
        found: list[Effect] = []
        for effect in effects:
            match effect:
                case RunStep(meta, tokens):
                    spans, parents = self._spans.issued(Rows(meta.rows).rids.tolist(), now)
                    self._send(spans)
                    effect = RunStep(replace(meta, traces=parents), tokens) if parents else effect
                case Deliver(_, tokens):
                    self._send(self._spans.delivered(tokens, now))
                case Refuse(session, refused):
                    # Its words may quote the request.
                    code = refused.code
                    self._send(
                        self._spans.gone(refused.rid, code.value, now, session, error=code not in GOES_ON)
                    )
            found.append(effect)
        return found

    def on_epoch(self, before: Pipeline | None, pipeline: Pipeline) -> None:
        """The pipeline has other members, or others in other places."""
        cause = (
            change_of(before, pipeline)
            if before is not None
            else f"{pipeline.id} is in epoch {pipeline.epoch}"
        )
        self._spans.stopped(pipeline.id, cause, time.monotonic())

    def on_end(self, scheduler: Scheduler) -> None:
        """It is scheduled elsewhere, or by a successor here."""
        self._send(self._spans.ended(scheduler.pipeline, "scheduled elsewhere from now on", time.monotonic()))

    def tick(self, scheduler: Scheduler) -> None:
        """Who had to make room has no event of its own."""
        for rid in self._spans.running(scheduler.pipeline) if self._spans else ():
            request = scheduler.requests.get(rid)
            if request is not None and request.phase in CAUSES:
                self._spans.stopped(scheduler.pipeline, CAUSES[request.phase], time.monotonic(), rid)

    # ---- stages

    def on_step(self, meta: StepMeta, began: float, ended: float) -> None:
        """A step with prompts of traced requests has been computed here. Monotonic seconds."""
        told: dict[str, str | int] = {
            "kevlarflow.pipeline": meta.pipeline,
            "kevlarflow.step": meta.step,
            "kevlarflow.epoch": meta.fence.epoch,
            "kevlarflow.step_tokens": step_tokens(meta),
        }
        self._send(Span("prefill step", parent, began, ended, told) for parent in meta.traces)

    def close(self) -> None:
        self._otlp.close()

    def _send(self, spans: Iterable[Span]) -> None:
        to_unix = time.time() - time.monotonic()
        for span in spans:
            context = parsed(span.parent)
            if context is None:
                continue  # not of a gateway of ours
            told: dict[str, str | int] = {**self._common, **span.told}
            told |= {"kevlarflow.node": self._me.node, "kevlarflow.stage": self._stage}
            made = self._otlp.tracer.start_span(
                span.name,
                self._otlp.below(context.trace, context.parent, context.sampled),
                attributes=told,
                start_time=ns(span.began + to_unix),
            )
            if span.error:
                made.set_status(self._otlp.trace.StatusCode.ERROR, span.error)
            made.end(ns(max(span.began, span.ended) + to_unix))
