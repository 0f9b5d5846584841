"""Build step: generates headstart/v1/prefill_pb2.py and its type stub from the proto folder of the repository.

With libheadstart_receiver.so in the package's folder the wheel is for this platform (CMake's target headstart_wheel puts it
there, in a copy of the source); without it, for all.
"""
import pathlib

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).resolve().parent
PROTO_ROOT = HERE.parent.parent / "proto"
PROTO = "headstart/v1/prefill.proto"
HAS_LIBRARY = (HERE / "src/headstart/libheadstart_receiver.so").exists()


def generate(out_dir):
    from grpc_tools import protoc
    from importlib import resources

    well_known = resources.files("grpc_tools") / "_proto"
    arguments = [f"-I{PROTO_ROOT}", f"-I{well_known}", f"--python_out={out_dir}", f"--pyi_out={out_dir}", PROTO]
    if protoc.main(["protoc", *arguments]) != 0:
        raise RuntimeError(f"protoc failed on {PROTO_ROOT / PROTO}")


class BuildWithMessages(build_py):
    def run(self):
        super().run()
        out_dir = HERE / "src" if self.editable_mode else pathlib.Path(self.build_lib)
        out_dir.mkdir(parents=True, exist_ok=True)
        generate(out_dir)


class MaybeBinary(Distribution):
    def has_ext_modules(self):
        return HAS_LIBRARY


class AnyPythonWheel(bdist_wheel):
    def get_tag(self):
        """The library is loaded by any Python: py3-none-PLATFORM, or -any without it."""
        return "py3", "none", super().get_tag()[2]


setup(distclass=MaybeBinary, cmdclass={"build_py": BuildWithMessages, "bdist_wheel": AnyPythonWheel})
