"""The messages of the VPC CNI's call, as they are on the wire (amazon-vpc-cni-k8s, rpc/rpc.proto).

    package rpc;
    service NPBackend {
      rpc EnforceNpToPod (EnforceNpRequest) returns (EnforceNpReply);
      rpc DeletePodNp (DeleteNpRequest) returns (DeleteNpReply);
    }

The classes are made here at import time, so there is no generated code to keep in step with the
protobuf runtime. Importing this takes protobuf: only who serves the CNI should.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

PACKAGE = "rpc"
SERVICE = f"{PACKAGE}.NPBackend"
_Field = descriptor_pb2.FieldDescriptorProto
_STRING, _BOOL, _INT32 = _Field.TYPE_STRING, _Field.TYPE_BOOL, _Field.TYPE_INT32

# Fields in the order of their numbers, from 1.
_MESSAGES: dict[str, tuple[tuple[str, _Field.Type.ValueType], ...]] = {
    "EnforceNpRequest": (
        ("K8S_POD_NAME", _STRING),
        ("K8S_POD_NAMESPACE", _STRING),
        ("NETWORK_POLICY_MODE", _STRING),
        ("InterfaceCount", _INT32),
    ),
    "EnforceNpReply": (("Success", _BOOL),),
    "DeleteNpRequest": (("Success", _BOOL), ("K8S_POD_NAME", _STRING), ("K8S_POD_NAMESPACE", _STRING)),
    # The same request of CNI builds that numbered it as the other one is numbered.
    "EarlierDeleteNpRequest": (("K8S_POD_NAME", _STRING), ("K8S_POD_NAMESPACE", _STRING)),
    "DeleteNpReply": (("Success", _BOOL),),
}


def _make() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="rpc.proto", package=PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, type_) in enumerate(fields, 1):
            message.field.add(
                name=field,
                number=number,
                type=type_,
                label=_Field.LABEL_OPTIONAL,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in _MESSAGES
    }


_CLASSES = _make()


class EnforceRequest(NamedTuple):
    """A pod's interface has been made. `mode`: standard, strict, or empty where the CNI does not say."""

    name: str
    namespace: str
    mode: str
    interfaces: int


class DeleteRequest(NamedTuple):
    """A pod's interface has been taken away."""

    name: str
    namespace: str


def parse_enforce(data: bytes) -> EnforceRequest:
    """ValueError when the bytes are not that message."""
    got = _parse("EnforceNpRequest", data)
    return EnforceRequest(
        got.K8S_POD_NAME, got.K8S_POD_NAMESPACE, got.NETWORK_POLICY_MODE, got.InterfaceCount
    )


def parse_delete(data: bytes) -> DeleteRequest:
    """ValueError when the bytes are not that message, in either of its numberings."""
    got = _parse("DeleteNpRequest", data)
    if not got.K8S_POD_NAMESPACE:  # every pod has one; in the other numbering field 3 does not exist
        got = _parse("EarlierDeleteNpRequest", data)
    return DeleteRequest(got.K8S_POD_NAME, got.K8S_POD_NAMESPACE)


def enforce_reply(success: bool) -> bytes:
    encoded: bytes = _CLASSES["EnforceNpReply"](Success=success).SerializeToString()
    return encoded


def delete_reply(success: bool) -> bytes:
    encoded: bytes = _CLASSES["DeleteNpReply"](Success=success).SerializeToString()
    return encoded


def _parse(name: str, data: bytes) -> Any:
    try:
        return _CLASSES[name].FromString(data)
    except DecodeError as error:
        raise ValueError(f"not a {name}: {error}") from None
