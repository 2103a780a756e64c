"""What is worked out once per process, whoever asks first and from wherever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class once_apart(Generic[P, T]):  # noqa: N801 - a decorator
    """Caches a function of hashable arguments and runs it in a thread of its own, where nothing of its caller's is on.

    Grad mode, inference mode, autocast, saved-tensor hooks (checkpointing, offload), dispatch modes, what torch.compile
    traces, the current device and stream all belong to a thread. Threads that ask at once wait for the first; what is
    raised is raised where it was asked for, and nothing is cached then.
    """

    def __init__(self, function: Callable[P, T]) -> None:
        self.__wrapped__, self.__doc__, self.__name__ = function, function.__doc__, function.__name__
        self._known: dict[Hashable, T] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """The result, from the cache if it is there."""
        key = (args, tuple(kwargs.items()))
        try:
            return self._known[key]
        except KeyError:
            pass
        with self._lock:
            if key not in self._known:
                self._known[key] = self._apart(*args, **kwargs)
            return self._known[key]

    def cache_clear(self) -> None:
        """Forget everything."""
        self._known.clear()

    def _apart(self, *args: P.args, **kwargs: P.kwargs) -> T:
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(self.__wrapped__(*args, **kwargs))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, name=f"finetune {self.__name__}", daemon=True)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]
