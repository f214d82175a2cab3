from typing_extensions import Buffer

from dataplane.verdict import Flow as Flow
from dataplane.verdict import Packet as Packet

def decode_packet(data: Buffer, wire: int | None = None) -> Packet: ...
