"""What a process remembers of the calls of its schedulers, and what a scheduler knows of the state it was left in."""

import threading
from collections import Counter, OrderedDict
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from ..engine.memory import Recycled
from .content import PLAIN, key_of

HIDDEN = "_fastgen"  # the attribute that holds a session


class State:
    """Certain values of all attributes of a scheduler: the calls seen there, what each does, and the state that follows."""

    __slots__ = ("moves",)
    MOST = 4096

    def __init__(self) -> None:
        self.moves: dict[Any, list[Any]] = {}

    def remember(self, call: Any, made: Any) -> list[Any]:
        """[what a call does, the state it leads to, None where that is not known yet]."""
        if len(self.moves) >= self.MOST:
            self.moves.clear()
        edge = self.moves[call] = [made, None]
        return edge


class Memory:
    """States, and what calls do by the attributes that they read; the least recently used are forgotten.

    Args:
        limit: of each.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._limit, self._lock = limit, threading.Lock()
        self._states: OrderedDict[Any, State] = OrderedDict()
        self._moves: OrderedDict[Any, dict[tuple[str, ...], dict[Any, Any]]] = OrderedDict()

    def state(self, key: Any) -> State:
        with self._lock:
            return self._used(self._states, key, State)

    def find(self, call: Any, scheduler: Any, session: "Session") -> Any:
        """What ``call`` does where the attributes that it reads are as they are now; None where that has not been seen."""
        for names, found in list(self._moves.get(call, {}).items()):
            if (made := found.get(session.key(scheduler, names))) is not None:
                with self._lock:
                    self._used(self._moves, call, dict)
                return made
        return None

    def keep(self, call: Any, names: tuple[str, ...], key: Any, made: Any) -> None:
        with self._lock:
            by_names = self._used(self._moves, call, dict).setdefault(names, {})
            if len(by_names) >= self._limit:
                by_names.clear()
            by_names[key] = made

    def clear(self) -> None:
        with self._lock:
            self._states.clear()
            self._moves.clear()

    def _used(self, entries: "OrderedDict[Any, Any]", key: Any, make: Any) -> Any:
        if key not in entries:
            entries[key] = make()
            if len(entries) > self._limit:
                entries.popitem(last=False)
        entries.move_to_end(key)
        return entries[key]


MEMORY = Memory()
_version = attrgetter("_version")


class Session:
    """Beside the attributes of a stand-in: the state they were left in, and memory for outputs."""

    def __init__(self) -> None:
        self._state: State | None = None
        self._values: list[Any] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []  # among the values, with their elements
        self._schedule: list[Tensor] = []  # the tensors among them that no step works on,
        self._versions: list[int] = []  # and their versions
        self._keys: dict[str, tuple[Any, int, Any]] = {}
        self.pool = Recycled()
        self.fallbacks: Counter[str] = Counter()

    @staticmethod
    def of(scheduler: Any) -> "Session":
        session: Session | None = vars(scheduler).get(HIDDEN)
        if session is None:
            session = vars(scheduler)[HIDDEN] = Session()
        return session

    def state_of(self, scheduler: Any) -> State:
        """The state that a scheduler is in.

        Raises:
            NotLinear: an attribute is of a kind whose content is not known.
        """
        attributes = vars(scheduler)
        if self._state is not None and self._untouched(attributes):
            return self._state
        names = [name for name in attributes if name != HIDDEN]
        state = MEMORY.state((type(scheduler), tuple(names), self.key(scheduler, names)))
        self.leave(attributes, state)
        return state

    def leave(self, attributes: dict[str, Any], state: State | None, schedule: bool = True) -> None:
        """The attributes are in ``state``, until somebody touches them; ``schedule``: its tensors are new ones."""
        self._state, self._values = state, list(attributes.values())
        if schedule or self._lists:
            self._lists = [(value, value[:]) for value in self._values if type(value) is list]
        if schedule:
            self._schedule = [v for v in self._values if type(v) is Tensor and v.dim() < 2 and not v.is_inference()]
            self._versions = list(map(_version, self._schedule))

    def _untouched(self, attributes: dict[str, Any]) -> bool:
        return (
            len(self._values) == len(attributes)
            and all(map(is_, self._values, attributes.values()))
            and list(map(_version, self._schedule)) == self._versions
            and (not self._lists or all([len(a) == len(b) and all(map(is_, a, b)) for a, b in self._lists]))
        )

    def key(self, scheduler: Any, names: Any) -> tuple[Any, ...]:
        """The values of attributes, as something that is equal where their content is."""
        attributes = vars(scheduler)
        return tuple([self._key_of(name, attributes[name]) if name in attributes else "absent" for name in names])

    def _key_of(self, name: str, value: Any) -> Any:
        if type(value) in PLAIN:
            return type(value), value
        if type(value) is list:
            return tuple([key_of(name, element) for element in value])
        version = value._version if isinstance(value, Tensor) and not value.is_inference() else 0
        known = self._keys.get(name)
        if known is None or known[0] is not value or known[1] != version:
            known = self._keys[name] = value, version, key_of(name, value)
        return known[2]

    def __deepcopy__(self, memo: Any) -> "Session":
        return Session()

    def __reduce__(self) -> Any:
        return Session, ()
