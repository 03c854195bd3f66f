"""The gRPC services, as method names and codecs.

Messages are msgspec Structs in MessagePack: decoding validates against the types, and no second set of
generated classes has to be kept equal to the first (docs/decisions/control-plane.md).

    Frontdoor.Serve   gateway -> node         stream GatewayMessage <-> stream SchedulerMessage
    Control.Report    node    -> controller   stream ReportBatch    <-> stream ReportAck
                      node -> relay of its host -> controller: the same
    Figures.Report    gateway -> controller   GatewayReport -> ReportTaken; nothing is decided on it

Each call carries the cluster's secret as `authorization: Bearer <hex HMAC>` (see `auth.py`), and to a front door the
schema of what the gateway speaks. A front door that serves it answers with its own, as initial metadata. A field that
is added needs no new schema: who does not know it passes over it. The schema is raised where older code would misread
or could not decode a message; then a node refuses newer gateways, and those older than the oldest that it still speaks
with: one side decides, before a message has gone either way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
import msgspec

from controlplane.contract.figures import GatewayReport, ReportTaken
from controlplane.contract.reports import (
    REPORT_SCHEMA,
    NodeReport,
    RelayedBatch,
    ReportAck,
    ReportBatch,
    ReportHeader,
)
from controlplane.contract.requests import GatewayMessage, SchedulerMessage

FRONTDOOR = "kevlarflow.Frontdoor"
FRONTDOOR_SERVE = f"/{FRONTDOOR}/Serve"
CONTROL = "kevlarflow.Control"
CONTROL_REPORT = f"/{CONTROL}/Report"
FIGURES = "kevlarflow.Figures"
FIGURES_REPORT = f"/{FIGURES}/Report"

STREAM_SCHEMA = 1  # of GatewayMessage and SchedulerMessage
STREAM_SCHEMA_OLDEST = 1
STREAM_SCHEMA_KEY = "kf-schema"
ACCEPTED = ((STREAM_SCHEMA_KEY, str(STREAM_SCHEMA)),)  # the front door's first answer

# Of servers. Peers ping often, to notice a silent path; and what a busy machine has delayed comes at once. By default
# gRPC takes that for an attack, and cuts the connection.
PINGS_WELCOME = (("grpc.http2.min_ping_interval_without_data_ms", 500), ("grpc.http2.max_ping_strikes", 0))

encode = msgspec.msgpack.Encoder().encode
decode_gateway_message = msgspec.msgpack.Decoder(GatewayMessage).decode
decode_scheduler_message = msgspec.msgpack.Decoder(SchedulerMessage).decode
decode_reports = msgspec.msgpack.Decoder(ReportBatch).decode
decode_relayed = msgspec.msgpack.Decoder(RelayedBatch).decode
decode_report = msgspec.msgpack.Decoder(NodeReport).decode
decode_header = msgspec.msgpack.Decoder(ReportHeader).decode  # of a batch of reports
decode_ack = msgspec.msgpack.Decoder(ReportAck).decode
decode_gateway_report = msgspec.msgpack.Decoder(GatewayReport).decode
decode_taken = msgspec.msgpack.Decoder(ReportTaken).decode


def refusal(metadata: Mapping[str, str]) -> str:
    """Why a node cannot serve a gateway whose call has this metadata, and what to do; "" if it can."""
    said = metadata.get(STREAM_SCHEMA_KEY, "1")
    theirs = int(said) if said.isdecimal() else 0
    if STREAM_SCHEMA_OLDEST <= theirs <= STREAM_SCHEMA:
        return ""
    older = "node" if theirs > STREAM_SCHEMA else "gateway"
    return (
        f"the gateway's messages have schema {said}, this node reads {STREAM_SCHEMA_OLDEST} to {STREAM_SCHEMA}: "
        f"restart the {older} with the newer code"
    )


def refusal_of_reports(schema: int) -> str:
    """Why batches of another schema cannot be taken, and what to do."""
    older = "receiver" if schema > REPORT_SCHEMA else "sender"
    return (
        f"the reports have schema {schema}, their receiver reads {REPORT_SCHEMA}: "
        f"restart the {older} with the newer code"
    )


def stream_handler(service: str, method: str, behaviour: Any, decode: Any) -> grpc.GenericRpcHandler:
    """A server-side handler for one bidirectional stream, to be given to `server.add_generic_rpc_handlers`."""
    handler = grpc.stream_stream_rpc_method_handler(
        behaviour, request_deserializer=decode, response_serializer=encode
    )
    return grpc.method_handlers_generic_handler(service, {method: handler})


def unary_handler(service: str, method: str, behaviour: Any) -> grpc.GenericRpcHandler:
    """As `stream_handler`, for one question and its answer; `behaviour` decodes by itself, since grpc's answer to what
    it cannot decode is silence."""
    handler = grpc.unary_unary_rpc_method_handler(behaviour, response_serializer=encode)
    return grpc.method_handlers_generic_handler(service, {method: handler})
