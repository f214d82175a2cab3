"""What a Pod's spec tells about credentials and DNS; nothing in it may break the pod."""

from __future__ import annotations

from typing import Any

import pytest

from dataplane.model import Hint
from dataplane.sources.hints import hints_of
from dataplane.sources.networkpolicy import network_policy
from dataplane.sources.objects import pod

IMDS = {Hint.AWS}


def env(*names: str, **values: str) -> dict[str, Any]:
    entries = [{"name": name, "value": "x"} for name in names]
    entries += [{"name": name, "value": value} for name, value in values.items()]
    return {"containers": [{"env": entries}]}


def token(audience: str) -> dict[str, Any]:
    return {"volumes": [{"projected": {"sources": [{"serviceAccountToken": {"audience": audience}}]}}]}


@pytest.mark.parametrize(
    ("spec", "hints"),
    [
        ({}, set()),
        (env("HOME", "AWSOME"), set()),
        (env("AWS_REGION"), {Hint.AWS}),
        ({"initContainers": env("AWS_REGION")["containers"]}, {Hint.AWS}),
        (env("AWS_REGION", "AWS_WEB_IDENTITY_TOKEN_FILE"), {Hint.AWS, Hint.WEB_IDENTITY}),
        (token("sts.amazonaws.com"), {Hint.WEB_IDENTITY}),
        (token("vault"), set()),
        (token("pods.eks.amazonaws.com"), {Hint.POD_IDENTITY}),
        (env(AWS_CONTAINER_CREDENTIALS_FULL_URI="http://169.254.170.23/v1/credentials"), {Hint.POD_IDENTITY}),
        (env(AWS_CONTAINER_CREDENTIALS_FULL_URI="http://[fd00:ec2::23]/v1"), {Hint.POD_IDENTITY}),
        (env(AWS_CONTAINER_CREDENTIALS_FULL_URI="http://localhost:1338/"), {Hint.OWN_CREDENTIALS}),
        (env("AWS_REGION", "AWS_ACCESS_KEY_ID"), {Hint.AWS, Hint.OWN_CREDENTIALS}),
        (env("AWS_ENDPOINT_URL_S3"), {Hint.OWN_CREDENTIALS}),
        (env(AWS_EC2_METADATA_DISABLED="True"), {Hint.OWN_CREDENTIALS}),
        (env(AWS_EC2_METADATA_DISABLED="false"), set()),
        (
            {"containers": [{**env("AWS_REGION")["containers"][0], "envFrom": [{"secretRef": {}}]}]},
            {Hint.AWS, Hint.OWN_CREDENTIALS},
        ),
        ({"containers": [{"envFrom": [{"secretRef": {}}]}]}, set()),
        ({"containers": [{"volumeMounts": [{"mountPath": "/root/.aws"}]}]}, {Hint.OWN_CREDENTIALS}),
        ({"dnsPolicy": "ClusterFirst"}, set()),
        ({"dnsPolicy": "Default"}, {Hint.OWN_DNS}),
        ({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["192.0.2.53"]}}, {Hint.OWN_DNS}),
        ({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["169.254.20.10"]}}, {Hint.NODE_LOCAL_DNS}),
        ({"dnsConfig": {"options": [{"name": "ndots"}]}}, set()),
    ],
)
def test_hints(spec: dict[str, Any], hints: set[Hint]) -> None:
    assert hints_of(spec) == hints


@pytest.mark.parametrize("junk", [None, 1, "x", [1, None, "x"], {"a": 1}, [[]], [{"env": 3}]])
@pytest.mark.parametrize(
    "field", ["containers", "initContainers", "volumes", "dnsConfig", "dnsPolicy", "nodeName"]
)
def test_junk_tells_nothing(field: str, junk: object) -> None:
    assert hints_of({field: junk}) == set()


def test_equal_hints_are_one_object() -> None:
    assert hints_of(env("AWS_REGION")) is hints_of(env("AWS_DEFAULT_REGION"))


def test_a_pod_carries_its_hints() -> None:
    found, problems = pod({"metadata": {"name": "a"}, "spec": env("AWS_REGION")}, "f")
    assert problems == []
    assert found is not None
    assert found.hints == {Hint.AWS}


@pytest.mark.parametrize(
    ("spec", "left_open"),
    [
        ({"podSelector": {}}, ()),
        ({}, ("spec.podSelector",)),
        ({"podSelector": {}, "ingress": []}, ()),
        ({"podSelector": {}, "egress": []}, ("spec.egress",)),
        ({"podSelector": {}, "egress": [], "policyTypes": ["Egress"]}, ()),
        ({"podSelector": {}, "ingress": [{}, {"from": []}]}, ("spec.ingress[1].from",)),
        (
            {"podSelector": {}, "egress": [{"to": [], "ports": []}], "policyTypes": ["Egress"]},
            ("spec.egress[0].to", "spec.egress[0].ports"),
        ),
    ],
)
def test_a_policy_tells_where_nothing_means_everything(
    spec: dict[str, Any], left_open: tuple[str, ...]
) -> None:
    found, problems = network_policy({"metadata": {"name": "p"}, "spec": spec}, "f")
    assert problems == []
    assert found is not None
    assert found.left_open == left_open


def test_a_policy_carries_podgates_annotations_only() -> None:
    annotations = {"podgate.dev/check-ignore": "no-dns", "other": "x"}
    found, problems = network_policy(
        {"metadata": {"name": "p", "annotations": annotations}, "spec": {"podSelector": {}}}, "f"
    )
    assert problems == []
    assert found is not None
    assert found.annotations == {"podgate.dev/check-ignore": "no-dns"}
