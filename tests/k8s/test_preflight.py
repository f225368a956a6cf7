"""The preflight refuses what is left unfilled, and the runbook's table says the same as it does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from k8s import preflight
from tests.k8s.render import K8S, Manifest, only, render

ROWS = [
    re.findall(r"\| *(.*?) *(?=\|)", line)
    for line in (K8S / "README.md").read_text().split("## What is where")[0].splitlines()
    if line.count("|") == 6 and "---" not in line and "| unfilled |" not in line
]
"""Rows of the table of what to fill in: value, file, meaning, example, how it looks unfilled."""


def _fill(folder: Path, row: list[str]) -> None:
    """Write a row's example into a copy of the manifests, in the files that the row names."""
    _, file, _, example, unfilled = row
    named = [name for name in re.findall(r"`([^`]+)`", file) if re.search(r"\.(yaml|toml|env)$", name)]
    paths = [path for name in named for path in folder.rglob("*") if path.as_posix().endswith("/" + name)]
    filled = [path for path in paths if unfilled.strip("`") in path.read_text()]
    assert filled, f"{unfilled} is in none of {named}"
    for path in filled:
        path.write_text(path.read_text().replace(unfilled.strip("`"), example.strip("`")))


def test_table_and_preflight_agree() -> None:
    assert [[each.text in unfilled for each in preflight.PLACEHOLDERS].index(True) for *_, unfilled in ROWS] == [
        *range(len(preflight.PLACEHOLDERS))
    ]


@pytest.mark.parametrize(
    "folder",
    ["overlays/cpu-demo", "overlays/gpu", "overlays/gpu-spot", "overlays/encoder", "model-cache", "model-cache-s3"],
)
def test_passes_when_the_table_is_filled_in_and_not_before(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    render(folder)  # skips without kustomize
    shutil.copytree(K8S, tmp_path / "k8s")
    copy = tmp_path / "k8s" / folder
    before = list(preflight.find_problems(preflight.render(str(copy))))
    assert before
    for number, row in enumerate(ROWS):  # one after the other: each takes its own line away
        _fill(tmp_path / "k8s", row)
        left = list(preflight.find_problems(preflight.render(str(copy))))
        text = preflight.PLACEHOLDERS[number].text
        assert left == [line for line in before if not line.startswith(text)]
        before = left
    assert preflight.main([str(copy)]) == 0
    assert "nothing is left to fill in" in capsys.readouterr().out


def test_says_what_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    render("overlays/gpu")
    assert preflight.main([str(K8S / "overlays/gpu"), str(K8S / "overlays/kind")]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 + 1
    (bucket,) = (line for line in lines if "example-bucket" in line)
    assert "write yours in job.toml" in bucket
    assert "read by ConfigMap job data.job.toml.manifest and 2 more" in bucket
    assert lines[-1].endswith("overlays/kind: 6 objects, nothing is left to fill in")


def test_refuses_a_base_a_broken_file_and_no_kustomization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objects = render("base")
    assert ["has no workers" in problem for problem in preflight.find_problems(objects)] == [True]
    broken = {"kind": "ConfigMap", "metadata": {"name": "job"}, "data": {"job.toml": "output = s3://x"}}
    (problem,) = preflight.find_problems([broken])
    assert problem.startswith("ConfigMap job: a file in it is no TOML")
    assert preflight.main([str(tmp_path)]) == 2
    assert "kustomization" in capsys.readouterr().out


def _job(objects: list[Manifest], old: str, new: str) -> list[Manifest]:
    data = only(objects, "ConfigMap", "job")["data"]
    assert old in data["job.toml"]
    data["job.toml"] = data["job.toml"].replace(old, new)
    return objects


def test_finds_what_does_not_fit() -> None:
    spot, fills = render("overlays/gpu-spot"), (render("model-cache"), render("model-cache-s3"))
    assert [list(preflight.find_mismatches([*spot, *fill])) for fill in fills] == [[], []]
    (more,) = preflight.find_mismatches(_job(render("overlays/gpu"), "count = 8", "count = 9"))
    assert more == "job.toml: actors.count is 9, but no group of workers grows beyond 8 GPUs"
    assert list(preflight.find_mismatches(_job(render("overlays/gpu"), "count = 8", "count = 16\ngpus = 0.5"))) == []
    other = _job(render("overlays/gpu"), "/models/stable-diffusion-v1-5", "/models/sdxl")
    assert list(preflight.find_mismatches(other)) == []  # filled by other means, as far as is known
    for fill in fills:
        (line,) = preflight.find_mismatches([*other, *fill])
        assert line.startswith("job.toml: model is /models/sdxl, but the Job fills /models/clip-vit-large-patch14, ")


def test_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    assert preflight.main(["k8s/overlays/gpu"]) == 2
    assert "neither kubectl nor kustomize" in capsys.readouterr().out
