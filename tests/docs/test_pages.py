"""The pages for researchers, catalog engineers and operators: what they tell their reader to enter runs in its order.

Commands of `ti` and blocks of Python run with a tiny model and a few steps; those of make, docker, kind, helm and
kubectl are checked for what they name. The job of an overlay on kind or a cluster is what tests/k8s renders and
tests/e2e/test_cluster.py submits.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.__main__ import COMMANDS
from pipeline.exit_codes import FAILED, OK
from pipeline.store.parquet import read_table
from tests.docs.pages import ROOT, check_tool, run_steps, steps_of
from tests.pipeline.runs import write_photo

PAGES = ("docs/RESEARCHER.md", "docs/CATALOG_ENGINEER.md", "docs/OPERATOR.md")
OUTPUT = "s3://bucket/embeddings"
"""The output of the operator's page."""


@pytest.fixture(scope="module")
def catalog(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[str]]]:
    """Run the catalog engineer's page on three products, one of them without its photo; return the folder and the
    commands that a bad row failed."""
    request.getfixturevalue("ray_cluster")
    folder = tmp_path_factory.mktemp("catalog")
    _add_models(folder, tiny_model)
    photos = [[write_photo(folder / f"{sku}.png", sku)] for sku in (17, 18)] + [[str(folder / "gone.png")]]
    products = {"sku": [17, 18, 19], "photos": photos, "kind": ["cat", None, "cat"], "price": [2.5, 3.0, 1.0]}
    pq.write_table(pa.table(products), folder / "products.parquet")
    (folder / "prompts.txt").write_text("a photo of a {}\n")
    failed: list[list[str]] = []

    def code_of(words: list[str]) -> int:
        fails = words[1] in ("run", "validate")
        failed.extend([words] if fails else [])
        return FAILED if fails else OK

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_steps(steps_of("docs/CATALOG_ENGINEER.md"), code_of)
    return folder, failed


def _add_models(folder: Path, tiny_model: Path) -> None:
    (folder / "models").mkdir()
    (folder / "models/my-clip").symlink_to(ROOT / "demo/clip")
    (folder / "models/my-model").symlink_to(tiny_model)


@pytest.mark.slow
def test_catalog_engineer(catalog: tuple[Path, list[list[str]]]) -> None:
    folder, failed = catalog
    assert [words[1] for words in failed] == ["validate", "run", "run", "run", "run"]
    learned = read_table(folder / "learned.parquet").to_pylist()
    assert [(row["sku"], row["price"], row["status"]) for row in learned] == [
        (17, 2.5, "done"),
        (18, 3.0, "done"),
        (19, 1.0, "failed"),
    ]
    assert "gone.png" in learned[2]["error"]
    assert len(list((folder / "catalog/images").glob("1[78]/*.png"))) == 2
    assert (folder / "exported/index.csv").is_file()


@pytest.mark.slow
def test_operator(
    catalog: tuple[Path, list[list[str]]], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that it watches is the catalog engineer's; `job.toml` is the overlay's, with local addresses."""
    output = catalog[0] / "catalog"
    _add_models(tmp_path, tiny_model)
    shutil.copytree(ROOT / "k8s", tmp_path / "k8s")
    job = tmp_path / "k8s/overlays/gpu/job.toml"
    job.write_text(job.read_text().replace("s3://example-bucket", str(tmp_path)))
    (tmp_path / "catalog").mkdir()
    shutil.copy(catalog[0] / "manifest.parquet", tmp_path / "catalog")
    pq.write_table(pa.table({"prompt": ["a photo of a {}"]}), tmp_path / "catalog/prompts.parquet")
    monkeypatch.chdir(tmp_path)
    run_steps(
        steps_of("docs/OPERATOR.md"),
        lambda words: FAILED if words[1] in ("validate", "watch") else OK,
        **{OUTPUT: str(output)},
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_researcher(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _add_models(tmp_path, tiny_model)
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    for seed in range(2):
        write_photo(tmp_path / "my-photos" / f"{seed}.png", seed)
    monkeypatch.chdir(tmp_path)
    run_steps(steps_of("docs/RESEARCHER.md"), lambda _: OK)
    assert {"out", "dog", "paper", "beach", "variations", "compare.html"} <= {*os.listdir()}
    assert list(Path("out").glob("concepts/my-photos/*/grid.png"))


@pytest.mark.parametrize("page", PAGES)
def test_commands_between_backticks_exist(page: str) -> None:
    named = re.findall(r"`ti ([a-z-]+)", (ROOT / page).read_text())
    assert [name for name in named if name not in COMMANDS] == []


@pytest.mark.parametrize(
    "command",
    [
        "make instal",
        "kubectl apply -k k8s/overlays/tpu",
        "kubectl -n concept get jobs",
        "kubectl -n concepts wait job/fill-model",
        "docker tag x textual-inversion-ray:latest",
        "helm install kuberay-operator kuberay/kuberay-operator --version 0.0.1",
        "rm -rf output",
    ],
)
def test_checks_find(command: str) -> None:
    with pytest.raises(AssertionError):
        check_tool(command.split())
