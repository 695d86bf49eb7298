"""Type hints of the public face: complete here; consistent in `make types`, where pyright reads them."""

import ast
import inspect
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

import fast_backbones as fb
from fast_backbones import backbones, engine, kernels, training

ROOMS = {"fb": fb, "kernels": kernels, "engine": engine, "backbones": backbones, "training": training}
FACE = ROOT / "tests" / "typing_face.py"
PUBLIC = {
    f"{room}.{name}": getattr(module, name) for room, module in ROOMS.items() for name in module.__all__
}


def functions() -> dict[str, object]:
    """Public functions, and the methods that public classes define themselves."""
    found = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)}
    for name, thing in PUBLIC.items():
        if inspect.isclass(thing):
            found |= {
                f"{name}.{method}": inspect.unwrap(member)
                for method, member in vars(thing).items()
                if inspect.isfunction(member) and (not method.startswith("_") or method == "__init__")
            }
    return found


# TorchScript infers Tensor or List[Tensor] from the branch that is taken.
INFERRED = [
    f"{room}.Backbone.{name}: its result"
    for room in ("fb", "backbones")
    for name in ("forward", "forward_modules")
]


def test_every_public_function_is_annotated():
    bare = []
    for name, function in functions().items():
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        bare += [f"{name}: {p.name}" for p in parameters if p.annotation is p.empty]
        if signature.return_annotation is signature.empty and not name.endswith("__init__"):
            bare.append(f"{name}: its result")
    assert bare == INFERRED
    assert len(functions()) > 200


def test_the_face_uses_every_public_name():
    """Builders of models are alike, so one of each class stands for them."""
    used = {node.attr for node in ast.walk(ast.parse(FACE.read_text())) if isinstance(node, ast.Attribute)}
    builders = {name for name in backbones.__all__ if inspect.isfunction(getattr(backbones, name))}
    wanted = {name.split(".")[-1] for name in PUBLIC} - builders - {*ROOMS, "__version__"}
    assert wanted - used == {"forward"}  # of the engine, which backbones call
    assert {"create_model", "list_models", "load_weights", "register_model", "transforms_for"} <= used


def test_the_package_is_marked_as_typed():
    assert (ROOT / "fast_backbones" / "py.typed").read_bytes() == b""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pyright") is None, reason="no pyright on PATH; `make types` installs one")
def test_pyright_finds_nothing_in_the_face():
    command = ["pyright", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=900)
    assert done.returncode == 0, done.stdout
