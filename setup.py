"""The list of packages; everything else stands in pyproject.toml.

pyproject.toml can either search for packages or list them. The search cannot see that `kernels/` is
installed as `triton_deq.kernels`, and a list would have to be edited for every new sub-package.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["triton_deq", "triton_deq.*"]),
        "triton_deq.kernels",
        "triton_deq.kernels.catalog",
    ],
    package_dir={"triton_deq.kernels": "kernels"},
    package_data={"triton_deq": ["py.typed"]},  # type checkers read our annotations only where it lies
)
