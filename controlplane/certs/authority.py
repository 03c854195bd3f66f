"""Certificates (X.509, EC P-256): an authority of the cluster's own, and what it signs. Times are arguments."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from controlplane.contract.errors import ConfigError

SKEW = timedelta(minutes=10)  # clocks of hosts may differ by so much
AUTHORITY_DAYS = 3650
# An authority may sign its successor, and that one certificates: whoever trusts only the old one accepts both.
PATH_LENGTH = 1

ORGANISATION = "KevlarFlow"


@dataclass(frozen=True, slots=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, cluster: str, now: datetime, days: int = AUTHORITY_DAYS) -> Authority:
        """A new one, which signs itself."""
        key = ec.generate_private_key(ec.SECP256R1())
        # The serial number is in its name, so that two authorities of a cluster are told apart by name.
        serial = x509.random_serial_number()
        name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANISATION),
                x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, cluster),
                x509.NameAttribute(NameOID.COMMON_NAME, f"authority {serial & 0xFFFFFFFF:08x}"),
            ]
        )
        return cls(_authority(name, key.public_key(), name, key, serial, now, days), key)

    @classmethod
    def load(cls, pem: bytes) -> Authority:
        """Raises ConfigError."""
        try:
            key = serialization.load_pem_private_key(pem, None)
            certificate = x509.load_pem_x509_certificate(pem)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"not an authority's certificate and key: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError("an authority's key must be one for elliptic curves")
        return cls(certificate, key)

    @property
    def cluster(self) -> str:
        """Raises ConfigError if it is no authority of ours."""
        units = self.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
        if not units:
            raise ConfigError("this authority names no cluster; `kfadmin certs init` makes one that does")
        return str(units[0].value)

    def pem(self) -> bytes:
        """Certificate and key: a secret."""
        return _pem(self.certificate) + _key_pem(self.key)

    def cross_signed_by(self, other: Authority, now: datetime) -> x509.Certificate:
        """This authority's key and name, signed by another one, for as long as the other one is valid."""
        days = max(1, (other.certificate.not_valid_after_utc - now).days)
        mine, theirs = self.certificate, other.certificate
        serial = x509.random_serial_number()
        public = self.key.public_key()
        return _authority(mine.subject, public, theirs.subject, other.key, serial, now, days)

    def issue(
        self,
        names: Sequence[str],
        hosts: Sequence[str],
        now: datetime,
        lifetime: timedelta,
        chain: Sequence[x509.Certificate] = (),
    ) -> bytes:
        """PEM of a new key, its certificate for the DNS names `names` and the addresses or names `hosts`, and `chain`.

        The first name is also its common name."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives = [x509.DNSName(name) for name in names] + [_host(host) for host in hosts]
        # A common name has 64 characters at most; nobody looks at it but people and etcd's log.
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
        ends = min(now + lifetime, self.certificate.not_valid_after_utc)
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - SKEW)
            .not_valid_after(ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(issuer_id, critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return _key_pem(key) + _pem(certificate) + b"".join(_pem(link) for link in chain)


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    # A name, a kind of key or a signature that differs: cryptography has one error for each.
    except Exception:
        return False
    return True


def load_chain(pem: bytes) -> list[x509.Certificate]:
    """Every certificate of a file. Raises ConfigError if there is none."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"no certificates: {error}") from error


def alternatives(certificate: x509.Certificate) -> tuple[list[str], list[str]]:
    """(DNS names, IP addresses) that a certificate names."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return [], []
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return names.get_values_for_type(x509.DNSName), addresses


def as_certified(host: str) -> str:
    """An address or a DNS name as `alternatives` has it: one spelling of an IPv6 address, no zone, lower case."""
    return str(_host(host).value).lower()


def bundle(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(_pem(certificate) for certificate in certificates)


def _authority(
    subject: x509.Name,
    public: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    serial: int,
    now: datetime,
    days: int,
) -> x509.Certificate:
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(serial)
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=PATH_LENGTH), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(issuer_id, critical=False)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]").partition("%")[0]))
    except ValueError:
        return x509.DNSName(host)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
