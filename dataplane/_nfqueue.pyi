from collections.abc import Iterable

from dataplane._engine import Worker

class NativeQueue:
    worker: Worker
    number: int
    maxlen: int
    fail_open: bool
    portid: int
    def __init__(
        self,
        worker: Worker,
        number: int,
        *,
        mark_egress: int,
        mark_ingress: int,
        mark_reply: int,
        offload: bool = True,
        fail_open: bool = False,
        maxlen: int = 4096,
    ) -> None: ...
    def bind(self) -> None: ...
    def run(self) -> None: ...
    def stop(self) -> None: ...
    def close(self) -> None: ...
    def losses(self) -> dict[str, int]: ...

def holder_of(number: int) -> int | None: ...
def parse(message: bytes) -> tuple[int, int, int, int, int, bytes, int, bool] | None: ...
def encode_answers(
    number: int, answers: Iterable[tuple[int, bool, int]], drop_older: bool = False
) -> bytes: ...
