"""Read the commands and blocks of a page in their order, and run or check them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from k8s import preflight
from pipeline import __main__ as ti

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```|^ {4,}(\S[^\n]*)$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"\s{2,}#.*")
_SIZES = {"steps": 2, "batch_size": 4, "guidance_scale": 2.0}


@dataclass(frozen=True, slots=True)
class Step:
    """A command line, or a block of Python."""

    language: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def steps_of(page: str) -> list[Step]:
    """Return what a page tells its reader to enter, in its order; fails for blocks of other languages."""
    found = []
    for block in _BLOCK.finditer((ROOT / page).read_text()):
        language, code, line = block.groups()
        assert language in (None, "python"), f"{page}: no test runs a block of {language}"
        found.append(Step("python", code) if language else Step("shell", _COMMENT.sub("", line)))
    return found


def small_settings() -> list[str]:
    """Return options that make a run take a few steps."""
    settings = {
        "device": "cpu",
        "inversion.steps": 6,
        "inversion.batch_size": 2,
        "grid.prompts": '["a photo of a {}"]',
        "grid.images_per_prompt": 1,
        "gate.ladder": "[]",
        "actors.count": 1,
        **{f"actors.{name}": "off" for name in ("gradient_checkpointing", "vae_slicing", "vae_tiling")},
        **{f"{part}.sampling.{key}": value for part in ("grid", "generation") for key, value in _SIZES.items()},
    }
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def run_steps(steps: list[Step], code_of: Callable[[list[str]], int], **replaced: str) -> None:
    """Run the commands of `ti` and the blocks of Python in the present folder; check all other commands.

    code_of: the exit code that a command of `ti`, given as its words, must have. replaced: texts of the page -> what
    they are here.
    """
    names: dict[str, object] = {}
    for step in steps:
        text = step.text
        for old, new in replaced.items():
            text = text.replace(old, new)
        if step.language == "python":
            exec(compile(text, "page", "exec"), names)
        elif step.words[0] == "ti":
            arguments = shlex.split(text)[1:]
            more = small_settings() if arguments[0] in ("run", "validate") else []
            assert ti.main([*arguments, *more]) == code_of(step.words), text
        else:
            check_tool(step.words)


def check_tool(words: list[str]) -> None:
    """Check what a command of another tool names: targets, manifests, objects, images."""
    text = " ".join(words)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if "=" not in word} <= {*targets}, text
    elif words[0] == "kubectl":
        _check_kubectl(words[1:])
    elif words[:2] in (["docker", "tag"], ["kind", "load"]):
        assert f"value: {words[-1]}\n" in (ROOT / "k8s/overlays/kind/local_image.yaml").read_text(), text
    elif words[:2] == ["helm", "repo"]:
        assert f"{text}\n" in (ROOT / "k8s/README.md").read_text(), text
    elif words[:2] == ["helm", "install"]:
        version = words[words.index("--version") + 1]
        assert f"--version {version}" in (ROOT / "k8s/README.md").read_text(), text
    elif words[:2] == ["python", "k8s/preflight.py"]:
        folders = [ROOT / folder for folder in words[2:]]
        assert all(folder.is_dir() for folder in folders), text
        assert preflight.main([*map(str, folders)]) == 2, f"no placeholder is left to refuse: {text}"
    else:
        assert text == "kind create cluster", f"no test runs or checks: {text}"


def _check_kubectl(words: list[str]) -> None:
    text = " ".join(words)
    if words[:2] == ["apply", "-k"]:
        assert (ROOT / words[2] / "kustomization.yaml").is_file(), text
        return
    assert words[:2] == ["-n", "concepts"], f"not in the namespace of the manifests: {text}"
    assert words[2] in ("create", "get", "logs", "wait"), text
    sources = "\n".join(path.read_text() for path in (ROOT / "k8s").rglob("*.yaml"))
    for kind, name in re.findall(r"\b(job|cronjob|rayjob)/([\w-]+)", text):
        assert re.search(rf"kind: {kind}\nmetadata:\n  name: {name}\n", sources, re.IGNORECASE), text
