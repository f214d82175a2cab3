"""What a Pod's spec tells about whom the pod will talk to: AWS credentials, and which DNS server.

Only hints: whatever cannot be read tells nothing, and nothing is enforced by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dataplane.model import Hint

NODE_LOCAL_DNS = "169.254.20.10"
_POD_IDENTITY_AGENT = ("169.254.170.23", "fd00:ec2::23")

# What EKS's webhooks put into a pod (IRSA, Pod Identity), and the SDKs' other sources of credentials:
# each is asked before the instance's metadata service.
_AUDIENCES = {"sts.amazonaws.com": Hint.WEB_IDENTITY, "pods.eks.amazonaws.com": Hint.POD_IDENTITY}
_OWN = {
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT",
}
_OTHER_SERVICE = (
    "AWS_ENDPOINT_URL"  # …_S3 and so on: something that speaks AWS's protocol, with keys of its own
)

_NONE: frozenset[Hint] = frozenset()
_SHARED: dict[frozenset[Hint], frozenset[Hint]] = {}  # thousands of pods, a handful of different sets


def hints_of(spec: Mapping[object, object]) -> frozenset[Hint]:
    """The hints in a Pod's `spec`. Never raises."""
    found = {*_dns(spec), *_tokens(spec)}
    containers = [*_maps(spec.get("containers")), *_maps(spec.get("initContainers"))]
    for container in containers:
        for entry in _maps(container.get("env")):
            hint = _variable(entry.get("name"), entry.get("value"))
            if hint is not None:
                found.add(hint)
        for mount in _maps(container.get("volumeMounts")):
            path = mount.get("mountPath")
            if isinstance(path, str) and ".aws" in path.split("/"):
                found.add(Hint.OWN_CREDENTIALS)
    # A Secret whose keys become variables may hold credentials; it is not for us to look.
    if Hint.AWS in found and any(container.get("envFrom") for container in containers):
        found.add(Hint.OWN_CREDENTIALS)
    if not found:
        return _NONE
    hints = frozenset(found)
    return _SHARED.setdefault(hints, hints)


def _variable(name: object, value: object) -> Hint | None:
    if not isinstance(name, str) or not name.startswith("AWS_"):
        return None
    text = value if isinstance(value, str) else ""
    if name == "AWS_WEB_IDENTITY_TOKEN_FILE":
        return Hint.WEB_IDENTITY
    if name == "AWS_CONTAINER_CREDENTIALS_FULL_URI":
        agent = not text or any(address in text for address in _POD_IDENTITY_AGENT)
        return Hint.POD_IDENTITY if agent else Hint.OWN_CREDENTIALS
    if name == "AWS_EC2_METADATA_DISABLED":
        return Hint.OWN_CREDENTIALS if text.lower() == "true" else None
    if name in _OWN or name.startswith(_OTHER_SERVICE):
        return Hint.OWN_CREDENTIALS
    return Hint.AWS


def _tokens(spec: Mapping[object, object]) -> Iterator[Hint]:
    for volume in _maps(spec.get("volumes")):
        projected = volume.get("projected")
        for source in _maps(projected.get("sources") if isinstance(projected, Mapping) else None):
            token = source.get("serviceAccountToken")
            audience = token.get("audience") if isinstance(token, Mapping) else None
            if isinstance(audience, str) and audience in _AUDIENCES:
                yield _AUDIENCES[audience]


def _dns(spec: Mapping[object, object]) -> Iterator[Hint]:
    config = spec.get("dnsConfig")
    servers = config.get("nameservers") if isinstance(config, Mapping) else None
    if isinstance(servers, list) and NODE_LOCAL_DNS in servers:
        yield Hint.NODE_LOCAL_DNS
    elif servers or spec.get("dnsPolicy") in ("None", "Default"):
        yield Hint.OWN_DNS


def _maps(value: object) -> Iterator[Mapping[object, object]]:
    """The members of a list that are maps; nothing where it is no list."""
    for each in value if isinstance(value, list) else ():
        if isinstance(each, Mapping):
            yield each
