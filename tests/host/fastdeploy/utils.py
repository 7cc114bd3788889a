"""Loggers that write under FD_LOG_DIR, and the registration of an op that tracing does not look into."""

import argparse
import logging
import os


def get_logger(name, file_name=None, without_formater=False, print_to_console=False):
    logger = logging.getLogger(f"fastdeploy.{name}")
    if not logger.handlers:
        folder = os.environ.get("FD_LOG_DIR", "log")
        os.makedirs(folder, exist_ok=True)
        handler = logging.FileHandler(os.path.join(folder, file_name or f"{name}.log"))
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(process)d %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


llm_logger = get_logger("fastdeploy", "fastdeploy.log")


class FlexibleArgumentParser(argparse.ArgumentParser):
    """Takes --a_b for --a-b."""

    def parse_args(self, args=None, namespace=None):
        import sys

        words = sys.argv[1:] if args is None else list(args)
        fixed = [
            "--" + w[2:].split("=", 1)[0].replace("_", "-") + ("=" + w.split("=", 1)[1] if "=" in w else "")
            if w.startswith("--")
            else w
            for w in words
        ]
        return super().parse_args(fixed, namespace)


def register_custom_python_op(name, infer_meta, input_names, output_names, inplace_map):
    """The host registers such functions as ops; on a CPU in eager mode the function itself does."""

    def decorate(function):
        return function

    return decorate
