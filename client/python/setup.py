"""Build step: generates headstart/v1/prefill_pb2.py and its type stub from the proto folder of the repository."""
import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).resolve().parent
PROTO_ROOT = HERE.parent.parent / "proto"
PROTO = "headstart/v1/prefill.proto"


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


setup(cmdclass={"build_py": BuildWithMessages})
