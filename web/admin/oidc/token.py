"""Whether an ID token is what it has to be: signed by a key of the provider, for us, for this login, and still good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from controlplane.contract.oidc import OidcConfig
from web.admin.oidc.login import LoginError

# Of public keys alone: with a shared one (HS256) whoever can verify a token can also make one.
ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
KEY_TYPES = {"RSA", "EC", "OKP"}
KEYS_MAX = 64
LEEWAY_S = 30  # between the provider's clock and ours
EXPIRED = (
    "What the login provider said about you has expired already: its clock and the controller's may differ."
)
NOT_VERIFIED = (
    "What the login provider said about you could not be verified. Start again; if it stays so, tell whoever operates"
    " the cluster: the controller's log has the reason."
)


def verified(
    token: str, keys: Sequence[Mapping[str, Any]], config: OidcConfig, nonce: str, now_unix_s: float
) -> dict[str, Any]:
    """The claims of an ID token. `keys`: of the provider's JWKS document. Raises LoginError."""
    from joserfc import errors, jwt

    must: dict[str, Any] = {
        "sub": {"essential": True},
        "exp": {"essential": True},
        "iat": {"essential": True},
    }
    must["iss"] = {"essential": True, "value": config.issuer}
    must["aud"] = {"essential": True, "value": config.client_id}
    must["nonce"] = {"essential": True, "value": nonce}
    try:
        claims = jwt.decode(token, _key_set(keys), algorithms=ALGORITHMS).claims
        if not isinstance(claims, dict):
            raise LoginError(403, NOT_VERIFIED, "the ID token is no object")
        jwt.JWTClaimsRegistry(now=int(now_unix_s), leeway=LEEWAY_S, **must).validate(claims)
    except errors.ExpiredTokenError as error:
        raise LoginError(403, EXPIRED, f"the ID token expired at {claims.get('exp')!r:.40}") from error
    except (errors.JoseError, ValueError, TypeError) as error:
        raise LoginError(403, NOT_VERIFIED, f"the ID token: {error}") from error
    party, audience = claims.get("azp"), claims["aud"]
    if party != config.client_id and (
        party is not None or (isinstance(audience, list) and len(audience) > 1)
    ):
        raise LoginError(403, NOT_VERIFIED, f"the ID token was made for {party!r:.300}")
    return claims


def _key_set(keys: Sequence[Mapping[str, Any]]) -> Any:
    from joserfc import errors
    from joserfc.jwk import JWKRegistry, KeySet

    usable = []
    for key in keys[:KEYS_MAX]:
        if key.get("kty") in KEY_TYPES and key.get("use", "sig") == "sig":
            try:
                usable.append(JWKRegistry.import_key(dict(key)))
            except (errors.JoseError, ValueError, TypeError, KeyError):
                continue  # of a curve or a shape that we do not know; a token that needs it is refused for want of it
    return KeySet(usable)
