"""The custom all-reduce of a host whose compiled ops are missing: it is never initialised."""

custom_ar = False


class CustomAllreduce:
    def __init__(self, group, max_size=8192 * 1024):
        self.group, self.max_size, self._initialized = group, max_size, False
