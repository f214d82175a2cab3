"""IP sets: what is there, and changes to it in one `ipset restore` each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dataplane.errors import KernelError
from dataplane.node import tools


@dataclass(frozen=True, slots=True)
class SetSpec:
    """A set as it is created: `kind` such as hash:ip, `family` 4 or 6."""

    name: str
    kind: str
    family: int

    @property
    def create(self) -> str:
        return (
            f"create {self.name} {self.kind} family {'inet' if self.family == 4 else 'inet6'} maxelem 262144"
        )


@dataclass
class SavedSet:
    """A set as the kernel has it: its type and its members as ipset prints them."""

    kind: str
    members: set[str] = field(default_factory=set)


def installed() -> bool:
    """Whether the program is there."""
    return tools.find("ipset") is not None


def _tool() -> str:
    path = tools.find("ipset")
    if path is None:
        raise KernelError("ipset is not installed; on Debian and Ubuntu: apt-get install ipset")
    return path


def read(prefix: str) -> dict[str, SavedSet]:
    """The sets of this network namespace whose names begin with `prefix`."""
    found: dict[str, SavedSet] = {}
    for line in tools.run([_tool(), "save"]).splitlines():
        action, name, *rest = line.split(" ", 3)
        if not name.startswith(prefix):
            continue
        if action == "create":
            found[name] = SavedSet(rest[0])
        elif action == "add":
            found[name].members.add(rest[0])
    return found


def create(specs: Iterable[SetSpec]) -> None:
    """Create what is missing. KernelError when a set of that name has another type."""
    restore(f"{spec.create} -exist" for spec in specs)


def change(wanted: Mapping[str, set[str]], present: Mapping[str, set[str]]) -> tuple[list[str], list[str]]:
    """The lines that add what is missing, and those that remove what is not wanted, set by set in
    the order of `wanted`, removals in reverse."""
    adds: list[str] = []
    removals: list[str] = []
    for name, members in wanted.items():
        has = present.get(name, set())
        adds += [f"add {name} {member}" for member in sorted(members - has)]
        removals += [f"del {name} {member}" for member in sorted(has - members)]
    return adds, removals[::-1]


def restore(lines: Iterable[str]) -> None:
    """Run `ipset restore`. Adding what is there or removing what is not is no error."""
    text = "\n".join(lines)
    if text:
        tools.run([_tool(), "-exist", "restore"], text + "\n")


def destroy(names: Iterable[str]) -> None:
    """Remove sets that no rule refers to any more."""
    restore(f"destroy {name}" for name in names)
