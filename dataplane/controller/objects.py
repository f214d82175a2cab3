"""PolicyEndpoints between their form in the API and what `slices` computes with."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from dataplane.controller.slices import Contents, Desired, Found, Head, Slice
from dataplane.manifests import selector_manifest
from dataplane.model import Key, NetworkPolicy, PodEndpoint, PolicyEndpoint, Rule
from dataplane.policy.resolve import Entry
from dataplane.sources.fields import show
from dataplane.sources.manifest import manifest
from dataplane.sources.objects import CHANGED_ANNOTATION, policy_endpoint

MANAGED_BY_LABEL = "app.kubernetes.io/managed-by"
MANAGER = "podgate"

Raw = dict[str, Any]


def is_ours(raw: Raw) -> bool:
    """Whether we made this object, and may change it."""
    labels = raw["metadata"].get("labels")
    return isinstance(labels, Mapping) and labels.get(MANAGED_BY_LABEL) == MANAGER


def read(raw: Raw) -> Found:
    """An object of ours. Whatever is in it, somebody else's changes included: then it is not `clean`."""
    metadata = raw["metadata"]
    endpoint, _ = policy_endpoint(raw, "")
    key = Key(str(metadata.get("namespace")), str(metadata.get("name")))
    made: Slice
    clean = False
    if endpoint is None or endpoint.policy.namespace != key.namespace:
        # It belongs to no policy: "" is the name of none.
        made = Slice(Head(Key(key.namespace, ""), "", "", frozenset()), None, Contents())
    else:
        spec = raw["spec"]
        owner = _owner(metadata)
        head = Head(
            endpoint.policy,
            str(owner.get("uid") or ""),
            _canonical(spec.get("podSelector")),
            endpoint.isolates,
        )
        made = Slice(
            head,
            endpoint.port_group,
            Contents(endpoint.endpoints, _entries(endpoint.ingress), _entries(endpoint.egress)),
        )
        # What we read, written again, must be what is there: nothing that we do not know may hide in it.
        ours = body(made, "")
        owners = ours["metadata"]["ownerReferences"]
        clean = ours["spec"] == spec and owners == metadata.get("ownerReferences")
    return Found(key.name, str(metadata.get("uid")), str(metadata.get("resourceVersion")), made, clean)


def _owner(metadata: Raw) -> Mapping[str, Any]:
    owners = metadata.get("ownerReferences")
    first = owners[0] if isinstance(owners, list) and owners else None
    return first if isinstance(first, Mapping) else {}


def desired(policy: NetworkPolicy, made: Iterable[PolicyEndpoint]) -> Desired:
    """What the resolver made of a policy, by port group."""
    pods: defaultdict[str | None, list[PodEndpoint]] = defaultdict(list)
    ingress: defaultdict[str | None, list[Rule]] = defaultdict(list)
    egress: defaultdict[str | None, list[Rule]] = defaultdict(list)
    isolates = None
    for each in made:
        isolates = each.isolates
        # Without an address of its own a pod cannot be named: the address is another pod's by now.
        pods[each.port_group] += (one for one in each.endpoints if one.pod_ip)
        ingress[each.port_group] += each.ingress
        egress[each.port_group] += each.egress
    assert isolates is not None
    head = Head(policy.key, policy.uid, _canonical(selector_manifest(policy.pod_selector)), isolates)
    return Desired(
        head,
        {
            group: Contents(tuple(pods[group]), _entries(ingress[group]), _entries(egress[group]))
            for group in pods
        },
    )


def body(part: Slice, trigger: str) -> Raw:
    """A slice as it is created. `trigger`: when the change began that it is written for."""
    head, contents = part.head, part.contents
    endpoint = PolicyEndpoint(
        key=Key(head.policy.namespace, ""),
        policy=head.policy,
        isolates=head.isolates,
        endpoints=contents.endpoints,
        ingress=_rules(contents.ingress),
        egress=_rules(contents.egress),
        port_group=part.group,
    )
    written = manifest(endpoint, NetworkPolicy(head.policy, uid=head.uid))
    metadata = written["metadata"]
    del metadata["name"]  # the API server completes generateName
    metadata["labels"] = {MANAGED_BY_LABEL: MANAGER} | metadata.get("labels", {})
    metadata["annotations"] = {CHANGED_ANNOTATION: trigger}
    metadata.setdefault("ownerReferences", [])
    written["spec"]["podSelector"] = json.loads(head.selector or "{}")
    for entry in written["spec"].get("podSelectorEndpoints", ()):
        # Required by the definition. Readers that find none there go by the pod's name.
        entry.setdefault("hostIP", "")
    return written


def patch(before: Found, part: Slice, trigger: str) -> list[Raw]:
    """A JSON patch (RFC 6902) that makes an object say `part`, provided that it is still as it was found.

    It leaves alone what others have added to it: labels, finalizers. A merge patch would leave in
    `podSelector` what is no longer there.
    """
    written = body(part, trigger)
    metadata = written["metadata"]
    values = {
        # Another version than that of the object is a conflict.
        "/metadata/resourceVersion": before.version,
        "/metadata/annotations": metadata["annotations"],
        "/metadata/ownerReferences": metadata["ownerReferences"],
        "/spec": written["spec"],
    }
    return [{"op": "add", "path": path, "value": value} for path, value in values.items()]


def trigger_time(since: float) -> str:
    """The RFC 3339 text, in nanoseconds, of a moment in seconds since the epoch."""
    whole = int(since)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{int((since - whole) * 1e9):09}Z"


def describe(raw: Raw) -> str:
    """An object's name, for people."""
    metadata = raw["metadata"]
    return f"{metadata.get('namespace')}/{metadata.get('name')}" if metadata.get("name") else show(metadata)


def _canonical(selector: object) -> str:
    return json.dumps({} if selector is None else selector, sort_keys=True)


def _entries(rules: Iterable[Rule]) -> tuple[Entry, ...]:
    return tuple([(rule.cidr, rule.excepts, rule.ports) for rule in rules])


def _rules(entries: Iterable[Entry]) -> tuple[Rule, ...]:
    return tuple([Rule(cidr, excepts, ports) for cidr, excepts, ports in entries])
