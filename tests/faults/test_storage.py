"""S3 on a bad day: an HTTP layer loses, cuts, delays and refuses some of everything between us and a real server."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.actor.learner import Learner
from pipeline.config import RunConfig
from pipeline.inputs.manifest import ManifestRow, read_manifest
from pipeline.ledger.done import find_done
from pipeline.ledger.plan import ConceptTask
from pipeline.ledger.records import ConceptRecord, from_json
from pipeline.store import retries
from pipeline.store.addresses import filesystem_for_workers, open_filesystem, open_for_reading, read_bytes
from pipeline.store.errors import StoreFailed
from pipeline.store.parquet import read_table
from pipeline.store.storage import RunStore
from tests.pipeline.runs import task, tiny_config, tiny_toml, write_photo
from tests.pipeline.s3_faults import KINDS, S3Faults, serve_faults
from tests.pipeline.s3_server import KEY, OTHER_KEY, OTHER_SECRET, SECRET, S3Server

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SOON = {"config_kwargs": {"read_timeout": 1, "connect_timeout": 5}}
"""Settings of a client to whom a request that hangs costs a second. Where requests are counted, the client is patient:
a busy server would get them twice."""


@pytest.fixture
def faults(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Faults]:
    """The layer, without any fault yet; this process's S3 is behind it, and waits little between tries."""
    with serve_faults(s3_server.endpoint, hang_s=2.0) as layer:
        monkeypatch.setenv("AWS_ENDPOINT_URL", layer.endpoint)
        monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
        fsspec.filesystem("s3").clear_instance_cache()
        yield layer
    fsspec.filesystem("s3").clear_instance_cache()


def directly(server: S3Server) -> fsspec.AbstractFileSystem:
    """A client of a test's own, past the layer."""
    return fsspec.filesystem("s3", use_listings_cache=False, **server.options)


def test_objects_survive_every_kind_of_fault(
    faults: S3Faults, s3_server: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", SOON)
    store, before = RunStore(f"{bucket}/run"), retries.retry_count.value
    faults.rates = dict.fromkeys(KINDS, 0.03)
    contents = {f"a/{i:03d}": os.urandom(50 + 400 * i) for i in range(80)}
    for path, data in contents.items():
        store.put_checked(path, data)
    assert {path: store.get(path) for path in list(contents)[::3]} == dict(list(contents.items())[::3])
    assert store.get_many(contents) == contents
    assert read_bytes(store.uri("a/007")) == contents["a/007"]
    assert store.list("a") == {path: len(data) for path, data in contents.items()}
    for path in list(contents)[:20]:
        store.delete(path)
    assert sorted(store.list()) == sorted(contents)[20:]
    held = directly(s3_server).find(f"{bucket}/run", detail=True)
    assert {name.rpartition("/run/")[2]: info["size"] for name, info in held.items()} == store.list()
    assert set(faults.faults) == set(KINDS)
    assert 0 < retries.retry_count.value - before <= sum(faults.faults.values())


def test_tries_are_bounded_and_no_layer_multiplies_them(faults: S3Faults, bucket: str) -> None:
    faults.rates = {"slow-down": 1.0}
    for call in (lambda: RunStore(bucket).put("x", b"1"), lambda: list(RunStore(bucket).scan())):
        faults.requests.clear()
        with pytest.raises(StoreFailed, match="8 calls failed"):
            call()
        assert sum(faults.requests.values()) == retries.MAX_CALLS


def test_half_an_object_is_none(faults: S3Faults, s3_server: S3Server, bucket: str) -> None:
    """A record that arrives in half must not count as done, however often."""
    store, one = RunStore(f"{bucket}/run"), task("a")
    faults.rates = {"cut-upload": 1.0}
    with pytest.raises(StoreFailed):
        store.put(one.folder.record, b"{" + b"x" * 5000)
    faults.rates = {}
    assert not directly(s3_server).exists(store.uri(one.folder.record))
    assert find_done(store).fingerprints == set()


def test_credentials_that_expire_are_read_anew(
    faults: S3Faults, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RunStore(f"{bucket}/run")
    hand_over = credentials_file(tmp_path, monkeypatch.setenv, monkeypatch.delenv)
    store.put("before", b"1")
    faults.expired_keys = {KEY}
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.1)

    def hand_over_once_refused() -> None:
        while not faults.faults["expired"]:
            time.sleep(0.01)
        hand_over()

    threading.Thread(target=hand_over_once_refused, daemon=True).start()
    store.put("after", b"2")
    assert faults.faults["expired"] > 0
    assert store.list() == {"before": 1, "after": 1}


def test_libraries_get_credentials_as_they_are_now(
    faults: S3Faults, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand_over_others = credentials_file(tmp_path, monkeypatch.setenv, monkeypatch.delenv)
    uri = f"{bucket}/run/part.parquet"
    with open_filesystem(uri, client_retries=True)[0].open(uri, "wb") as file:
        pq.write_table(pa.table({"row_id": ["a"]}), file)
    with open_for_reading(uri) as file:
        assert read_table(file).num_rows == 1
    faults.expired_keys = {KEY}
    hand_over_others()
    with open_for_reading(uri) as file:
        assert read_table(file).num_rows == 1
    fs, path = filesystem_for_workers(uri)
    with fs.open(path, "rb") as file:
        assert read_table(file).num_rows == 1
    assert faults.faults["expired"] > 0


def credentials_file(
    folder: Path, setenv: Callable[[str, str], None], delenv: Callable[[str], None]
) -> Callable[[], None]:
    """Credentials come from a file, as an agent keeps one; the result puts others there."""
    path = folder / "credentials"

    def write(key: str, secret: str) -> None:
        whole = path.with_suffix(".new")
        whole.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
        whole.replace(path)

    write(KEY, SECRET)
    setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    delenv("AWS_ACCESS_KEY_ID")
    delenv("AWS_SECRET_ACCESS_KEY")
    return lambda: write(OTHER_KEY, OTHER_SECRET)


def test_a_listing_that_lags_costs_work_but_loses_nothing(
    faults: S3Faults, bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    photos = (write_photo(tmp_path / "0.png", 0), write_photo(tmp_path / "1.png", 1))
    config, one = tiny_config(tiny_model, f"{bucket}/run"), task("a", photos)
    store = RunStore(config.output)
    (record,) = learn(config, [one])
    faults.lag_s = 3600.0
    assert find_done(store).fingerprints == set()  # so it is learned again
    before = {path: store.get(path) for path in (one.folder.embedding, one.folder.grid, one.folder.curve)}
    (again,) = learn(config, [one])
    assert {path: store.get(path) for path in before} == before
    assert again.files == record.files
    faults.lag_s = 0.0
    assert find_done(store).fingerprints == {one.fingerprint.encode()}


def learn(config: RunConfig, tasks: list[ConceptTask]) -> list[ConceptRecord]:
    return work(Learner(config), tasks)


def work(learner: Learner, tasks: list[ConceptTask]) -> list[ConceptRecord]:
    async def together() -> list[ConceptRecord]:
        return await asyncio.gather(*(learner.learn(one) for one in tasks))

    try:
        return asyncio.run(together())
    finally:
        learner.close()


def test_two_runs_that_learn_the_same_do_each_other_no_harm(tiny_model: Path, tmp_path: Path) -> None:
    """Should two runs ever share an output in spite of the lease: the same bytes, whoever writes last."""
    photos = (write_photo(tmp_path / "0.png", 0), write_photo(tmp_path / "1.png", 1))
    tasks = [task(name, photos) for name in ("a", "b", "c")]
    calm = tiny_config(tiny_model, tmp_path / "calm", actors={"slots": 2})
    learn(calm, tasks)
    shared = tiny_config(tiny_model, tmp_path / "shared", actors={"slots": 2, "checkpoint_steps": 1})
    runs = [threading.Thread(target=work, args=(Learner(shared), order)) for order in (tasks, tasks[::-1])]
    for run in runs:
        run.start()
    for run in runs:
        run.join(300)
    for one in tasks:
        record = from_json(RunStore(shared.output).get(one.folder.record))
        assert record.status == "done"
        for name in record.files:
            both = [RunStore(config.output).get(one.folder.file(name)) for config in (calm, shared)]
            assert both[0] == both[1], name


def test_requests_a_concept_costs(faults: S3Faults, bucket: str, tiny_model: Path, tmp_path: Path) -> None:
    photos = tuple(f"{bucket}/photos/{i}.png" for i in range(3))
    for i, uri in enumerate(photos):
        fsspec.filesystem("s3").pipe_file(uri, Path(write_photo(tmp_path / f"{i}.png", i)).read_bytes())
    config = tiny_config(tiny_model, f"{bucket}/run", actors={"checkpoint_steps": 0})
    tasks = [task(f"c{i}", photos) for i in range(4)]
    faults.requests.clear()
    learn(config, tasks)
    # what earlier attempts left: nothing; its photos; three files, log and record
    assert faults.requests == {"list": 4, "get": 4 * 3, "put": 4 * 5}


@pytest.mark.timeout(900)
def test_a_whole_run_on_a_bad_day(s3_server: S3Server, bucket: str, tiny_model: Path, tmp_path: Path) -> None:
    """Learned, drawn and reported through faults in some per cent of all requests, with credentials that expire while
    concepts are learned: the bytes of a calm run, and the report tells how often calls were made again."""
    names = [f"c{i}" for i in range(6)]
    server = directly(s3_server)
    for i, name in enumerate(names):
        for j in range(2):
            photo = write_photo(tmp_path / f"{name}-{j}.png", 10 * i + j)
            server.pipe_file(f"{bucket}/photos/{name}-{j}.png", Path(photo).read_bytes())
    images = [[f"photos/{name}-{j}.png" for j in range(2)] for name in names]
    with server.open(f"{bucket}/manifest.parquet", "wb") as file:
        pq.write_table(pa.table({"concept_id": names, "images": images}), file)
    server.pipe_file(f"{bucket}/prompts.txt", b"a photo of a {}\n")
    settings = {"inversion": {"steps": 40, "batch_size": 2}, "actors": {"count": 1, "slots": 2, "checkpoint_steps": 10}}
    (tmp_path / "job.toml").write_text(tiny_toml(tiny_model, **settings))
    environment = dict(os.environ) | s3_server.environment | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
    environment["FSSPEC_S3"] = json.dumps(SOON)
    hand_over = credentials_file(tmp_path, environment.__setitem__, environment.__delitem__)
    command = [sys.executable, "-m", "pipeline.run", f"{bucket}/manifest.parquet", "--output", f"{bucket}/out",
               "--prompts", f"{bucket}/prompts.txt", "--config", str(tmp_path / "job.toml")]  # fmt: skip

    with serve_faults(s3_server.endpoint, hang_s=2.0) as faults:
        faults.rates = dict.fromkeys(KINDS, 0.02)
        environment["AWS_ENDPOINT_URL"] = faults.endpoint
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        until = time.monotonic() + 400
        while run.poll() is None and not server.glob(f"{bucket}/out/concepts/*/*/record.json"):
            assert time.monotonic() < until
            time.sleep(0.2)
        faults.expired_keys = {KEY}
        while run.poll() is None and not faults.faults["expired"]:
            assert time.monotonic() < until
            time.sleep(0.05)
        hand_over()
        said, errors = run.communicate(timeout=400)
    assert run.returncode == 0, said + errors[-3000:]
    assert "6 learned, 0 done before, 0 failed" in said
    assert "pictures: 6 drawn, 0 done before, 0 failed" in said
    assert faults.faults["expired"] > 0
    assert sum(faults.faults.values()) > faults.faults["expired"]

    told = json.loads(server.cat_file(f"{bucket}/out/run.json"))
    assert told["counts"]["storage_calls_repeated"] > 0
    assert b"storage calls made again" in server.cat_file(f"{bucket}/out/report.html")
    found = {path.rpartition("/out/")[2]: path for path in server.find(f"{bucket}/out")}
    calm = calm_bytes(f"{bucket}/manifest.parquet", tiny_model, tmp_path / "calm", settings)
    for end, data in calm.items():
        name, file = end
        (path,) = (path for short, path in found.items() if short.startswith(f"concepts/{name}/") and file in short)
        assert server.cat_file(path) == data, end
    assert len([short for short in found if short.startswith("images/c")]) == 6
    assert not [short for short in found if "checkpoint" in short or short == "lease.json"]


def calm_bytes(manifest: str, model: Path, output: Path, settings: dict) -> dict[tuple[str, str], bytes]:
    """(concept, file) -> what is learned and drawn when nothing happens."""
    rows = [row for row in read_manifest(manifest) if isinstance(row, ManifestRow)]
    learn(
        tiny_config(model, output, **settings), [ConceptTask(concept=row.concept, fingerprint="calm") for row in rows]
    )
    return {
        (row.concept.concept_id, name): (output / "concepts" / row.concept.concept_id / "calm" / name).read_bytes()
        for row in rows
        for name in ("curve.parquet", "grid.png")
    }
