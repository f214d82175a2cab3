"""Where the cluster's DNS is, as far as the objects tell."""

from __future__ import annotations

from typing import NamedTuple

from dataplane.addresses import parse_address
from dataplane.model import PROTOCOLS, Key, LabelSelector
from dataplane.policy.check.world import World

TCP, UDP = PROTOCOLS["TCP"], PROTOCOLS["UDP"]
PORT = 53
NODE_LOCAL = parse_address("169.254.20.10")

_SYSTEM = ("kube-system", "openshift-dns")
# CoreDNS and kube-dns both carry it, as node-local DNS and its builds do theirs.
_DNS_LABEL = LabelSelector.of({"k8s-app": "kube-dns"})
_NODE_LOCAL_LABELS = {"node-local-dns", "nodelocaldns", "node-local-dns-cache"}


class Server(NamedTuple):
    """One address that answers DNS queries, and its port (the pod's, not the Service's)."""

    address: bytes
    protocol: int
    port: int


class DnsServers:
    """The DNS servers of a cluster: pods behind a system Service with port 53, else pods labelled kube-dns.

    `node_local`: node-local DNS runs (its pods are among the objects). `services` and
    `cluster_ips`: the DNS Services and their addresses; `pods`: the pods that answer.
    """

    def __init__(self, world: World) -> None:
        servers: set[Server] = set()
        self.cluster_ips: list[bytes] = []
        self.pods: set[Key] = set()
        self.services: set[Key] = set()
        for service in world.snapshot.services:
            ports = [port for port in service.ports if port.port == PORT]
            if service.key.namespace not in _SYSTEM or not service.selector or not ports:
                continue
            backends = world.backends(service)
            if not backends:
                continue
            self.cluster_ips += service.cluster_ips
            self.services.add(service.key)
            self.pods.update(pod.key for pod in backends)
            for pod in backends:
                for protocol, _, target in ports:
                    for address in pod.ips:
                        if isinstance(target, int):
                            servers.add(Server(address, protocol, target))
                        else:
                            servers.update(
                                Server(address, protocol, port.port)
                                for port in pod.ports
                                if port.name == target and port.protocol == protocol
                            )
        if not servers:
            for pod in world.select(frozenset(_SYSTEM), _DNS_LABEL):
                self.pods.add(pod.key)
                servers.update(Server(ip, protocol, PORT) for ip in pod.ips for protocol in (TCP, UDP))
        self.servers = sorted(servers)
        self.node_local = any(
            pod.labels.get("k8s-app") in _NODE_LOCAL_LABELS for pod in world.snapshot.pods if not pod.finished
        )
