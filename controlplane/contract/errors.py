"""Errors that cross planes, named by whose fault they are."""

from __future__ import annotations


class KevlarFlowError(Exception):
    """Base of all our errors: its text says what to do."""


class ConfigError(KevlarFlowError):
    """The operator's: a setting, file or model directory is wrong or missing."""


class RequestError(KevlarFlowError):
    """The client's: the request can never succeed as it stands."""


class PeerError(KevlarFlowError):
    """A peer's: it broke the protocol, or is gone."""


class NewerSchema(PeerError):
    """A peer's: newer code has written this, and what would be lost by rewriting it cannot be known."""


class StaleEpoch(PeerError):
    """A peer's: it speaks of an epoch that is over."""


class Unavailable(KevlarFlowError):
    """The environment's: something needed is away; trying later may help."""
