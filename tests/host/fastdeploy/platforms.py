"""Which device the host runs on."""


class _Cpu:
    def is_cuda(self):
        return False

    def is_cpu(self):
        return True


current_platform = _Cpu()
