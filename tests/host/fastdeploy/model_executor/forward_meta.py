"""What a forward is told besides its tokens."""


class ForwardMeta:
    def __init__(self, ids_remove_padding, step_use_cudagraph=False):
        self.ids_remove_padding = ids_remove_padding
        self.step_use_cudagraph = step_use_cudagraph
