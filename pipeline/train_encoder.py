"""`python -m pipeline.train_encoder MANIFEST --output URI`: train an encoder that maps photos to rows.

A run whose `init.encoder` names the output starts each concept from the encoder's rows. The same command works on this
machine, under a running Ray cluster and under `ray job submit`; run it again to resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig
from pipeline.config_file import load_config, recipe
from pipeline.connection import connect
from pipeline.exit_codes import FAILED, OK, STOPPED
from pipeline.inputs.manifest import BadRow, read_manifest
from pipeline.inputs.manifest_files import list_folders_once
from pipeline.inputs.models import MAX_ENCODER_BYTES, check_model, locate
from pipeline.inputs.resolve import resolve_addresses
from pipeline.ledger.digest import digest
from pipeline.ledger.encoder_record import CHECKPOINT, ENCODER, RECORD, EncoderRecord, put_record, read_record
from pipeline.ledger.records import latest, load_records
from pipeline.report.command_errors import exit_code_of
from pipeline.report.encoder_page import PATH, write_encoder_page
from pipeline.report.logs import configure_logs, say
from pipeline.report.run_summary import SHOWN_FAILURES
from pipeline.signals import handling_signals, stopping_on_signals
from pipeline.store.addresses import absolute, read_bytes
from pipeline.store.errors import RunAborted, describe_error
from pipeline.store.lease import hold_lease
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore
from pipeline.times import now
from pipeline.tracking.clients import check_tracking
from pipeline.tracking.feed import CurveFeed
from pipeline.tracking.sender import STOPPED_WAIT_S, WAIT_S
from textual_inversion.families import check_denoiser_features

if TYPE_CHECKING:
    from pipeline.encoder_training.state import CurvePoint, TrainingState

# torch and ray are imported where they are first needed, so that --help and wrong settings are answered at once.

_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",  # the default since Ray 2.51
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # Ray's minute is short for loading torch on a busy node
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths, as a model's, are meant from the command's directory
}
"""Settings that Ray Train takes from the environment, unless they are set already."""


def main(arguments: list[str] | None = None, prog: str = "python -m pipeline.train_encoder") -> int:
    """Run the command and return its exit code; errors are printed in one line."""
    configure_logs()
    options = parse(arguments, prog)
    with list_folders_once():
        return exit_code_of(lambda: _train(options))


def _train(options: argparse.Namespace) -> int:
    config = configure(options)
    configure_logs(config.log_format)
    with hold_lease(RunStore(config.output), config.lease_s):
        return train(config)


def parse(arguments: list[str] | None, prog: str = "python -m pipeline.train_encoder") -> argparse.Namespace:
    """Parse the command line; None takes the process's own arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("manifest", nargs="?", metavar="MANIFEST", help="Parquet file, folder or glob; any fsspec URI")
    parser.add_argument("--output", metavar="URI", help="where everything is written")
    parser.add_argument(
        "--from-run", metavar="URI", help="output of an earlier run whose concepts are trained on, too, or alone"
    )
    parser.add_argument("--init-from", metavar="URI", help="trained encoder to start from: its file or its output")
    parser.add_argument("--model", help="Stable Diffusion directory or hub id (default: the demo model)")
    parser.add_argument("--config", metavar="TOML", help="a file of settings, or a recipe's name (pipeline/recipes)")
    parser.add_argument("--set", metavar="A.B=C", action="append", default=[], help="one setting; may be repeated")
    return parser.parse_args(arguments)


def configure(options: argparse.Namespace) -> RunConfig:
    """Return the configuration: the TOML file, changed by `--set`, changed by the named options; addresses absolute.

    Raises ValueError for a setting or an address that makes no sense.
    """
    toml = read_bytes(absolute(recipe(options.config))).decode() if options.config else ""
    overrides = list(options.set)
    for name, value in (("encoder.from_run", options.from_run), ("encoder.init_from", options.init_from)):
        if value:
            overrides.append(f"{name}={json.dumps(value)}")
    config = load_config(toml, overrides, manifest=options.manifest, output=options.output, model=options.model)
    defaults = RunConfig()
    if not config.manifest and not config.encoder.from_run:
        raise ValueError("nothing to train on: name a manifest, or an earlier run's output with --from-run")
    if config.output == defaults.output:
        raise ValueError("no output: name a folder or URI with --output")
    if config.extractor == defaults.extractor and locate(config.model) != locate(defaults.model):
        config = dataclasses.replace(config, extractor="")  # the demo's CLIP knows the demo's pictures only
    if not config.extractor:
        raise ValueError("extractor = '': an encoder reads the features of a CLIP, SigLIP or DINO; name one")
    config = resolve_addresses(config)
    if config.encoder.init_from in (config.output, RunStore(config.output).uri(ENCODER)):
        raise ValueError(
            f"encoder.init_from = {config.encoder.init_from!r}: must be another training's output; this one is written"
        )
    return config


def train(config: RunConfig) -> int:
    """Read the photos, train, and write encoder, record and report; return the exit code.

    Raises ValueError for what is wrong before any photo is read, and for fewer than two usable concepts.
    """
    check_tracking(config.tracking)
    check_model(config)
    check_denoiser_features(locate(config.model), config.encoder.network.denoiser_side)
    store = RunStore(config.output)
    training = Training(config)
    try:
        training.make_examples()
        record = read_record(store)
        if record is not None and record.fingerprint == training.fingerprint:
            say(config.log_format, "trained before, nothing to do\n")
            return conclude(config, record)
        record = training.fit()
    except RunAborted as error:
        say(config.log_format, f"FAILED {error}\nrun the same command again to continue\n")
        return FAILED
    if record is None:
        say(config.log_format, "stopped before the end; run the same command again to continue\n")
        return STOPPED
    put_record(store, record)
    store.delete(CHECKPOINT)
    return conclude(config, record)


class Training:
    """One training: its concepts, its fingerprint, and its stages."""

    def __init__(self, config: RunConfig) -> None:
        """Read the encoder to start from. Raises ValueError if it cannot be read or is another model's."""
        self._config = config
        self._store = RunStore(config.output)
        self._start = read_start(config)
        self._row_ids: dict[str, str] = {}
        self._left_out: dict[str, str] = {}

    def make_examples(self) -> None:
        """Read the photos of all concepts that have no example yet. A concept whose photos cannot be used is left
        out."""
        from pipeline.bulk.rows import done_row_ids, plan_missing
        from pipeline.bulk.stage import run_stage
        from pipeline.encoder_training.examples import PARTS, PLAN, PLAN_SCHEMA, examples_stage, failures

        config, store = self._config, self._store
        bad: list[BadRow] = []
        rows = plan_missing(store, PLAN, _plan(config, bad), PLAN_SCHEMA, done_row_ids(store, PARTS))
        if rows.missing:
            gpus, _ = connect(config, dashboard=True)
            with handling_signals(signal.default_int_handler), _aborting("reading the photos"):
                run_stage(config, examples_stage(), len(rows.missing), gpus)
        failed = set(rows.missing) - done_row_ids(store, PARTS)
        self._left_out = {_place(row): row.reason for row in bad} | failures(store, rows.wanted, failed)
        self._row_ids = {row_id: name for row_id, name in rows.wanted.items() if row_id not in failed}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings that the encoder depends on, as JSON values."""
        from pipeline.encoder_training.examples import example_settings

        encoder = self._config.encoder
        training = dataclasses.asdict(encoder.training)
        if not encoder.training.row_weight:  # so that fingerprints of releases without it stay
            del training["row_weight"]
        return {
            "examples": example_settings(self._config),
            "training": training,
            **({} if encoder.adapter.kind == "none" else {"adapter": dataclasses.asdict(encoder.adapter)}),
            "held_out_share": encoder.held_out_share,
            "evaluated": encoder.evaluated,
            "checkpoint_steps": encoder.checkpoint_steps,
            "patience": encoder.patience,
            "seed": self._config.seed,
            "start": hashlib.sha256(self._start).hexdigest() if self._start else "",
        }

    @property
    def data(self) -> str:
        """Digest of the concepts that can be used."""
        return digest(sorted(self._row_ids))

    @property
    def fingerprint(self) -> str:
        """Digest of all that the encoder depends on."""
        return digest([self.settings, self.data])

    def fit(self) -> EncoderRecord | None:
        """Train to the end and return the record; None if a signal ended it before.

        Raises ValueError for fewer than two usable concepts, and RunAborted if training failed again and again.
        """
        from pipeline.encoder_training.schedule import split_concepts

        config = self._config
        split = split_concepts(self._row_ids.values(), config.encoder.held_out_share)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        gpus, _ = connect(config, dashboard=True)
        from pipeline.bulk.quiet import quiet_ray_data
        from pipeline.encoder_training.blocks import load_blocks
        from pipeline.encoder_training.workers import TrainingJob, train_on_workers

        with stopping_on_signals() as stop, _aborting("training"):
            with quiet_ray_data():
                examples = load_blocks(self._store, self._row_ids)
            job = TrainingJob(
                config=dataclasses.replace(config, device="cuda" if gpus else "cpu"),
                fingerprint=self.fingerprint,
                split=split,
                examples=examples,
                start=self._start,
            )
            with self._tracking(stop) as watch:
                news = train_on_workers(job, gpus, stop, watch)
        if news.published is None or news.ending is None:
            return None
        best = news.state.best_point
        assert best is not None
        return EncoderRecord(
            fingerprint=self.fingerprint,
            model_hash=self.settings["examples"]["model"],
            extractor_hash=self.settings["examples"]["extractor"],
            data=self.data,
            settings=self.settings,
            trained=len(split.trained),
            held_out=split.held_out,
            left_out=self._left_out | news.state.left_out,
            ending=news.ending,
            steps=news.state.step,
            best_step=best.step,
            held_out_loss=best.held_out,
            curve=[(point.step, point.loss, point.held_out) for point in news.state.curve],
            file=news.published.file,
            pictures=news.published.pictures,
            finished_at=now(),
        )

    @contextmanager
    def _tracking(self, stop: threading.Event) -> Iterator[Callable[[TrainingState], None]]:
        """Log the learning curve to the tracker of the settings while the block runs; yield the function that takes how
        far the training is."""
        feed = CurveFeed(self._config, self._store)
        try:
            yield lambda state: feed.update([(each.step, _logged(each, self._config)) for each in state.curve])
        finally:
            feed.close(STOPPED_WAIT_S if stop.is_set() else WAIT_S)


def _logged(point: CurvePoint, config: RunConfig) -> dict[str, float]:
    """Return the values of a point of the learning curve by the names of the tracker's series."""
    training = config.encoder.training
    return {
        "encoder/loss": point.loss,
        "encoder/held_out_loss": point.held_out,
        "encoder/learning_rate": training.learning_rate * training.rate_factor(point.step - 1),  # of the last step
    }


@contextmanager
def _aborting(stage: str) -> Iterator[None]:
    """Raise RunAborted for Ray's errors in the block, which no concept can be blamed for."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        raise RunAborted(f"{stage}: {describe_error(error)}") from error


def _plan(config: RunConfig, bad: list[BadRow]) -> Iterator[dict[str, Any]]:
    """Yield the plan rows of the manifest's concepts, then those of the earlier run that are not among them."""
    from pipeline.encoder_training.examples import plan_examples, plan_examples_of_run

    seen = set()
    if config.manifest:
        for row in plan_examples(read_manifest(config.manifest), config, bad):
            seen.add(row["concept_id"])
            yield row
    if config.encoder.from_run:
        records = latest(load_records(RunStore(config.encoder.from_run)))
        if not records:
            raise ValueError(f"encoder.from_run = {config.encoder.from_run!r}: must be the output of a run")
        yield from (row for row in plan_examples_of_run(records, config) if row["concept_id"] not in seen)


def _place(row: BadRow) -> str:
    return f"{row.file}, row {row.row}{f' ({row.concept_id})' if row.concept_id else ''}"


def read_start(config: RunConfig) -> bytes:
    """Return the file of the encoder to start from, or nothing.

    Raises ValueError if it cannot be read, or belongs to another model, extractor or shape.
    """
    uri = config.encoder.init_from
    if not uri:
        return b""
    uri = uri if uri.endswith(".safetensors") else f"{uri}/{ENCODER}"
    try:
        data = read_bytes(uri, MAX_ENCODER_BYTES)
    except OSError as error:
        raise ValueError(f"encoder.init_from = {uri!r} cannot be read: {describe_error(error)}") from error
    from pipeline.encoder_training.publish import check_start

    check_start(data, config)
    return data


def conclude(config: RunConfig, record: EncoderRecord) -> int:
    """Write the report, print the last lines, and return the exit code."""
    write = partial(say, config.log_format)
    store = RunStore(config.output)
    write(
        f"{record.trained} concepts trained on, {len(record.held_out)} held out, {len(record.left_out)} left out; "
        f"{record.steps} steps ({record.ending}), held-out loss {record.held_out_loss:.4f} at step {record.best_step}\n"
    )
    write_encoder_page(store, config, record)
    write(redact(f"encoder: {store.uri(ENCODER)}\nreport: {store.uri(PATH)}\n"))
    for name, reason in list(record.left_out.items())[:SHOWN_FAILURES]:
        write(f"FAILED {name}: {reason}\n")
    if len(record.left_out) > SHOWN_FAILURES:
        write(f"FAILED {len(record.left_out) - SHOWN_FAILURES} more, all in {RECORD}\n")
    return FAILED if record.left_out else OK


if __name__ == "__main__":
    sys.exit(main())
