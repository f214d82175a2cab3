"""Kubernetes objects in few words, as the mappings a YAML file holds.

lab = lab(["x/a", "x/b"])
agent.write(policy("x", "web", pods=select(lab, "x/a"), ingress=[rule("10.1.0.3", "80/TCP")]))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dataplane.addresses import family_of, format_address, parse_address
from dataplane.lab.probe import Port
from dataplane.lab.topology import LabPod
from dataplane.lab.world import Lab
from dataplane.model import PROTOCOL_NAMES, ContainerPort, Key, Pod

Object = dict[str, Any]
PodLabels = Mapping[str, Mapping[str, str]]  # by `namespace/name`
DEFAULT_PORTS = ("80/TCP", "80/UDP", "80/SCTP")


def pod(
    name: str,
    *ips: str,
    ports: Iterable[str] = DEFAULT_PORTS,
    host_network: bool = False,
) -> Pod:
    """A pod for a lab: `namespace/name`; without addresses the lab gives it some.

    Ports as `80/TCP`, or `http=80/TCP` with the name it has in the Pod.
    """
    return Pod(
        Key(*name.split("/")),
        ips=tuple(parse_address(ip) for ip in ips),
        host_network=host_network,
        ports=tuple(_container_port(port) for port in ports),
    )


def select(lab: Lab, *pods: str) -> list[Object]:
    """`podSelectorEndpoints` for pods of a lab: one entry per address, as a dual-stack policy has them."""
    return [
        {
            "name": name.split("/")[1],
            "namespace": name.split("/")[0],
            "podIP": format_address(ip),
            "hostIP": _host_ip(lab, family_of(ip)),
        }
        for name in pods
        for ip in lab.pod(name).ips
    ]


def rule(cidr: str, *ports: str, except_: Iterable[str] = ()) -> Object:
    """One allow rule. Ports as `80/TCP`, `80-90/TCP`, or `TCP` for every port of it; none: anything."""
    made: Object = {"cidr": cidr}
    if excepts := list(except_):
        made["except"] = excepts
    if ports:
        made["ports"] = [_port(text) for text in ports]
    return made


def allow(lab: Lab, *pods: str, ports: Iterable[str] = ()) -> list[Object]:
    """Rules that allow pods of a lab, by every address of theirs."""
    return [rule(format_address(ip), *ports) for name in pods for ip in lab.pod(name).ips]


def anywhere(*ports: str, except_: Iterable[str] = ()) -> list[Object]:
    """Rules that allow every address of both families, but `except_`."""
    excepts = list(except_)
    return [
        rule("0.0.0.0/0", *ports, except_=[cidr for cidr in excepts if ":" not in cidr]),
        rule("::/0", *ports, except_=[cidr for cidr in excepts if ":" in cidr]),
    ]


def policy(
    namespace: str,
    name: str,
    pods: Iterable[Object] = (),
    *,
    ingress: Iterable[Object] | None = None,
    egress: Iterable[Object] | None = None,
    isolate: Iterable[str] | None = None,
    slice_: str = "1",
) -> Object:
    """A PolicyEndpoint. A direction given, even empty, isolates in it; `isolate` overrules that."""
    if isolate is None:
        given = {"Ingress": ingress, "Egress": egress}
        isolate = [direction for direction, rules in given.items() if rules is not None]
    spec: Object = {
        "policyRef": {"name": name, "namespace": namespace},
        "podIsolation": list(isolate),
        "podSelectorEndpoints": list(pods),
    }
    if ingress is not None:
        spec["ingress"] = list(ingress)
    if egress is not None:
        spec["egress"] = list(egress)
    return {
        "apiVersion": "networking.k8s.aws/v1alpha1",
        "kind": "PolicyEndpoint",
        "metadata": {"name": f"{name}-{slice_}", "namespace": namespace},
        "spec": spec,
    }


def deny(lab: Lab, *pods: str, name: str = "default-deny", directions: str = "ingress egress") -> Object:
    """A policy that isolates pods and allows nothing; its namespace is that of the first pod."""
    isolate = [direction.capitalize() for direction in directions.split()]
    return policy(pods[0].split("/")[0], name, select(lab, *pods), isolate=isolate)


def network_policy(name: str, spec: Object) -> Object:
    """A NetworkPolicy, `namespace/name`."""
    namespace, _, own = name.partition("/")
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": own, "namespace": namespace},
        "spec": spec,
    }


def pod_object(lab: Lab, one: LabPod, labels: Mapping[str, str] | None = None) -> Object:
    """The v1 Pod of a lab's pod."""
    ports: list[Object] = [
        {"containerPort": port.port, "protocol": PROTOCOL_NAMES[port.protocol]}
        | ({"name": port.name} if port.name else {})
        for port in one.ports
    ]
    host = one.netns == lab.node
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": one.key.name, "namespace": one.key.namespace, "labels": dict(labels or {})},
        "spec": {"hostNetwork": host, "containers": [{"name": "main", "image": "-", "ports": ports}]},
        "status": {
            "phase": "Running",
            "hostIPs": [{"ip": format_address(ip)} for ip in lab.node_ips],
            "podIPs": [{"ip": format_address(ip)} for ip in one.ips],
        },
    }


def until(condition: Callable[[], Any], timeout: float = 5.0, what: str = "") -> Any:
    """Wait until `condition()` is true, and return its value. AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {timeout} s: {what or condition}")
        time.sleep(0.01)


def _container_port(text: str) -> ContainerPort:
    name, _, port = text.rpartition("=")
    parsed = Port.parse(port)
    return ContainerPort(name or None, parsed.protocol, parsed.port)


def _host_ip(lab: Lab, family: int) -> str:
    return next(format_address(ip) for ip in lab.node_ips if family_of(ip) == family)


def _port(text: str) -> Object:
    number, slash, name = text.partition("/")
    if not slash:
        return {"protocol": number}
    first, dash, last = number.partition("-")
    made: Object = {"protocol": name, "port": int(first)}
    if dash:
        made["endPort"] = int(last)
    return made
