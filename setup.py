from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["r1fast", "r1fast.*"]), "r1fast_kernels"],
    package_dir={"r1fast_kernels": "kernels"},
    package_data={"r1fast": ["recipes/*.yaml"]},
)
