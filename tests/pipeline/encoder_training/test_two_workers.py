"""Data-parallel training of the real trainer in two processes, against one process: torch's part, without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from pipeline.encoder_config import EncoderJobConfig
from pipeline.encoder_training.loop import NOT_FINITE, Team, TrainingLoop
from pipeline.encoder_training.schedule import Split
from pipeline.store.storage import RunStore
from tests.textual_inversion.test_encoder import CONFIG, FEATURES, photo
from tests.toy_backbone import ToyBackbone
from textual_inversion.concept import Concept
from textual_inversion.encoder import ConceptEncoder
from textual_inversion.encoder_config import EncoderTrainingConfig
from textual_inversion.encoder_training import ConceptExample, EncoderTrainer, encode_example

TRAINED = tuple(f"c{i}" for i in range(10))
POISONED = "c7"
HELD_OUT = ("h0", "h1", "h2")


def _examples(backbone: ToyBackbone) -> dict[str, ConceptExample]:
    found = {}
    for number, name in enumerate((*TRAINED, *HELD_OUT)):
        concept = Concept(concept_id=name, placeholder_token="<c>", images=("x", "y"), initializer="dog")
        example = encode_example(concept, [photo(2 * number), photo(2 * number + 1)], backbone, FEATURES)
        moments = example.moments * torch.nan if name == POISONED else example.moments
        found[name] = ConceptExample(concept=concept, features=example.features, moments=moments)
    return found


def _train(team: Team, output: str) -> TrainingLoop:
    """Train 6 steps of 8 concepts."""
    backbone = ToyBackbone()
    examples = _examples(backbone)
    torch.manual_seed(0)
    network = ConceptEncoder(CONFIG, FEATURES.sizes(), backbone)
    wrapped = DistributedDataParallel(network, broadcast_buffers=False) if team.num_workers > 1 else network
    training = EncoderTrainingConfig(steps=6, concepts_per_step=8, warmup_steps=0, learning_rate=0.01)
    loop = TrainingLoop(
        trainer=EncoderTrainer(wrapped, backbone, training),
        read=lambda names: [examples[name] for name in names],
        split=Split(TRAINED, HELD_OUT),
        config=EncoderJobConfig(training=training, checkpoint_steps=2),
        seed=0,
        store=RunStore(output),
        fingerprint="f",
        team=team,
    )
    assert loop.run() == "all steps"
    return loop


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    loop = _train(Team(rank=rank, num_workers=2), f"{folder}/two")
    if rank == 0:
        torch.save({"weights": loop.state.best, "left_out": loop.state.left_out}, f"{folder}/two.pt")
        torch.save([[point.loss, point.held_out] for point in loop.state.curve], f"{folder}/curve.pt")
    dist.destroy_process_group()


@pytest.mark.slow  # two processes that load torch
def test_two_workers_learn_what_one_learns_from_twice_the_batch(tmp_path: Path) -> None:
    """To rounding, also where a poisoned concept makes one of them go through the network once more."""
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    alone = _train(Team(), str(tmp_path / "one"))
    both = torch.load(tmp_path / "two.pt", weights_only=True)
    assert both["left_out"] == alone.state.left_out == {POISONED: NOT_FINITE}
    curve = torch.tensor([[point.loss, point.held_out] for point in alone.state.curve])
    torch.testing.assert_close(torch.tensor(torch.load(tmp_path / "curve.pt", weights_only=True)), curve)
    for name, weights in alone.state.best.items():
        torch.testing.assert_close(both["weights"][name], weights, rtol=1e-3, atol=1e-5)
