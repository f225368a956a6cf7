"""How an actor sets itself up for its device."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.actor import tuning
from pipeline.actor.pass_estimates import PassEstimates
from pipeline.actor.tuning import (
    Pass,
    PassSharing,
    compile_where_wanted,
    default_slots,
    drawing_passes,
    fit_slots,
    passes_to_learn,
)
from tests.pipeline.runs import tiny_config
from tests.toy_backbone import ToyBackbone
from textual_inversion.config import SamplingConfig
from textual_inversion.families.base import Backbone, MemorySaving


def test_all_kinds_of_passes_that_an_actor_makes_are_named(tiny_backbone: Backbone, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tmp_path, inversion={"batch_size": 3}, grid={"sampling": {"batch_size": 5}})
    learning = [Pass(6, gradients=True), Pass(10, gradients=False)]
    assert passes_to_learn(tiny_backbone, config, slots=2) == learning
    looking = tiny_config(
        tmp_path, tmp_path, inversion={"batch_size": 3, "stop": {"keep_best": True}},
        grid={"sampling": {"batch_size": 5}},
    )  # fmt: skip
    assert passes_to_learn(tiny_backbone, looking, slots=2) == [*learning, Pass(3, gradients=False)]
    up_path = tiny_config(
        tmp_path, tmp_path, inversion={"batch_size": 3, "gradient_path": "up_path", "stop": {"keep_best": True}}
    )
    first, *_, last = passes_to_learn(tiny_backbone, up_path, slots=2)
    assert first == Pass(6, gradients=True, gradient_path="up_path")
    assert last == Pass(3, gradients=False, gradient_path="up_path")
    unguided = SamplingConfig(batch_size=5, guidance_scale=1)
    drawing = drawing_passes(tiny_backbone, unguided, config.inversion.adapter)
    assert drawing == [Pass(5, gradients=False)]


@pytest.mark.parametrize(("batch_size", "expected"), [(1, 8), (2, 4), (3, 2), (4, 2), (16, 1)])
def test_on_a_cpu_slots_fill_a_batch_of_8_samples(
    tiny_backbone: Backbone, tmp_path: Path, batch_size: int, expected: int
) -> None:
    config = tiny_config(tmp_path, tmp_path, inversion={"batch_size": batch_size})
    assert default_slots(tiny_backbone, config, None) == expected


@pytest.mark.parametrize("wanted", ["auto", "off"])
def test_more_memory_than_estimated_is_saved_where_that_is_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    backbone = ToyBackbone()
    found: list[MemorySaving] = []
    monkeypatch.setattr(backbone, "save_memory", found.append)

    def default_slots(*_: object) -> int:
        if not found[-1].checkpoints_gradients:
            raise torch.OutOfMemoryError("one slot leaves too little room")
        return 3

    monkeypatch.setattr(tuning, "default_slots", default_slots)
    config = tiny_config(tmp_path, tmp_path, actors={"gradient_checkpointing": wanted})
    if wanted == "off":
        with pytest.raises(torch.OutOfMemoryError):
            fit_slots(PassEstimates(backbone), config, None)
        return
    slots, plan = fit_slots(PassEstimates(backbone), config, None)
    assert slots == 3
    assert plan.saving == found[-1] == MemorySaving(checkpoints_gradients=True)
    assert "one slot leaves too little room" in plan.description


@pytest.mark.parametrize(
    ("wanted", "expected"), [("auto", []), ("off", []), ("on", ["checked"]), ("graphs", ["checked, graphs"])]
)
def test_the_denoiser_is_compiled_where_that_is_asked_for(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, expected: list[str]
) -> None:
    """On a CPU `auto` leaves it as it is."""
    done: list[str] = []
    monkeypatch.setattr(
        tuning, "compile_checked", lambda *_, graphs: done.append("checked, graphs" if graphs else "checked")
    )
    monkeypatch.setattr(tuning, "compile_fastest", lambda *_: done.append("fastest"))
    config = tiny_config(tmp_path, tmp_path, actors={"compile": wanted})
    compile_where_wanted(tiny_backbone, config, [Pass(1, gradients=True)])
    assert done == expected


def test_graphs_are_refused_where_torch_ties_them_to_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "graphs_work_in_threads", lambda: False)
    backbone = ToyBackbone()
    backbone.device = torch.device("cuda")
    config = tiny_config(tmp_path, tmp_path, actors={"compile": "graphs"})
    with pytest.raises(RuntimeError, match=r"actors\.compile = 'graphs' needs torch 2\.13 or later"):
        compile_where_wanted(backbone, config, [Pass(1, gradients=True)])


def test_what_is_compiled_is_kept_where_a_setting_says(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def kept(address: str, name: str) -> contextlib.AbstractContextManager[None]:
        asked.append((address, name))
        return contextlib.nullcontext()

    monkeypatch.setattr(tuning, "kept_compilations", kept)
    monkeypatch.setattr(tuning, "compile_checked", lambda *_, **_options: None)
    for cache in ("", "s3://bucket/compiled"):
        config = tiny_config(tmp_path, tmp_path, actors={"compile": "on", "compile_cache": cache})
        for samples in (1, 2):
            compile_where_wanted(tiny_backbone, config, [Pass(samples, gradients=True)])
    addresses, names = zip(*asked, strict=True)
    assert addresses == ("", "", "s3://bucket/compiled", "s3://bucket/compiled")
    assert names[:2] == names[2:]
    assert names[0] != names[1]


def test_a_cpu_promises_bytes_whatever_its_kernels_do(tiny_backbone: Backbone, tmp_path: Path) -> None:
    sharing = PassSharing(tiny_backbone, tiny_config(tmp_path, tmp_path), None)
    assert sharing.choose_slots_per_pass(2) in (1, 2)
    assert sharing.choose_sampling().batch_size in (1, 4)
    assert sharing.equality == ""


@pytest.mark.parametrize(("learned", "drawn"), [(True, False), (False, True), (False, False)])
def test_an_accelerator_promises_rounding_where_either_depends_on_places(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learned: bool, drawn: bool
) -> None:
    config = tiny_config(tmp_path, tmp_path)
    monkeypatch.setattr(tuning, "choose_sampling", lambda _backbone, sampling, _adapter: (sampling, drawn))
    monkeypatch.setattr(tuning, "choose_slots_per_pass", lambda _backbone, _config, slots, _features: (slots, learned))
    sharing = PassSharing(tiny_backbone, config, None)
    assert sharing.choose_slots_per_pass(4) == 4
    assert sharing.choose_sampling() == config.grid.sampling
    assert sharing.equality == "to rounding"


def test_no_memory_to_check_a_batch_of_pictures_promises_rounding(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("nothing fits")

    config = tiny_config(tmp_path, tmp_path)
    monkeypatch.setattr(tuning, "choose_sampling", no_memory)
    sharing = PassSharing(tiny_backbone, config, None)
    assert sharing.choose_sampling() == config.grid.sampling
    assert sharing.equality == "to rounding"


ALONE_AND_IN_COMPANY = """
import asyncio, sys
from pathlib import Path
from pipeline.actor.learner import Learner
from tests.pipeline.runs import task, tiny_config, write_photo

model, folder = sys.argv[1], Path(sys.argv[2])
photos = tuple(write_photo(folder / f"{i}.png", i) for i in range(2))
tasks = [task(name, photos) for name in "abc"]

async def learn(output, tasks):
    learner = Learner(tiny_config(model, folder / output, actors={"slots": 2}))
    records = await asyncio.gather(*(learner.learn(one) for one in tasks))
    assert all((record.status, record.equality) == ("done", "") for record in records), records
    learner.close()

asyncio.run(learn("company", tasks))
asyncio.run(learn("alone", tasks[2:]))
for name in ("learned_embeds.safetensors", "grid.png", "curve.parquet"):
    one, other = ((folder / output / tasks[2].folder.file(name)).read_bytes() for output in ("company", "alone"))
    assert one == other, name
"""


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, {"MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}], ids=["any", "AVX2"])
def test_a_concept_has_the_same_files_alone_and_in_company(
    environment: dict[str, str], tiny_model: Path, tmp_path: Path
) -> None:
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", ALONE_AND_IN_COMPANY, str(tiny_model), str(tmp_path)]
    run = subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
