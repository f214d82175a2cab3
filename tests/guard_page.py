"""Decoding at the very end of readable memory."""

from __future__ import annotations

import ctypes
import mmap

from dataplane._packet import decode_packet
from dataplane.verdict import Packet


class GuardPage:
    """Memory that ends at a page nobody may touch: a read past the end kills the process."""

    def __init__(self) -> None:
        self.size = 4 * mmap.PAGESIZE
        self.map = mmap.mmap(-1, self.size + mmap.PAGESIZE)
        self._protect(0)

    def _protect(self, how: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        anchor = ctypes.c_char.from_buffer(self.map)
        address = ctypes.c_void_p(ctypes.addressof(anchor) + self.size)
        del anchor
        assert libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), how) == 0, ctypes.get_errno()

    def decode(self, data: bytes, wire: int | None = None) -> Packet:
        start = self.size - len(data)
        self.map[start : self.size] = data
        with memoryview(self.map) as whole, whole[start : self.size] as end:
            return decode_packet(end, wire)

    def close(self) -> None:
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)
        self.map.close()
