"""Names to things: the one place where an estimator, an intervention or a judge is added."""

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from demur.errors import ConfigError, UnknownNameError

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Named constructors of one kind of thing, ours and those of installed plug-ins.

    A plug-in adds to a registry by an entry point in the group `demur.<kind>`, whose name is the
    registered name and whose target is the constructor.

    Attributes:
        kind: What the names stand for, as it reads in an error: "estimator", "judge".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._targets: dict[str, Callable[..., T]] = {}
        self._plugins_read = False

    def register(self, name: str) -> Callable[[C], C]:
        """Decorate a constructor so that `make(name)` calls it.

        Raises:
            ConfigError: The name is taken.
        """

        def add(target: C) -> C:
            if name in self._targets:
                raise ConfigError(f"two {self.kind}s are called `{name}`", "rename one of them")
            self._targets[name] = target
            return target

        return add

    def _read_plugins(self) -> None:
        if not self._plugins_read:
            self._plugins_read = True
            for point in entry_points(group=f"demur.{self.kind}"):
                self._targets.setdefault(point.name, point.load())

    def make(self, name: str, **options: Any) -> T:
        """Construct the thing called `name`; the caller records the options.

        Raises:
            UnknownNameError: Nothing has that name.
        """
        self._read_plugins()
        if name not in self._targets:
            raise UnknownNameError.among(self._targets, kind=self.kind, name=name)
        return self._targets[name](**options)

    def __iter__(self) -> Iterator[str]:
        self._read_plugins()
        return iter(sorted(self._targets))

    def __contains__(self, name: object) -> bool:
        self._read_plugins()
        return name in self._targets
