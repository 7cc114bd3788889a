"""Package metadata of fd_fusion. Tool settings are in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "fd_fusion/__init__.py").read_text(), re.M).group(1)
README = HERE / "README.md"

# No extra names paddlepaddle-gpu: the newest one on PyPI is 2.6.2, which would overwrite the 3.x build that
# FastDeploy runs on. Next to FastDeploy the command is `pip install --no-deps .`.
CPU = ["paddlepaddle>=3.3", "triton>=3.3", "numpy", "safetensors", "ml_dtypes"]
BUILD = ["setuptools", "wheel"]  # a test builds the wheel


class BuildWithPatches(build_py):
    """A wheel holds a copy of patches/ for `python -m fd_fusion patch`; a clone has the folder itself."""

    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree(HERE / "patches", Path(self.build_lib, "fd_fusion/patches"), dirs_exist_ok=True)


setup(
    name="fd_fusion",
    version=VERSION,
    description="All-reduce + residual + RMSNorm in one kernel, for PaddlePaddle and FastDeploy",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    project_urls={"Host (FastDeploy)": "https://github.com/PaddlePaddle/FastDeploy"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["fd_fusion", "fd_fusion.*"]),
    # Said outright, an editable install puts this folder on the path. By default it hooks the import of the name,
    # and beside a clone that is called fd_fusion too, Python finds that folder first.
    package_dir={"": "."},
    cmdclass={"build_py": BuildWithPatches},
    package_data={"fd_fusion": ["py.typed"]},
    install_requires=[],
    extras_require={
        "cpu": CPU,
        "test": [
            *("pytest>=8", "pytest-timeout", "pytest-cov", "pytest-xdist"),
            *("ruff", "mypy", "prometheus_client", *BUILD),
        ],
        "bench": ["matplotlib"],
    },
    entry_points={
        "console_scripts": ["fd-fusion = fd_fusion.__main__:main"],
        "fastdeploy.model_register_plugins": ["fd_fusion = fd_fusion.hosts.fastdeploy.plugin:register"],
    },
)
