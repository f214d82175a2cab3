"""Conformance beyond Kubernetes' own cases: ranges, families, unions, names that differ, policies as written.

With real packets on IPv4 and IPv6, like `test_conformance_upstream`; all tables written by hand.
"""

from __future__ import annotations

import pytest
from conformance import ALL, Cluster, Step, Table, step

pytestmark = pytest.mark.netns

CLOSED = ALL.deny(to="x/a")  # nobody reaches x/a
MUTE = ALL.deny("x/a")  # x/a reaches nobody

# Two outside, one at each edge and one inside of 81-83; and the same numbers of other protocols.
RANGE = Table(("80/TCP", "81/TCP", "82/TCP", "83/TCP", "84/TCP", "81/UDP", "83/SCTP"))
RANGES = Table(("80/UDP", "81/UDP", "83/UDP", "84/UDP", "80/SCTP", "81/SCTP", "82/SCTP", "82/TCP"))

OVERLAP = """
    podSelector: {matchLabels: {pod: a}}
    policyTypes: [Egress]
    egress:
    - to:
      - ipBlock: {cidr: 10.1.0.0/24, except: [10.1.0.32/28]}
      - ipBlock: {cidr: "fd00:1::/64", except: ["fd00:1::20/124"]}
      ports: [{port: 80}]
"""

BEYOND: dict[str, list[Step]] = {
    "end-port-ingress": [
        step(
            RANGE.deny(to="x/a").allow("y", to="x/a", ports="81/TCP 82/TCP 83/TCP"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - from: [{namespaceSelector: {matchLabels: {ns: y}}}]
              ports: [{port: 81, endPort: 83}]
            """,
        )
    ],
    "end-port-egress": [
        step(
            RANGE.deny("x/a").allow("x/a", to="y", ports="81/TCP 82/TCP 83/TCP"),
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress:
            - to: [{namespaceSelector: {matchLabels: {ns: y}}}]
              ports: [{port: 81, endPort: 83, protocol: TCP}]
            """,
        )
    ],
    "end-port-udp-and-sctp": [
        step(
            RANGES.deny(to="x/a").allow(to="x/a", ports="81/UDP 83/UDP 81/SCTP"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - ports:
              - {port: 81, endPort: 83, protocol: UDP}
              - {port: 81, endPort: 81, protocol: SCTP}
            """,
        )
    ],
    # A block of one family says nothing of the other: isolation stands there.
    "block-of-one-family": [
        step(
            MUTE.allow("x/a", to="pods"),
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress: [{to: [{ipBlock: {cidr: 10.1.0.0/16}}]}]
            """,
            six=MUTE,
        ),
        step(
            MUTE,
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress: [{to: [{ipBlock: {cidr: "2001:db8::/32"}}]}]
            """,
            six=MUTE.allow("x/a", to="world"),
        ),
    ],
    "block-of-everything-is-the-world-too": [
        step(
            CLOSED.allow("world", to="x/a").allow("y", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - from:
              - ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.0/8]}
              - ipBlock: {cidr: "::/0", except: ["fd00::/8"]}
              - namespaceSelector: {matchLabels: {ns: y}}
            """,
        )
    ],
    # Where blocks overlap, what one leaves out another may let in; a longest-prefix match gets it wrong.
    "overlapping-blocks": [
        step(MUTE.allow("x/a", to="x z", ports="80/TCP"), OVERLAP),
        step(
            MUTE.allow("x/a", to="x z", ports="80/TCP")
            .allow("x/a", to="pods", ports="81/TCP")
            .allow("x/a", to="y/b", ports="UDP"),
            OVERLAP,
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress:
            - to: [{ipBlock: {cidr: 10.1.0.0/16}}, {ipBlock: {cidr: "fd00:1::/48"}}]
              ports: [{port: 81}]
            - to: [{ipBlock: {cidr: 10.1.0.34/32}}, {ipBlock: {cidr: "fd00:1::22/128"}}]
              ports: [{protocol: UDP}]
            """,
        ),
    ],
    # One policy, one name, another number on each pod: each opens its own only, and follows its pod.
    "named-port-that-differs-ingress": [
        step(
            ALL.deny(to="x").allow("y", to="x/a", ports="80/TCP").allow("y", to="x/b", ports="81/TCP"),
            """
            podSelector: {}
            ingress:
            - from: [{namespaceSelector: {matchLabels: {ns: y}}}]
              ports: [{port: web}]
            """,
            ports={"x/a": {"web": "80/TCP"}, "x/b": {"web": "81/TCP"}, "x/c": {"web": "80/UDP"}},
        ),
        step(
            ALL.deny(to="x").allow("y", to="x/a x/b", ports="81/TCP"),
            """
            podSelector: {}
            ingress:
            - from: [{namespaceSelector: {matchLabels: {ns: y}}}]
              ports: [{port: web}]
            """,
            ports={"x/a": {"web": "81/TCP"}, "x/b": {"web": "81/TCP"}},
        ),
    ],
    "named-port-that-differs-egress": [
        step(
            MUTE.allow("x/a", to="y/a", ports="80/TCP").allow("x/a", to="y/b", ports="81/TCP"),
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress:
            - to: [{namespaceSelector: {matchLabels: {ns: y}}}]
              ports: [{port: web}]
            """,
            ports={"y/a": {"web": "80/TCP"}, "y/b": {"web": "81/TCP"}, "z/a": {"web": "80/TCP"}},
        )
    ],
    # A name without peers means whatever pod has it; a number beside it is anybody's.
    "named-port-of-anybody": [
        step(
            MUTE.allow("x/a", ports="81/UDP")
            .allow("x/a", to="y/a", ports="80/TCP")
            .allow("x/a", to="z/b", ports="81/TCP"),
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress: [{to: [], ports: [{port: web}, {port: 81, protocol: UDP}]}]
            """,
            ports={"y/a": {"web": "80/TCP"}, "z/b": {"web": "81/TCP"}, "z/c": {"web": "80/SCTP"}},
        ),
        # The name goes from one pod to another, and then from all.
        step(
            MUTE.allow("x/a", ports="81/UDP").allow("x/a", to="z/c", ports="80/TCP"),
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress: [{to: [], ports: [{port: web}, {port: 81, protocol: UDP}]}]
            """,
            ports={"z/c": {"web": "80/TCP"}},
        ),
        step(
            MUTE,
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress: [{ports: [{port: web}]}]
            """,
        ),
    ],
    "named-port-of-a-block-opens-nothing": [
        step(
            MUTE,
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress:
            - to: [{ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: "::/0"}}]
              ports: [{port: serve-80-tcp}]
            """,
        )
    ],
    # As people write them: what is empty or null means the same as what is left out.
    "empty-lists-mean-anybody": [
        step(ALL.deny(to="x").allow(to="x"), "{podSelector: {}, ingress: [{from: [], ports: []}]}"),
        step(
            CLOSED.allow(to="x/a", ports="TCP"),
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{from: null, ports: [{}]}]}",
        ),
    ],
    "egress-rules-isolate-egress-without-being-told": [
        step(
            CLOSED.deny("x/a").allow("x/a", to="y"),
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: []
            egress: [{to: [{namespaceSelector: {matchLabels: {ns: y}}}], ports: null}]
            """,
        )
    ],
    "rules-of-a-direction-not-listed-mean-nothing": [
        step(
            CLOSED,
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], egress: [{ports: [{port: 80}]}]}",
        )
    ],
    "a-missing-label-is-not-in-anything": [
        step(
            CLOSED.allow("x/a x/b y z", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - from:
              - namespaceSelector: {matchExpressions: [{key: team, operator: NotIn, values: [red]}]}
                podSelector: {matchExpressions: [{key: role, operator: DoesNotExist}]}
            """,
            labels={"x/c": {"role": ""}},
        ),
        step(
            CLOSED.allow("x/c y", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - from:
              - podSelector: {matchExpressions: [{key: role, operator: Exists}]}
              - namespaceSelector: {matchExpressions: [{key: team, operator: In, values: [red, blue]}]}
            """,
            labels={"x/c": {"role": ""}, "y": {"team": "blue"}, "z": {"team": "green"}},
        ),
    ],
}


@pytest.mark.parametrize("name", BEYOND)
def test_beyond_upstream(cluster: Cluster, name: str) -> None:
    cluster.check(*BEYOND[name])
