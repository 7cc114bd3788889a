from .custom_all_reduce import CustomAllreduce

__all__ = ["CustomAllreduce"]
