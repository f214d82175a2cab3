"""The NetworkPolicies that people copy first, with real packets on IPv4 and IPv6.

Each is written as it is usually found, with the fields that people leave empty or null.
"""

from __future__ import annotations

import pytest
from conformance import ALL, PORTS, Cluster, Step, Table, policy, step

pytestmark = pytest.mark.netns

SHOP = {"x/a": {"app": "shop", "role": "api"}, "x/b": {"app": "shop", "role": "web"}, "y/b": {"app": "shop"}}
CLOSED = ALL.deny(to="x/a")
DNS = Table((*PORTS, "53/UDP", "53/TCP"))

FROM_PRODUCTION = """
    podSelector:
      matchLabels:
        app: shop
    ingress:
      - from:
          - namespaceSelector:
              matchLabels:
                purpose: production
"""
DNS_ONLY = """
    podSelector:
      matchLabels:
        app: shop
    policyTypes:
      - Egress
    egress:
      - ports:
          - port: 53
            protocol: UDP
          - port: 53
            protocol: TCP
"""

RECIPES: dict[str, list[Step]] = {
    "01-deny-all-to-an-app": [
        step(
            ALL.deny(to="x/a x/b"),
            """
            podSelector:
              matchLabels:
                app: shop
            ingress: []
            """,
            labels=SHOP,
        )
    ],
    "02-limit-to-matching-pods": [
        step(
            CLOSED.allow("x/b", to="x/a"),
            """
            podSelector:
              matchLabels:
                app: shop
                role: api
            ingress:
              - from:
                  - podSelector:
                      matchLabels:
                        app: shop
            """,
            labels=SHOP,
        )
    ],
    "03-allow-all-to-an-app": [
        step(
            ALL.deny(to="x").allow(to="x/a x/b"),
            "podSelector: {}\npolicyTypes: [Ingress]",
            """
            podSelector:
              matchLabels:
                app: shop
            ingress:
              - {}
            """,
            labels=SHOP,
        )
    ],
    "04-default-deny-ingress": [
        step(
            ALL.deny(to="y"),
            policy(
                """
                podSelector: {}
                ingress: []
                """,
                "y/default-deny-all",
            ),
        )
    ],
    "05-deny-other-namespaces": [
        step(
            ALL.deny(to="x").allow("x", to="x"),
            """
            podSelector:
              matchLabels:
            ingress:
              - from:
                  - podSelector: {}
            """,
        )
    ],
    "06-allow-from-all-namespaces": [
        step(
            ALL.deny(to="x").allow("pods", to="x/a x/b"),
            "podSelector: {}\npolicyTypes: [Ingress]",
            """
            podSelector:
              matchLabels:
                app: shop
            ingress:
              - from:
                  - namespaceSelector: {}
            """,
            labels=SHOP,
        )
    ],
    "07-allow-one-labelled-namespace": [
        step(
            ALL.deny(to="x/a x/b").allow("z", to="x/a x/b"),
            FROM_PRODUCTION,
            labels={**SHOP, "y": {"purpose": "testing"}, "z": {"purpose": "production"}},
        ),
        # Nobody has labelled the namespace yet, or the label has gone again.
        step(ALL.deny(to="x/a x/b"), FROM_PRODUCTION, labels=SHOP),
    ],
    "08-namespace-and-pod": [
        step(
            CLOSED.allow("y/b", to="x/a"),
            """
            podSelector:
              matchLabels:
                role: api
            ingress:
              - from:
                  - namespaceSelector:
                      matchLabels:
                        team: operations
                    podSelector:
                      matchLabels:
                        type: monitoring
            """,
            labels={
                **SHOP,
                "y": {"team": "operations"},
                "y/b": {"type": "monitoring"},
                "z/b": {"type": "monitoring"},
                "x/c": {"type": "monitoring"},
            },
        )
    ],
    "09-allow-external": [
        step(
            ALL.deny(to="x").allow(to="x/b"),
            "podSelector: {}\npolicyTypes: [Ingress]",
            """
            podSelector:
              matchLabels:
                role: web
            ingress:
              - from: []
            """,
            labels=SHOP,
        )
    ],
    "10-one-port-only": [
        step(
            CLOSED.allow("x/c", to="x/a", ports="81/TCP"),
            """
            podSelector:
              matchLabels:
                role: api
            ingress:
              - ports:
                  - port: 81
                from:
                  - podSelector:
                      matchLabels:
                        role: monitoring
            """,
            labels={**SHOP, "x/c": {"role": "monitoring"}, "y/c": {"role": "monitoring"}},
        )
    ],
    "11-several-pod-selectors": [
        step(
            CLOSED.allow("x/b x/c", to="x/a"),
            """
            podSelector:
              matchLabels:
                role: api
            ingress:
              - from:
                  - podSelector:
                      matchLabels:
                        app: shop
                        role: web
                  - podSelector:
                      matchLabels:
                        app: inventory
            """,
            labels={**SHOP, "x/c": {"app": "inventory", "role": "web"}},
        )
    ],
    "12-deny-egress-of-an-app": [
        step(
            ALL.deny("x/a x/b"),
            """
            podSelector:
              matchLabels:
                app: shop
            policyTypes:
              - Egress
            egress: []
            """,
            labels=SHOP,
        )
    ],
    "13-default-deny-egress": [
        step(
            ALL.deny("y"),
            policy(
                """
                podSelector: {}
                policyTypes:
                  - Egress
                """,
                "y/default-deny-all-egress",
            ),
        )
    ],
    "14-deny-external-egress": [
        # DNS anywhere and nothing else; then also everything inside the cluster.
        step(
            DNS.deny("x/a x/b").allow("x/a x/b", ports="53"),
            DNS_ONLY,
            labels=SHOP,
        ),
        step(
            DNS.deny("x/a x/b", to="world").allow("x/a x/b", to="world", ports="53"),
            DNS_ONLY,
            """
            podSelector:
              matchLabels:
                app: shop
            policyTypes:
              - Egress
            egress:
              - to:
                  - namespaceSelector: {}
            """,
            labels=SHOP,
        ),
    ],
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(cluster: Cluster, name: str) -> None:
    cluster.check(*RECIPES[name])
