"""What must be so before a controller writes: nobody else does, and the kind is served."""

from __future__ import annotations

import asyncio
import contextlib
import os
from importlib import metadata
from pathlib import Path
from typing import Any

from dataplane.controller.objects import MANAGED_BY_LABEL, MANAGER, Raw
from dataplane.errors import InputError, PodgateError
from dataplane.sources.kubernetes import DEFINITIONS, POLICY_ENDPOINTS, is_listed
from dataplane.sources.kubernetes_client import ApiFault, ApiServer

VPC_CNI = "/api/v1/namespaces/kube-system/configmaps/amazon-vpc-cni"
_SWITCH = "enable-network-policy-controller"
_SERVED_SECONDS = 30.0
_LOOK_SECONDS = 0.2
_ANSWER_SECONDS = 10.0


class Refusal(PodgateError):
    """The controller must not work here."""

    exit_code = 1


def refuse_foreign(who: str) -> Refusal:
    """Somebody else's PolicyEndpoints are there."""
    return Refusal(
        f"another controller writes PolicyEndpoints: {who} without the label {MANAGED_BY_LABEL}: {MANAGER};"
        " stop that controller. What it has left behind goes with `kubectl delete policyendpoints -A -l"
        f" '{MANAGED_BY_LABEL}!={MANAGER}'`"
    )


def refuse_switched_on() -> Refusal:
    """EKS's controller is switched on."""
    return Refusal(
        f"EKS's controller writes PolicyEndpoints here (ConfigMap kube-system/amazon-vpc-cni: {_SWITCH}:"
        ' "true"), and two must not: set that to "false", or do without `podgate controller`'
    )


async def switched_on(api: ApiServer) -> bool:
    """Whether EKS's controller is. ApiFault when that cannot be told."""
    try:
        found = await api.get(VPC_CNI, {})
    except ApiFault as fault:
        if fault.status == 404:
            return False
        if fault.status == 403:
            raise ApiFault(
                "not allowed to get the ConfigMap kube-system/amazon-vpc-cni, which tells whether EKS's"
                f" controller writes PolicyEndpoints: apply deploy/controller/rbac.yaml ({fault})",
                fault.status,
            ) from None
        raise
    data = found.get("data")
    return isinstance(data, dict) and str(data.get(_SWITCH)).strip().lower() == "true"


async def kind_served(api: ApiServer) -> bool:
    """Whether the API server has PolicyEndpoints; everybody may ask that. ApiFault when it cannot be told."""
    try:
        answer = await api.get(f"/apis/{POLICY_ENDPOINTS.group}/{POLICY_ENDPOINTS.version}", {})
    except ApiFault as fault:
        if fault.status == 404:
            return False
        raise
    return is_listed(answer.get("resources"))


async def install_definition(api: ApiServer, log: Any) -> None:
    """Have PolicyEndpoints served. ApiFault, or Refusal, when that does not work."""
    made = definition()
    made["metadata"].setdefault("labels", {})[MANAGED_BY_LABEL] = MANAGER
    log.info("installing the CustomResourceDefinition", name=str(POLICY_ENDPOINTS))
    try:
        await api.send("POST", DEFINITIONS.path, made, _ANSWER_SECONDS)
    except ApiFault as fault:
        if fault.status == 403:
            raise ApiFault(
                f"not allowed to create the CustomResourceDefinition {POLICY_ENDPOINTS}: apply"
                " deploy/controller/rbac.yaml, or install the definition yourself (kubectl apply -k"
                f" deploy/crds) ({fault})",
                fault.status,
            ) from None
        if fault.status != 409:  # another one was quicker
            raise
    for _ in range(round(_SERVED_SECONDS / _LOOK_SECONDS)):
        if await kind_served(api):
            return
        await asyncio.sleep(_LOOK_SECONDS)
    raise Refusal(
        f"the CustomResourceDefinition {POLICY_ENDPOINTS} is not served {_SERVED_SECONDS:.0f} s after it was"
        f" installed: kubectl describe crd {POLICY_ENDPOINTS}"
    )


def refuse_missing() -> Refusal:
    """The kind is not served, and we were told not to install it."""
    return Refusal(
        f"the CustomResourceDefinition {POLICY_ENDPOINTS} is not installed: kubectl apply -k deploy/crds,"
        " or run with --install-crd"
    )


def definition() -> Raw:
    """The CustomResourceDefinition of PolicyEndpoints."""
    import yaml

    name = f"{POLICY_ENDPOINTS}.yaml"
    path = Path(__file__).resolve().parents[2] / "deploy/crds" / name
    if not path.is_file():
        # Not below sys.prefix: `pip install --user` and Debian's pip put data elsewhere.
        with contextlib.suppress(metadata.PackageNotFoundError):
            for file in metadata.files("podgate") or ():
                if file.match(f"share/podgate/crds/{name}"):
                    path = Path(os.path.normpath(str(file.locate())))
    if not path.is_file():
        raise InputError(f"{path}: no such file; kubectl apply the definition, and run with --no-install-crd")
    made: Raw = yaml.safe_load(path.read_text())
    return made
