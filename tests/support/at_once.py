"""Checks that wait for time limits and compute little: some of a file at once, each a test by its name."""

import concurrent.futures
import functools

AT_A_TIME = 8  # more of them would hold one another up on a busy machine, whose time limits they wait for


class AtOnce:
    """`check` collects them; `names` are for `parametrize`; the first `result` runs all, in threads."""

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
        with concurrent.futures.ThreadPoolExecutor(AT_A_TIME) as pool:
            return {name: pool.submit(check) for name, check in self._checks.items()}

    def result(self, name):
        """Return what the check returned, or raise what it raised."""
        return self._futures[name].result()
