"""The 48 NetworkPolicy conformance cases of Kubernetes, with real packets on IPv4 and IPv6.

Each step's table holds for both ports, all three protocols and one address outside the cluster, where
upstream asks one port of one protocol at a time; endPort, blocks and named ports beyond upstream follow
below. Tables are written from the meaning of the policies (`conformance.Table`).
"""

from __future__ import annotations

import pytest
from conformance import ALL, Cluster, Step, policy, step

pytestmark = pytest.mark.netns

CLOSED = ALL.deny(to="x/a")  # nobody reaches x/a
MUTE = ALL.deny("x/a")  # x/a reaches nobody

FROM_Y_81 = """
    podSelector: {matchLabels: {pod: a}}
    ingress:
    - from: [{namespaceSelector: {matchLabels: {ns: y}}}]
      ports: [{port: 81}]
"""
FROM_Y_80 = FROM_Y_81.replace("81", "80")
DENY_INGRESS = "{podSelector: {}, policyTypes: [Ingress]}"
ALLOW_INGRESS = "{podSelector: {}, ingress: [{}]}"
BUT_X_B = """
    podSelector: {matchLabels: {pod: a}}
    policyTypes: [Egress]
    egress:
    - to:
      - ipBlock: {cidr: 10.1.0.0/24, except: [10.1.0.18/32]}
      - ipBlock: {cidr: "fd00:1::/64", except: ["fd00:1::12/128"]}
"""

BY_NAMESPACE = """
    podSelector: {matchLabels: {pod: a}}
    ingress: [{from: [{namespaceSelector: {matchLabels: {ns2: updated}}}]}]
"""
BY_POD = """
    podSelector: {matchLabels: {pod: a}}
    ingress: [{from: [{podSelector: {matchLabels: {pod2: updated}}}]}]
"""
TARGET = "{podSelector: {matchLabels: {target: isolated}}, policyTypes: [Ingress]}"
INGRESS_80 = "{podSelector: {}, ingress: [{ports: [{port: 80}]}]}"
EGRESS_80 = "{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: 80}]}]}"
EGRESS_TO_B = """
    podSelector: {matchLabels: {pod: a}}
    policyTypes: [Egress]
    egress: [{to: [{podSelector: {matchLabels: {pod: b}}}]}]
"""

UPSTREAM: dict[str, list[Step]] = {
    "01-default-deny-ingress": [step(ALL.deny(to="x"), DENY_INGRESS)],
    "02-default-deny-all": [
        step(ALL.deny(to="x").deny("x"), "{podSelector: {}, policyTypes: [Ingress, Egress]}")
    ],
    "03-from-a-pod-of-the-own-namespace": [
        step(
            CLOSED.allow("x/b", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]
            """,
        )
    ],
    "04-deny-all-then-everyone-to-one-pod": [
        step(
            ALL.deny(to="x").allow("pods", to="x/a"),
            DENY_INGRESS,
            """
            podSelector: {matchLabels: {pod: a}}
            ingress: [{from: [{podSelector: {}, namespaceSelector: {}}]}]
            """,
        )
    ],
    "05-from-all-namespaces": [
        step(
            CLOSED.allow("pods", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress: [{from: [{namespaceSelector: {}}]}]
            """,
        )
    ],
    "06-only-from-another-namespace": [
        step(
            CLOSED.allow("y", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress: [{from: [{namespaceSelector: {matchLabels: {ns: y}}}]}]
            """,
        )
    ],
    "07-pods-by-expression": [
        step(
            CLOSED.allow("x/b", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - from:
              - podSelector: {matchExpressions: [{key: pod, operator: In, values: [b]}]}
            """,
        )
    ],
    "08-namespaces-by-expression": [
        step(
            CLOSED.allow("y", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - from:
              - namespaceSelector: {matchExpressions: [{key: ns, operator: In, values: [y]}]}
            """,
        )
    ],
    "09-pod-or-namespace": [
        step(
            CLOSED.allow("x/b y z", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - from:
              - namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}
              - podSelector: {matchLabels: {pod: b}}
            """,
        )
    ],
    "10-pod-and-namespace": [
        step(
            CLOSED.allow("y/b z/b", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - from:
              - namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}
                podSelector: {matchLabels: {pod: b}}
            """,
        )
    ],
    "11-several-pods-and-namespaces": [
        step(
            CLOSED.allow("y/b y/c z/b z/c", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - from:
              - namespaceSelector: {matchExpressions: [{key: ns, operator: NotIn, values: [x]}]}
                podSelector: {matchExpressions: [{key: pod, operator: In, values: [b, c]}]}
            """,
        )
    ],
    "12-any-of-several-pod-selectors": [
        step(
            CLOSED.allow("x/b x/c", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - from:
              - podSelector: {matchLabels: {pod: b}}
              - podSelector: {matchLabels: {pod: c}}
            """,
        )
    ],
    "13-one-pod-of-another-namespace": [
        step(
            CLOSED.allow("y/a", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - from:
              - namespaceSelector: {matchLabels: {ns: y}}
                podSelector: {matchLabels: {pod: a}}
            """,
        )
    ],
    "14-one-port": [step(CLOSED.allow("y", to="x/a", ports="81/TCP"), FROM_Y_81)],
    "15-stacked-policies": [
        step(CLOSED.allow("y", to="x/a", ports="81/TCP"), FROM_Y_81),
        step(CLOSED.allow("y", to="x/a", ports="80/TCP 81/TCP"), FROM_Y_81, FROM_Y_80),
    ],
    "16-allow-all": [step(ALL, ALLOW_INGRESS)],
    "17-named-port": [
        step(
            ALL.deny(to="x").allow(to="x", ports="81/TCP"),
            "{podSelector: {}, ingress: [{ports: [{port: serve-81-tcp}]}]}",
        )
    ],
    "18-namespace-and-named-port": [
        step(
            CLOSED.allow("y", to="x/a", ports="80/TCP"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - from: [{namespaceSelector: {matchLabels: {ns: y}}}]
              ports: [{port: serve-80-tcp}]
            """,
        )
    ],
    # Without peers, a name means the pods that have it: nothing outside the cluster has.
    "19-egress-named-port": [
        step(
            ALL.deny("x").allow("x", to="pods", ports="80/TCP"),
            "{podSelector: {}, policyTypes: [Egress], egress: [{ports: [{port: serve-80-tcp}]}]}",
        )
    ],
    "20-updated-from-allow-to-deny": [
        step(ALL, ALLOW_INGRESS),
        step(ALL.deny(to="x"), "{podSelector: {}, policyTypes: [Ingress], ingress: []}"),
    ],
    "21-namespace-relabelled": [
        step(CLOSED, BY_NAMESPACE),
        step(CLOSED.allow("y", to="x/a"), BY_NAMESPACE, labels={"y": {"ns2": "updated"}}),
    ],
    "22-client-relabelled": [
        step(CLOSED, BY_POD),
        step(CLOSED.allow("x/b", to="x/a"), BY_POD, labels={"x/b": {"pod2": "updated"}}),
    ],
    "23-deny-other-namespaces": [
        step(
            ALL.deny(to="x").allow("x", to="x"),
            "{podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}",
        )
    ],
    "24-target-relabelled": [
        step(ALL, TARGET),
        step(CLOSED, TARGET, labels={"x/a": {"target": "isolated"}}),
    ],
    "25-deny-egress-of-a-pod": [step(MUTE, "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Egress]}")],
    "26-deny-egress-of-a-namespace": [step(ALL.deny("x"), "{podSelector: {}, policyTypes: [Egress]}")],
    "27-ingress-and-egress-in-one": [
        step(
            CLOSED.allow("x/b", to="x/a").deny("x/a").allow("x/a", ports="80/TCP"),
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Ingress, Egress]
            ingress: [{from: [{podSelector: {matchLabels: {pod: b}}}]}]
            egress: [{ports: [{port: 80}]}]
            """,
        )
    ],
    "28-client-denies-what-the-server-allows": [
        step(
            MUTE.deny(to="y/a y/b").allow("x/a", to="y/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress:
            - to:
              - namespaceSelector: {matchLabels: {ns: y}}
                podSelector: {matchLabels: {pod: a}}
            """,
            policy(
                """
                podSelector: {matchExpressions: [{key: pod, operator: In, values: [a, b]}]}
                ingress:
                - from:
                  - namespaceSelector: {matchLabels: {ns: x}}
                    podSelector: {matchLabels: {pod: a}}
                """,
                "y/servers",
            ),
        )
    ],
    "29-egress-to-a-pod-elsewhere": [
        step(
            MUTE.allow("x/a", to="y/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress:
            - to:
              - namespaceSelector: {matchLabels: {ns: y}}
                podSelector: {matchLabels: {pod: a}}
            """,
        )
    ],
    "30-protocol-without-port": [
        step(
            CLOSED.allow(to="x/a", ports="TCP"),
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{protocol: TCP}]}]}",
        )
    ],
    "31-ingress-allow-all-wins-over-a-port": [
        step(ALL.deny(to="x").allow(to="x", ports="80/TCP"), INGRESS_80),
        step(ALL, INGRESS_80, ALLOW_INGRESS),
    ],
    "32-egress-allow-all-wins-over-a-port": [
        step(ALL.deny("x").allow("x", ports="80/TCP"), EGRESS_80),
        step(ALL, EGRESS_80, "{podSelector: {}, policyTypes: [Egress], egress: [{}]}"),
    ],
    "33-deleted": [
        step(ALL.deny(to="x").deny("x"), "{podSelector: {}, policyTypes: [Ingress, Egress]}"),
        step(ALL),
    ],
    "34-egress-to-one-address": [
        step(
            MUTE.allow("x/a", to="y/b"),
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress: [{to: [{ipBlock: {cidr: 10.1.0.34/32}}, {ipBlock: {cidr: "fd00:1::22/128"}}]}]
            """,
        )
    ],
    "35-egress-to-a-block-with-an-exception": [
        step(MUTE.allow("x/a", to="pods").deny("x/a", to="x/b"), BUT_X_B)
    ],
    "36-an-exception-that-another-policy-allows": [
        step(MUTE.allow("x/a", to="pods").deny("x/a", to="x/b"), BUT_X_B),
        step(
            MUTE.allow("x/a", to="pods"),
            BUT_X_B,
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress: [{to: [{ipBlock: {cidr: 10.1.0.18/32}}, {ipBlock: {cidr: "fd00:1::12/128"}}]}]
            """,
        ),
    ],
    "37-ingress-and-egress-are-independent": [
        step(MUTE.allow("x/a", to="x/b"), EGRESS_TO_B),
        step(
            MUTE.allow("x/a", to="x/b").deny(to="x/a"),
            EGRESS_TO_B,
            "{podSelector: {matchLabels: {pod: a}}, policyTypes: [Ingress], ingress: []}",
        ),
    ],
    "38-sctp-opens-no-tcp": [
        step(
            CLOSED.allow(to="x/a", ports="81/SCTP"),
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{protocol: SCTP, port: 81}]}]}",
        )
    ],
    "39-sctp-alone-isolates": [
        step(
            CLOSED.allow("x/b", to="x/a", ports="80/SCTP"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress:
            - from: [{podSelector: {matchLabels: {pod: b}}}]
              ports: [{protocol: SCTP, port: 80}]
            """,
        )
    ],
    "40-udp-opens-no-tcp": [
        step(
            CLOSED.allow(to="x/a", ports="81/UDP"),
            "{podSelector: {matchLabels: {pod: a}}, ingress: [{ports: [{protocol: UDP, port: 81}]}]}",
        )
    ],
    "41-default-namespace-label": [
        step(
            CLOSED.allow("y", to="x/a"),
            """
            podSelector: {matchLabels: {pod: a}}
            ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: y}}}]}]
            """,
        )
    ],
    "42-default-namespace-label-not-in": [
        step(
            MUTE.allow("x/a", to="x z"),
            """
            podSelector: {matchLabels: {pod: a}}
            policyTypes: [Egress]
            egress:
            - to:
              - namespaceSelector:
                  matchExpressions: [{key: kubernetes.io/metadata.name, operator: NotIn, values: [y]}]
            """,
        )
    ],
    # The three cases that upstream asks again over UDP and over SCTP: other namespaces here, since the
    # tables above hold for all protocols already.
    "43-udp-default-deny-ingress": [step(ALL.deny(to="y"), policy(DENY_INGRESS, "y/deny"))],
    "44-udp-one-port": [
        step(
            CLOSED.allow("y", to="x/a", ports="81/UDP"),
            FROM_Y_81.replace("port: 81", "protocol: UDP, port: 81"),
        )
    ],
    "45-udp-one-pod-of-another-namespace": [
        step(
            ALL.deny(to="y/b").allow("z/c", to="y/b", ports="UDP"),
            policy(
                """
                podSelector: {matchLabels: {pod: b}}
                ingress:
                - from:
                  - namespaceSelector: {matchLabels: {ns: z}}
                    podSelector: {matchLabels: {pod: c}}
                  ports: [{protocol: UDP}]
                """,
                "y/from-one",
            ),
        )
    ],
    "46-sctp-default-deny-ingress": [step(ALL.deny(to="z"), policy(DENY_INGRESS, "z/deny"))],
    "47-sctp-one-port": [
        step(
            CLOSED.allow("y", to="x/a", ports="81/SCTP"),
            FROM_Y_81.replace("port: 81", "protocol: SCTP, port: 81"),
        )
    ],
    "48-sctp-one-pod-of-another-namespace": [
        step(
            ALL.deny(to="z/c").allow("y/b", to="z/c", ports="SCTP"),
            policy(
                """
                podSelector: {matchLabels: {pod: c}}
                ingress:
                - from:
                  - namespaceSelector: {matchLabels: {ns: y}}
                    podSelector: {matchLabels: {pod: b}}
                  ports: [{protocol: SCTP}]
                """,
                "z/from-one",
            ),
        )
    ],
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_upstream(cluster: Cluster, name: str) -> None:
    cluster.check(*UPSTREAM[name])
