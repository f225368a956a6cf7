"""Nothing that is read can run code: no pickles but by torch's loader of plain tensors, no code of a model's
repository, no evaluated text; what torch.compile made is the exception, and is read where a setting says so alone.
Weights are loaded by one function, which refuses a checkpoint that lacks some."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
_SOURCES = sorted(path for name in ("textual_inversion", "pipeline") for path in (ROOT / name).rglob("*.py"))
_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "subprocess"}
_BUILTINS = {"eval", "exec", "compile", "__import__"}
_METHODS = {"read_pickle", "system", "popen", "load_cache_artifacts"}
_WEIGHTS = {"CLIPTextModel", "UNet2DConditionModel", "AutoencoderKL", "cls", "model_class"}


def dangers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in _MODULES)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _MODULES:
            yield str(node.module)
        if isinstance(node, ast.Call):
            yield from _dangers_of_call(node)


def _dangers_of_call(node: ast.Call) -> Iterator[str]:
    function = node.func
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
    is_unsafe_load = (owner, name) == ("torch", "load") and not {"weights_only"} & {k.arg for k in node.keywords}
    if name in (_METHODS if owner else _BUILTINS) or is_unsafe_load:
        yield f"{owner}.{name}"
    for keyword in node.keywords:
        value = ast.unparse(keyword.value)
        wrong = {
            "trust_remote_code": "False",
            "allow_pickle": "False",
            "use_safetensors": "True",
            "weights_only": "True",
        }
        if wrong.get(keyword.arg or "", value) != value:
            yield f"{name}({keyword.arg}={value})"
    if name == "from_pretrained" and owner in _WEIGHTS and not {"use_safetensors"} & {k.arg for k in node.keywords}:
        yield f"{owner}.from_pretrained without use_safetensors"


def test_no_source_reads_what_could_run() -> None:
    found = {path.relative_to(ROOT).as_posix(): list(dangers(ast.parse(path.read_text()))) for path in _SOURCES}
    assert len(found) > 50
    assert {path: names for path, names in found.items() if names} == {
        "pipeline/actor/compile_cache.py": ["torch.compiler.load_cache_artifacts"]
    }
    assert RunConfig().actors.compile_cache == "", "only where an operator names a folder as safe as the image"


def _bypasses(tree: ast.AST) -> Iterator[str]:
    """Yield calls that load weights and do not see whether some are missing; tokenizers and schedulers have none."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained":
            owner = ast.unparse(node.func.value)
            has_loaded_modules = owner.endswith("Pipeline") and any(keyword.arg is None for keyword in node.keywords)
            if not (has_loaded_modules or "Tokenizer" in owner or "Scheduler" in owner):
                yield f"{owner}.from_pretrained"


def test_weights_are_loaded_in_one_place() -> None:
    folders = ("textual_inversion", "pipeline", "demo", "benchmarks")
    paths = [path for name in folders for path in sorted((ROOT / name).rglob("*.py"))]
    found = {path.relative_to(ROOT).as_posix(): list(_bypasses(ast.parse(path.read_text()))) for path in paths}
    assert {path: names for path, names in found.items() if names} == {
        "textual_inversion/weights.py": ["cls.from_pretrained"]
    }


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from dill import load", "torch.load(f)", "torch.load(f, weights_only=x)", "eval(x)",
     "os.system(x)", "cls.from_pretrained(x)", "np.load(f, allow_pickle=True)",
     "AutoModel.from_pretrained(x, trust_remote_code=True)"],
)  # fmt: skip
def test_the_check_itself_sees_them(text: str) -> None:
    assert list(dangers(ast.parse(text)))
