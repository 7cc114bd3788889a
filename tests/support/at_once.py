"""Checks that wait for time limits and compute next to nothing: all of a file at once, each a test by its name."""

import concurrent.futures
import functools


class AtOnce:
    """`check` collects them; `names` are for `parametrize`; the first `result` starts all, in threads."""

    def __init__(self):
        self._checks = {}

    def check(self, *values):
        """Collect a function, to be called with each of the values: `name-value`."""

        def collect(function):
            name = function.__name__
            self._checks |= {f"{name}-{value}": functools.partial(function, value) for value in values}
            return function

        return collect

    @property
    def names(self):
        return list(self._checks)

    @functools.cached_property
    def _futures(self):
        with concurrent.futures.ThreadPoolExecutor(len(self._checks)) as pool:
            return {name: pool.submit(check) for name, check in self._checks.items()}

    def result(self, name):
        """Return what the check returned, or raise what it raised."""
        return self._futures[name].result()
