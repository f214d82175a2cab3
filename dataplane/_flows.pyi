from typing import Self, final

from dataplane.verdict import Flow as Flow

_Value = tuple[int, int, int, int, int, int, int, int]

@final
class FlowCache:
    @property
    def capacity(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __new__(cls, entries: int = 65536, seed: int | None = None) -> Self: ...
    def bucket_of(self, flow: Flow, *, indev: int = 0, outdev: int = 0, hook: int = 2) -> int: ...
    def put(
        self, flow: Flow, value: _Value, *, generation: int, indev: int = 0, outdev: int = 0, hook: int = 2
    ) -> None: ...
    def get(
        self, flow: Flow, *, generation: int, indev: int = 0, outdev: int = 0, hook: int = 2
    ) -> _Value | None: ...
