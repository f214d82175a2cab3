"""What `podgate check` finds, and what it must leave alone. Every case is written by hand.

The world: namespace shop with web (behind a Service on port 80), db, a finished job and an agent on
the host's network; monitoring with prometheus; kube-system with DNS; empty without pods.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from dataplane.model import Snapshot
from dataplane.policy.check import CHECKS, Finding, Severity, check
from dataplane.sources.contents import read_contents
from dataplane.sources.store import Store

Raw = dict[str, Any]

TCP, UDP = "TCP", "UDP"
DNS_PORTS: list[Raw] = [{"port": 53, "protocol": UDP}, {"port": 53, "protocol": TCP}]
NAME = "kubernetes.io/metadata.name"
AGENT = "http://169.254.170.23/v1/credentials"  # the only value of a variable that matters here


def ns(name: str, /, **labels: str) -> Raw:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pod(name: str, ip: str, labels: Raw, *ports: tuple[str, int, str], **more: Any) -> Raw:
    """`namespace/name`; more: phase, host, spec (merged in), env (names of variables)."""
    namespace, _, own = name.partition("/")
    container: Raw = {
        "ports": [
            {"name": each, "containerPort": number, "protocol": proto} for each, number, proto in ports
        ],
        "env": [{"name": each, "value": AGENT} for each in more.get("env", ())],
    }
    spec = {"hostNetwork": more.get("host", False), "containers": [container], **more.get("spec", {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": own, "namespace": namespace, "labels": labels},
        "spec": spec,
        "status": {"phase": more.get("phase", "Running"), "hostIP": "192.0.2.1", "podIPs": [{"ip": ip}]},
    }


def service(name: str, ip: str, selector: Raw, *ports: Raw) -> Raw:
    namespace, _, own = name.partition("/")
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": own, "namespace": namespace},
        "spec": {"selector": selector, "clusterIPs": [ip], "ports": list(ports)},
    }


def policy(spec: Raw, name: str = "shop/p", **annotations: str) -> Raw:
    namespace, _, own = name.partition("/")
    given = {f"podgate.dev/{key.replace('_', '-')}": value for key, value in annotations.items()}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": own, "namespace": namespace, "annotations": given},
        "spec": spec,
    }


WORLD: list[Raw] = [
    *(ns(name) for name in ("shop", "monitoring", "kube-system", "empty")),
    pod("shop/web-0", "10.1.0.10", {"app": "web"}, ("http", 8080, TCP)),
    pod("shop/web-1", "10.1.0.11", {"app": "web"}, ("http", 8080, TCP)),
    pod("shop/db-0", "10.1.0.20", {"app": "db"}, ("sql", 5432, TCP)),
    pod("shop/job-0", "10.1.0.30", {"app": "job"}, phase="Succeeded"),
    pod("shop/agent-0", "192.0.2.1", {"app": "agent"}, host=True),
    pod("monitoring/prom-0", "10.1.1.10", {"app": "prom"}, ("ui", 9090, TCP)),
    pod("kube-system/dns-0", "10.1.2.10", {"k8s-app": "kube-dns"}, ("dns", 53, UDP), ("dns-tcp", 53, TCP)),
    service("shop/web", "172.20.0.80", {"app": "web"}, {"port": 80, "targetPort": "http"}),
    service("kube-system/kube-dns", "172.20.0.10", {"k8s-app": "kube-dns"}, *DNS_PORTS),
]


def snapshot(raws: list[Raw]) -> Snapshot:
    found = read_contents(json.dumps({"kind": "List", "items": raws}).encode(), "f", only_json=True)
    store = Store()
    store.replace("f", found.objects, found.problems)
    return store.snapshot()


def findings(*more: Raw, world: list[Raw] | None = None) -> tuple[Finding, ...]:
    return check(snapshot([*(WORLD if world is None else world), *more]))


def found(*more: Raw, world: list[Raw] | None = None) -> list[str]:
    """`id field` of each finding."""
    return [f"{each.check} {each.field}" for each in findings(*more, world=world)]


def only(app: str) -> Raw:
    return {"matchLabels": {"app": app}}


def ingress(*rules: Raw, to: str = "web", **more: Any) -> Raw:
    return policy({"podSelector": only(to), "policyTypes": ["Ingress"], "ingress": list(rules), **more})


def egress(*rules: Raw, of: str = "web", **more: Any) -> Raw:
    return policy({"podSelector": only(of), "policyTypes": ["Egress"], "egress": list(rules), **more})


def peer(app: str) -> Raw:
    return {"podSelector": only(app)}


def namespace(name: str) -> Raw:
    return {"namespaceSelector": {"matchLabels": {NAME: name}}}


def block(cidr: str, *holes: str) -> Raw:
    return {"ipBlock": {"cidr": cidr, "except": list(holes)}}


ALLOW_DNS: Raw = {
    "to": [{**namespace("kube-system"), "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}],
    "ports": DNS_PORTS,
}
WEB = {"to": [peer("db")], "ports": [{"port": 5432}]}

# id → cases: objects beside the world, and the field that is named.
BAD: list[tuple[str, list[Raw], str]] = [
    ("selects-no-pod", [ingress(to="wbe")], "spec.podSelector"),
    ("selects-no-pod", [ingress(to="prom")], "spec.podSelector"),
    ("selects-only-finished-pods", [ingress(to="job")], "spec.podSelector"),
    ("selects-only-host-network", [ingress(to="agent")], "spec.podSelector"),
    ("empty-namespace", [policy({"podSelector": only("x")}, "empty/p")], "spec.podSelector"),
    ("unknown-namespace", [policy({"podSelector": {}}, "shpo/p")], "metadata.namespace"),
    (
        "peer-matches-no-namespace",
        [ingress({"from": [{"namespaceSelector": {"matchLabels": {"team": "x"}}}]})],
        "spec.ingress[0].from[0].namespaceSelector",
    ),
    (
        "peer-matches-no-namespace",
        [ingress({"from": [namespace("monitorign")]})],
        "spec.ingress[0].from[0].namespaceSelector",
    ),
    (
        "namespace-name-label",
        [ingress({"from": [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]})],
        "spec.ingress[0].from[0].namespaceSelector",
    ),
    (
        "peer-matches-no-pod",
        [ingress({"from": [peer("db"), peer("cache")]})],
        "spec.ingress[0].from[1].podSelector",
    ),
    ("peer-matches-no-pod", [ingress({"from": [peer("job")]})], "spec.ingress[0].from[0].podSelector"),
    (
        "peer-matches-no-pod",
        [ingress({"from": [{**namespace("monitoring"), **peer("grafana")}]})],
        "spec.ingress[0].from[0].podSelector",
    ),
    ("peer-matches-no-pod", [ingress({"from": [namespace("empty")]})], "spec.ingress[0].from[0]"),
    (
        "peer-in-another-namespace",
        [ingress({"from": [peer("prom")]})],
        "spec.ingress[0].from[0].podSelector",
    ),
    ("and-or", [ingress({"from": [namespace("monitoring"), peer("prom")]})], "spec.ingress[0].from[1]"),
    ("and-or", [ingress({"from": [peer("db"), {"namespaceSelector": {}}]})], "spec.ingress[0].from[0]"),
    ("named-port-unknown", [ingress({"ports": [{"port": "htp"}]})], "spec.ingress[0].ports[0].port"),
    (
        "named-port-unknown",
        [egress({"to": [peer("db")], "ports": [{"port": 5432}, {"port": "http"}]}, ALLOW_DNS)],
        "spec.egress[0].ports[1].port",
    ),
    (
        "named-port-unknown",
        [egress({"ports": [{"port": "nowhere"}]}, ALLOW_DNS)],
        "spec.egress[0].ports[0].port",
    ),
    (
        "named-port-protocol",
        [ingress({"ports": [{"port": "http", "protocol": UDP}]})],
        "spec.ingress[0].ports[0].protocol",
    ),
    (
        "named-port-protocol",
        [egress({**ALLOW_DNS, "ports": [{"port": "dns"}, *DNS_PORTS]})],
        "spec.egress[0].ports[0].protocol",
    ),
    (
        "named-port-on-some-pods",
        [pod("shop/web-2", "10.1.0.12", {"app": "web"}), ingress({"ports": [{"port": "http"}]})],
        "spec.ingress[0].ports[0].port",
    ),
    (
        "named-port-to-addresses",
        [egress({"to": [block("203.0.113.0/24")], "ports": [{"port": "http"}]}, ALLOW_DNS)],
        "spec.egress[0].ports[0].port",
    ),
    ("service-port", [ingress({"ports": [{"port": 80}]})], "spec.ingress[0].ports[0].port"),
    (
        "service-port",
        [egress({"to": [peer("web")], "ports": [{"port": 80}]}, ALLOW_DNS, of="db")],
        "spec.egress[0].ports[0].port",
    ),
    (
        "wrong-end",
        [ingress({"from": [peer("db")], "ports": [{"port": 5432}]})],
        "spec.ingress[0].ports",
    ),
    (
        "wrong-end",
        [egress({"to": [peer("web")], "ports": [{"port": "sql"}]}, ALLOW_DNS, of="db")],
        "spec.egress[0].ports",
    ),
    ("only-itself", [ingress({"from": [peer("db")]}, to="db")], "spec.ingress[0].from[0]"),
    ("rules-ignored", [ingress(egress=[WEB])], "spec.egress"),
    ("rules-ignored", [egress(ingress=[{}])], "spec.ingress"),
    ("rules-ignored", [policy({"podSelector": only("web"), "egress": []})], "spec.egress"),
    (
        "policy-types-missing",
        [policy({"podSelector": only("web"), "egress": [WEB, ALLOW_DNS]})],
        "spec.policyTypes",
    ),
    ("empty-means-any", [ingress({"from": []})], "spec.ingress[0].from"),
    (
        "empty-means-any",
        [egress({"to": [peer("db")], "ports": []}, ALLOW_DNS)],
        "spec.egress[0].ports",
    ),
    ("empty-means-any", [policy({"policyTypes": ["Ingress"]})], "spec.podSelector"),
    (
        "deny-allows-all",
        [policy({"podSelector": only("web"), "ingress": [{}]}, "shop/default-deny")],
        "spec.ingress[0]",
    ),
    (
        "ip-block-holds-pods",
        [ingress({"from": [block("10.1.1.10/32")]})],
        "spec.ingress[0].from[0].ipBlock.cidr",
    ),
    (
        "ip-block-holds-pods",
        [egress({"to": [block("10.1.0.0/24")]}, ALLOW_DNS)],
        "spec.egress[0].to[0].ipBlock.cidr",
    ),
    (
        "ip-block-holds-cluster-ips",
        [egress({"to": [block("172.20.0.80/32")]}, ALLOW_DNS)],
        "spec.egress[0].to[0].ipBlock.cidr",
    ),
    (
        "ip-block-holds-cluster-ips",
        [egress({"to": [block("172.20.0.0/16")]}, ALLOW_DNS)],
        "spec.egress[0].to[0].ipBlock.cidr",
    ),
    (
        "ip-block-holds-cluster-ips",
        [ingress({"from": [block("172.20.0.80/32")]})],
        "spec.ingress[0].from[0].ipBlock.cidr",
    ),
    (
        "except-outside-cidr",
        [ingress({"from": [block("203.0.113.0/24", "203.0.113.7/32", "198.51.100.0/24")]})],
        "spec.ingress[0].from[0].ipBlock.except[1]",
    ),
    (
        "except-holds-cidr",
        [ingress({"from": [block("203.0.113.0/24", "203.0.112.0/23")]})],
        "spec.ingress[0].from[0].ipBlock.except[0]",
    ),
    ("moot-beside-allow-all", [ingress({"from": [peer("db")]}, {})], "spec.ingress[1]"),
    (
        "moot-beside-allow-all",
        [ingress({"from": [peer("db")]}), policy({"podSelector": {}, "ingress": [{}]}, "shop/open")],
        "spec.ingress",
    ),
    (
        "rule-covered",
        [ingress({"from": [peer("db")], "ports": [{"port": 8080}]}, {"from": [peer("db")]})],
        "spec.ingress[0]",
    ),
    (
        "rule-covered",
        [
            ingress(
                {"from": [block("203.0.113.0/25")], "ports": [{"port": 81}]},
                {
                    "from": [block("203.0.113.0/24", "203.0.113.200/32")],
                    "ports": [{"port": 80, "endPort": 90}],
                },
            )
        ],
        "spec.ingress[0]",
    ),
    ("rule-covered", [ingress({"from": [peer("db"), peer("db")]})], "spec.ingress[0].from[1]"),
    (
        "duplicate-policy",
        [
            ingress({"from": [peer("db")]}),
            policy({"podSelector": only("web"), "ingress": [{"from": [peer("db")]}]}, "shop/q"),
        ],
        "spec",
    ),
    ("no-dns", [egress(WEB)], "spec.egress"),
    ("no-dns", [egress(WEB, {**ALLOW_DNS, "ports": [{"port": 5353, "protocol": UDP}]})], "spec.egress"),
    ("dns-one-protocol", [egress(WEB, {**ALLOW_DNS, "ports": DNS_PORTS[:1]})], "spec.egress"),
    (
        "port-range",
        [ingress({"ports": [{"port": 90, "endPort": 80}, {"port": 8080}]})],
        "spec.ingress[0].ports[0].endPort",
    ),
    (
        "port-range",
        [ingress({"ports": [{"port": "http", "endPort": 80}, {"port": 8080}]})],
        "spec.ingress[0].ports[0].endPort",
    ),
    (
        "cidr-host-bits",
        [ingress({"from": [block("203.0.113.9/24")]})],
        "spec.ingress[0].from[0].ipBlock.cidr",
    ),
    ("bad-input", [ingress({"from": [block("203.0.113.0/33")]})], "spec.ingress[0].from[0].ipBlock.cidr"),
    ("repeated-object", [ingress({"from": [peer("db")]}), ingress({})], ""),
    (
        "unknown-check",
        [policy({"podSelector": only("web")}, check_ignore="no-dsn")],
        "metadata.annotations[podgate.dev/check-ignore]",
    ),
]


@pytest.mark.parametrize(("name", "objects", "field"), BAD)
def test_it_finds(name: str, objects: list[Raw], field: str) -> None:
    assert found(*objects) == [f"{name} {field}"]


def test_every_check_has_a_case() -> None:
    # What pods take credentials from has cases of its own below.
    others = {"blocks-imds", "blocks-pod-identity", "blocks-node-local-dns"}
    assert {name for name, _, _ in BAD} | others == set(CHECKS)


ALL_NS = {"namespaceSelector": {}}
B2 = pod("shop/web-2", "10.1.0.12", {"app": "web"}, ("web", 80, TCP))

# The near-misses: what looks like one of the above, and is meant.
GOOD: dict[str, list[Raw]] = {
    # Recipes that people copy.
    "deny all to an app": [policy({"podSelector": only("web"), "ingress": []})],
    "limit to matching pods": [ingress({"from": [peer("db")]})],
    "allow all to an app": [
        ingress({}),
        policy({"podSelector": {}, "policyTypes": ["Ingress"]}, "shop/deny"),
    ],
    "namespace default-deny ingress": [policy({"podSelector": {}, "policyTypes": ["Ingress"]})],
    "deny other namespaces": [policy({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]})],
    "allow from all namespaces": [ingress({"from": [ALL_NS]})],
    "allow one namespace": [ingress({"from": [namespace("monitoring")]})],
    "namespace AND pod": [ingress({"from": [{**namespace("monitoring"), **peer("prom")}]})],
    "allow external": [ingress({})],
    "one port only": [
        ingress({"from": [{**namespace("monitoring"), **peer("prom")}], "ports": [{"port": 5000}]})
    ],
    "several podSelectors": [
        pod("shop/api", "10.1.0.40", {"app": "api"}),
        ingress({"from": [peer("db"), peer("api")]}),
    ],
    "deny app egress": [policy({"podSelector": only("web"), "policyTypes": ["Egress"], "egress": []})],
    "namespace default-deny egress": [policy({"podSelector": {}, "policyTypes": ["Egress"]})],
    "deny external egress, DNS allowed": [egress({"to": [ALL_NS]}, {"ports": DNS_PORTS})],
    # Selectors.
    "default deny waits for pods": [policy({"podSelector": {}}, "empty/p")],
    "some of the pods are finished": [
        pod("shop/web-9", "10.1.0.19", {"app": "web"}, phase="Failed"),
        ingress(),
    ],
    "some of the pods are on the host's network": [
        pod("shop/web-h", "192.0.2.1", {"app": "web"}, host=True),
        ingress(),
    ],
    "pod without an address yet": [
        {**pod("shop/new", "10.9.9.9", {"app": "new"}), "status": {"phase": "Pending"}},
        ingress(to="new"),
    ],
    "namespace OR pod": [ingress({"from": [namespace("monitoring"), peer("db")]})],
    "name label that exists": [
        ns("labelled", name="labelled"),
        pod("labelled/a", "10.1.5.1", {}),
        ingress({"from": [{"namespaceSelector": {"matchLabels": {"name": "labelled"}}}]}),
    ],
    # Ports.
    "named port": [ingress({"ports": [{"port": "http"}]})],
    "named port of a sidecar": [
        pod(
            "shop/s",
            "10.1.0.41",
            {"app": "s"},
            spec={
                "initContainers": [{"restartPolicy": "Always", "ports": [{"name": "m", "containerPort": 1}]}]
            },
        ),
        ingress({"ports": [{"port": "m"}]}, to="s"),
    ],
    "each pod has one of the names": [B2, ingress({"ports": [{"port": "http"}, {"port": "web"}]})],
    "the others are served by number": [B2, ingress({"ports": [{"port": "http"}, {"port": 80}]})],
    "named port for pods of all kinds": [
        policy({"podSelector": {}, "ingress": [{"ports": [{"port": "http"}]}]}),
    ],
    "named egress port to anybody": [egress({"ports": [{"port": "sql"}]}, ALLOW_DNS)],
    "named port beside a bad entry": [ingress({"ports": [{"port": "http"}]})],
    "port that nobody declares": [ingress({"from": [ALL_NS], "ports": [{"port": 9999}]})],
    "service port and target port": [ingress({"ports": [{"port": 80}, {"port": 8080}]})],
    "service port and target name": [ingress({"ports": [{"port": 80}, {"port": "http"}]})],
    "service port in a range with the target": [ingress({"ports": [{"port": 80, "endPort": 9000}]})],
    "a pod declares the service port": [B2, ingress({"ports": [{"port": 80}]})],
    "port of another app's service": [
        egress({"to": [peer("db")], "ports": [{"port": 80}]}, ALLOW_DNS),
    ],
    "service port to an address": [
        egress({"to": [block("203.0.113.1/32")], "ports": [{"port": 80}]}, ALLOW_DNS)
    ],
    "service port equals target": [
        service("shop/db", "172.20.0.54", {"app": "db"}, {"port": 5432}),
        ingress({"ports": [{"port": 5432}]}, to="db"),
    ],
    # Ends.
    "both ends declare the port": [
        pod("shop/other", "10.1.0.42", {"app": "other"}, ("http", 8080, TCP)),
        ingress({"from": [peer("other")], "ports": [{"port": 8080}]}),
    ],
    "the pods declare nothing": [
        pod("shop/quiet", "10.1.0.43", {"app": "quiet"}),
        ingress({"from": [peer("db")], "ports": [{"port": 5432}]}, to="quiet"),
    ],
    "one of the peers does not declare it": [
        pod("shop/api", "10.1.0.40", {"app": "api"}),
        ingress({"from": [peer("db"), peer("api")], "ports": [{"port": 5432}]}),
    ],
    "replicas talk to each other": [ingress({"from": [peer("web")]})],
    "itself and another": [ingress({"from": [peer("db"), peer("web")]}, to="db")],
    # Types and empty fields.
    "types missing, both kinds of rules": [
        policy({"podSelector": only("web"), "ingress": [{}], "egress": [ALLOW_DNS]}),
    ],
    "explicit Ingress with an empty egress": [ingress({"from": [peer("db")]}, egress=[])],
    "deny-egress may allow ingress": [
        policy(
            {"podSelector": only("web"), "policyTypes": ["Ingress", "Egress"], "ingress": [{}]},
            "shop/deny-egress",
        ),
    ],
    "deny except": [policy({"podSelector": only("web"), "ingress": [{}]}, "shop/deny-except-web")],
    # ipBlock.
    "the internet without the private ranges": [
        egress({"to": [block("0.0.0.0/0", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")]}, ALLOW_DNS),
    ],
    "the private ranges": [
        egress({"to": [block("10.0.0.0/8"), block("172.16.0.0/12"), block("192.168.0.0/16")]}),
    ],
    "a network that pods are in": [ingress({"from": [block("10.1.0.0/16")]})],
    "a node's address": [ingress({"from": [block("192.0.2.1/32")]})],
    "the pods are excepted": [ingress({"from": [block("10.1.1.0/24", "10.1.1.0/28")]})],
    "a finished pod's address": [ingress({"from": [block("10.1.0.30/32")]})],
    "addresses of nobody": [ingress({"from": [block("203.0.113.7/32")]})],
    "node-local DNS on the DNS Service's address": [
        pod("kube-system/nld", "192.0.2.1", {"k8s-app": "node-local-dns"}, host=True),
        egress(
            WEB,
            {"to": [block("172.20.0.10/32"), block("169.254.20.10/32")], "ports": DNS_PORTS},
        ),
    ],
    # Overlap.
    "policies that add up": [
        ingress({"from": [peer("db")]}),
        policy({"podSelector": only("web"), "ingress": [{"from": [namespace("monitoring")]}]}, "shop/q"),
    ],
    "rules that differ by port": [
        ingress(
            {"from": [peer("db")], "ports": [{"port": 8080}]}, {"from": [peer("db")], "ports": [{"port": 81}]}
        ),
    ],
    "allow-all for only some of the pods": [
        policy({"podSelector": {}, "ingress": [{"from": [peer("db")]}]}),
        policy({"podSelector": only("web"), "ingress": [{}]}, "shop/web"),
    ],
    "default deny beside allow-all": [
        policy({"podSelector": {}, "policyTypes": ["Ingress"]}),
        policy({"podSelector": {}, "ingress": [{}]}, "shop/q"),
    ],
    "blocks with holes do not cover": [
        ingress(
            {"from": [block("203.0.113.0/24", "203.0.113.64/26")]},
            {"from": [block("203.0.113.64/27")]},
        ),
    ],
    "equal policies of two namespaces": [
        policy({"podSelector": {}}),
        policy({"podSelector": {}}, "monitoring/p"),
    ],
    # DNS.
    "DNS allowed by another policy": [
        egress(WEB),
        policy({"podSelector": {}, "policyTypes": ["Egress"], "egress": [ALLOW_DNS]}, "shop/dns"),
    ],
    "DNS by the pods' named ports": [
        egress(WEB, {**ALLOW_DNS, "ports": [{"port": "dns", "protocol": UDP}, {"port": "dns-tcp"}]}),
    ],
    "DNS by node-local DNS alone": [egress(WEB, {"to": [block("169.254.20.10/32")], "ports": DNS_PORTS})],
    "everything in the cluster": [egress({"to": [ALL_NS]})],
    "a pod with its own DNS server": [
        pod("shop/own", "10.1.0.44", {"app": "own"}, spec={"dnsPolicy": "None"}),
        egress({"to": [block("203.0.113.53/32")], "ports": DNS_PORTS}, of="own"),
    ],
    "the DNS server itself": [
        policy(
            {
                "podSelector": {},
                "policyTypes": ["Egress"],
                "egress": [{"to": [block("203.0.113.53/32")], "ports": DNS_PORTS}],
            },
            "kube-system/dns",
        ),
    ],
    "a job that has ended": [
        egress({"to": [peer("db")]}, of="job")
        | {
            "metadata": {
                "name": "p",
                "namespace": "shop",
                "annotations": {"podgate.dev/check-ignore": "selects-only-finished-pods"},
            }
        }
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_it_leaves_alone(name: str) -> None:
    assert found(*GOOD[name]) == []


# --- what a pod's spec says it needs ------------------------------------------------------------------

IRSA = ("AWS_REGION", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE")
POD_IDENTITY = ("AWS_REGION", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")
SIX = [
    pod("kube-system/dns-0", "fd00:1::53", {"k8s-app": "kube-dns"}, ("dns", 53, UDP), ("dns-tcp", 53, TCP)),
    service("kube-system/kube-dns", "fd00:2::a", {"k8s-app": "kube-dns"}, *DNS_PORTS),
]


def app(ip: str = "10.1.0.60", *env: str, **spec: Any) -> Raw:
    """A pod shop/app with variables, and members of its spec."""
    return pod("shop/app", ip, {"app": "app"}, env=env, spec=spec)


@pytest.mark.parametrize(
    ("pod_", "rules", "expected"),
    [
        (app("10.1.0.60", "AWS_REGION"), [ALLOW_DNS], ["blocks-imds"]),
        (app("10.1.0.60", "AWS_REGION"), [ALLOW_DNS, {"to": [block("169.254.169.254/32")]}], []),
        (app("10.1.0.60", "AWS_REGION"), [{"to": [block("0.0.0.0/0")]}], []),
        (app("10.1.0.60", "AWS_REGION"), [{"to": [block("0.0.0.0/0", "169.254.169.254/32")]}], []),
        (app("10.1.0.60", "AWS_REGION"), [ALLOW_DNS, {"to": [block("0.0.0.0/0", "169.254.0.0/16")]}], []),
        (
            app("10.1.0.60", "AWS_REGION"),
            [ALLOW_DNS, {"to": [block("0.0.0.0/0", "128.0.0.0/1")]}],
            ["blocks-imds"],
        ),
        (app("10.1.0.60", "AWS_REGION"), [], []),  # deny all egress: plainly meant
        (app("10.1.0.60"), [ALLOW_DNS], []),  # nothing suggests AWS
        (app("10.1.0.60", *IRSA), [ALLOW_DNS], []),
        (app("10.1.0.60", "AWS_REGION", "AWS_ACCESS_KEY_ID"), [ALLOW_DNS], []),
        (app("fd00:1::60", "AWS_REGION"), [ALLOW_DNS], ["blocks-imds"]),
        (app("fd00:1::60", "AWS_REGION"), [ALLOW_DNS, {"to": [block("fd00:ec2::254/128")]}], []),
        (
            app("fd00:1::60", "AWS_REGION"),
            [ALLOW_DNS, {"to": [block("169.254.169.254/32")]}],
            ["blocks-imds"],
        ),
        (app("10.1.0.60", *POD_IDENTITY), [ALLOW_DNS], ["blocks-pod-identity"]),
        (app("10.1.0.60", *POD_IDENTITY), [ALLOW_DNS, {"to": [block("169.254.170.23/32")]}], []),
        (
            app("10.1.0.60", *POD_IDENTITY),
            [ALLOW_DNS, {"to": [block("0.0.0.0/0", "169.254.0.0/16")]}],
            ["blocks-pod-identity"],
        ),
        (app("fd00:1::60", *POD_IDENTITY), [ALLOW_DNS, {"to": [block("fd00:ec2::23/128")]}], []),
        (app("10.1.0.60", *POD_IDENTITY, *IRSA), [ALLOW_DNS], []),
        (
            app("10.1.0.60", dnsPolicy="None", dnsConfig={"nameservers": ["169.254.20.10"]}),
            [ALLOW_DNS],
            ["blocks-node-local-dns"],
        ),
        (
            app("10.1.0.60", dnsPolicy="None", dnsConfig={"nameservers": ["169.254.20.10"]}),
            [{"to": [block("169.254.20.10/32")], "ports": DNS_PORTS}],
            [],
        ),
        (app("10.1.0.60", dnsPolicy="Default"), [{"ports": [{"port": 443}]}], ["no-dns"]),
        (app("10.1.0.60", dnsPolicy="Default"), [{"to": [peer("db")]}], ["no-dns"]),
    ],
)
def test_egress_that_pods_need(pod_: Raw, rules: list[Raw], expected: list[str]) -> None:
    world = WORLD
    if ":" in pod_["status"]["podIPs"][0]["ip"]:
        world = [each for each in WORLD if each["metadata"].get("namespace") != "kube-system"] + SIX
    assert [each.check for each in findings(egress(*rules, of="app"), pod_, world=world)] == expected


NODE_LOCAL = pod("kube-system/nld", "192.0.2.1", {"k8s-app": "node-local-dns"}, host=True)


def test_node_local_dns_counts_where_its_pods_are() -> None:
    assert found(egress(ALLOW_DNS), NODE_LOCAL) == ["blocks-node-local-dns spec.egress"]
    local = {"to": [block("169.254.20.10/32")], "ports": DNS_PORTS}
    assert found(egress(ALLOW_DNS, local), NODE_LOCAL) == []
    assert found(egress(ALLOW_DNS)) == []


def test_one_finding_names_all_pods_and_the_policy_that_lets_them_send() -> None:
    deny = policy({"podSelector": {}, "policyTypes": ["Egress"]}, "shop/a-deny")
    (finding,) = findings(deny, egress(WEB))
    assert (finding.check, finding.object) == ("no-dns", "NetworkPolicy shop/p")
    assert "shop/web-0 and shop/web-1 " in finding.message


def test_a_pod_without_an_address_does_not_stand_for_the_others() -> None:
    pending = {**pod("shop/web-", "10.9.9.9", {"app": "web"}), "status": {"phase": "Pending"}}
    pending["metadata"]["name"] = "web"  # sorts before web-0
    assert found(egress(WEB), pending) == ["no-dns spec.egress"]


def test_pods_that_need_different_things_are_told_apart() -> None:
    four = app("10.1.0.60", "AWS_REGION")
    six = pod("shop/app6", "fd00:1::60", {"app": "app"}, env=("AWS_REGION",))
    dns6 = pod("kube-system/dns-6", "fd00:1::53", {"k8s-app": "kube-dns"}, ("dns", 53, UDP), ("tcp", 53, TCP))
    first, second = findings(egress(ALLOW_DNS, of="app"), four, six, dns6)
    assert {first.check, second.check} == {"blocks-imds"}
    assert "shop/app " in first.message
    assert "169.254.169.254/32" in first.mend
    assert "shop/app6 " in second.message
    assert "fd00:ec2::254/128" in second.mend


def test_equal_problems_of_two_files_are_two_findings() -> None:
    store = Store()
    for name in ("f", "g"):
        contents = read_contents(b"[1]", name)
        store.replace(name, contents.objects, contents.problems)
    assert [each.source for each in check(store.snapshot())] == ["f", "g"]


def test_many_rules_are_compared_for_equality_only() -> None:
    rules = [{"from": [block(f"198.51.100.{number}/32")]} for number in range(60)]
    wide = {"from": [block("198.51.100.0/24")]}
    assert len(found(ingress(*rules[:40], wide))) == 40
    assert found(ingress(*rules, rules[3], wide)) == ["rule-covered spec.ingress[60]"]


def test_openshift_dns_listens_on_another_port() -> None:
    world = [each for each in WORLD if each["metadata"].get("namespace") != "kube-system"]
    dns = [
        ns("openshift-dns"),
        pod(
            "openshift-dns/dns-1", "10.1.9.1", {"dns": "default"}, ("dns", 5353, UDP), ("dns-tcp", 5353, TCP)
        ),
        service(
            "openshift-dns/dns-default",
            "172.30.0.10",
            {"dns": "default"},
            {"port": 53, "protocol": UDP, "targetPort": "dns"},
            {"port": 53, "protocol": TCP, "targetPort": "dns-tcp"},
        ),
    ]
    to_dns = [namespace("openshift-dns")]
    asked_for = [{"port": 5353, "protocol": UDP}, {"port": 5353, "protocol": TCP}]
    assert found(egress({"to": to_dns, "ports": asked_for}), *dns, world=world) == []
    service_ports = found(egress({"to": to_dns, "ports": DNS_PORTS}), *dns, world=world)
    assert "no-dns spec.egress" in service_ports
    assert "service-port spec.egress[0].ports[0].port" in service_ports


# --- what the input does not tell ---------------------------------------------------------------------

SHOP_ONLY = [each for each in WORLD if each["metadata"].get("namespace") == "shop"]


@pytest.mark.parametrize(
    "rule",
    [
        ALLOW_DNS,
        {"to": [namespace("kube-system")]},
        {"ports": DNS_PORTS},
        {"to": [block("172.20.0.10/32")], "ports": DNS_PORTS},
        {"to": [namespace("kube-system")], "ports": [{"port": "dns", "protocol": UDP}, {"port": "dns-tcp"}]},
    ],
)
def test_without_dns_servers_a_rule_that_is_about_dns_counts(rule: Raw) -> None:
    namespaces = [ns("shop"), ns("kube-system")]
    spec = egress(WEB, rule)
    assert "no-dns" not in {each.check for each in findings(spec, *namespaces, world=SHOP_ONLY)}
    assert found(egress(WEB), *namespaces, world=SHOP_ONLY) == ["no-dns spec.egress"]


def test_pods_of_one_namespace_say_nothing_of_peers_elsewhere() -> None:
    namespaces = [ns("shop"), ns("monitoring")]
    assert found(ingress({"from": [namespace("monitoring")]}), *namespaces, world=SHOP_ONLY) == []
    assert found(ingress({"from": [namespace("monitoring")]}), world=SHOP_ONLY) == []
    assert found(ingress({"from": [peer("nobody")]}), world=SHOP_ONLY) != []


def test_policies_alone_are_checked_for_what_they_say_by_themselves() -> None:
    spec = {
        "podSelector": only("x"),
        "ingress": [{"from": [namespace("y"), peer("z")], "ports": [{"port": "http"}, {"port": 80}]}],
        "egress": [{"to": [block("10.1.0.1/32", "10.2.0.0/16")]}],
    }
    assert found(policy(spec), world=[]) == ["except-outside-cidr spec.egress[0].to[0].ipBlock.except[0]"]


def test_bad_entries_do_not_move_the_fields_of_the_others() -> None:
    ports = [{"port": "UPPER"}, {"port": "htp"}, {"port": 0}, {"port": 80}]
    assert found(ingress({"from": [{}, peer("cache")], "ports": ports}))[-4:] == [
        "bad-input spec.ingress[0].ports[0].port",
        "named-port-unknown spec.ingress[0].ports[1].port",
        "bad-input spec.ingress[0].ports[2].port",
        "service-port spec.ingress[0].ports[3].port",
    ]


def test_policy_endpoints_are_judged_for_what_they_let_out() -> None:
    endpoint = {
        "apiVersion": "networking.k8s.aws/v1alpha1",
        "kind": "PolicyEndpoint",
        "metadata": {"name": "p-abc", "namespace": "shop"},
        "spec": {
            "policyRef": {"name": "p", "namespace": "shop"},
            "podIsolation": ["Egress"],
            "podSelectorEndpoints": [
                {"name": "web-0", "namespace": "shop", "podIP": "10.1.0.10", "hostIP": "192.0.2.1"}
            ],
            "egress": [{"cidr": "10.1.0.20", "ports": [{"port": 5432}]}],
        },
    }
    (finding,) = findings(endpoint)
    assert (finding.check, finding.object) == ("no-dns", "NetworkPolicy shop/p")
    endpoint["spec"]["egress"].append({"cidr": "10.1.2.10"})  # type: ignore[index]
    assert findings(endpoint) == ()


# --- suppression and order ----------------------------------------------------------------------------


def test_an_annotation_silences_a_policys_checks() -> None:
    spec = egress(WEB, {"to": [peer("cache")]})["spec"]
    assert found(policy(spec)) == [
        "no-dns spec.egress",
        "peer-matches-no-pod spec.egress[1].to[0].podSelector",
    ]
    assert found(policy(spec, check_ignore=" no-dns, ")) == [
        "peer-matches-no-pod spec.egress[1].to[0].podSelector"
    ]
    assert found(policy(spec, check_ignore="no-dns,peer-matches-no-pod")) == []


def test_ignored_checks_are_left_out_everywhere() -> None:
    objects = snapshot([*WORLD, egress(WEB), ingress(to="wbe")])
    assert {each.check for each in check(objects, {"no-dns"})} == {"repeated-object", "selects-no-pod"}


def test_the_order_is_by_object_and_place() -> None:
    rules = [{"from": [peer(f"no-{number}")]} for number in range(11)]
    result = findings(ingress(*rules), policy({"podSelector": only("wbe")}, "shop/a"))
    assert [each.object for each in result] == ["NetworkPolicy shop/a"] + ["NetworkPolicy shop/p"] * 11
    assert [each.field for each in result[1:]] == [
        f"spec.ingress[{number}].from[0].podSelector" for number in range(11)
    ]
    shuffled = check(
        snapshot([policy({"podSelector": only("wbe")}, "shop/a"), ingress(*rules), *WORLD[::-1]])
    )
    assert shuffled == result


def test_every_finding_says_what_and_how_to_mend_it() -> None:
    for _, objects, _ in BAD:
        for finding in findings(*objects):
            assert finding.message
            assert finding.mend
            assert "\n" not in finding.message + finding.mend
            assert finding.severity in Severity


@pytest.mark.parametrize(
    ("objects", "hint"),
    [
        ([ingress(to="wbe")], "did you mean app=web?"),
        ([policy({"podSelector": {"matchLabels": {"ap": "web"}}})], "did you mean the label app?"),
        ([policy({"podSelector": {}}, "shpo/p")], "did you mean shop?"),
        ([ingress({"ports": [{"port": "htp"}]})], "did you mean http?"),
        ([ingress({"ports": [{"port": 80}]})], "write `port: 8080`"),
    ],
)
def test_the_mend_knows_what_is_there(objects: list[Raw], hint: str) -> None:
    (finding,) = findings(*objects)
    assert finding.mend == hint
