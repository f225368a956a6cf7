from __future__ import annotations

import functools
import http.server
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError
from PIL import Image

from pipeline.config import PhotoConfig
from pipeline.config_file import parse_config
from pipeline.inputs.content_hash import content_hashes
from pipeline.inputs.photos import content_md5, fetch, fetch_as_planned, open_pictures
from pipeline.store import addresses, http_client
from pipeline.store.errors import InputChanged
from pipeline.store.storage import RunStore
from tests.pipeline.runs import write_photo
from tests.pipeline.s3_memory import S3Memory
from textual_inversion.concept import Concept


def test_what_is_allowed_is_read(root: str) -> None:
    store = RunStore(root)
    store.put("p/1.png", b"12345")
    assert fetch(store.uri("p/1.png"), PhotoConfig()) == b"12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        fetch(store.uri("p/1.png"), PhotoConfig(max_bytes=4))
    with pytest.raises(FileNotFoundError):
        fetch(store.uri("absent"), PhotoConfig())


@pytest.mark.parametrize(
    ("uri", "schemes", "message"),
    [
        ("/etc/hostname", ["s3"], "photos may not come from file://; the setting photos.schemes allows s3"),
        ("file:///etc/hostname", ["s3", "https"], "may not come from file://"),
        ("http://host/1.png", ["https"], "may not come from http://"),
        ("HTTP://host/1.png", ["https"], "may not come from http://"),
        ("ssh://me:SeCrEt@host/1.png", list(PhotoConfig().schemes), "may not come from ssh://"),
        ("file:///x::s3://y/z", ["file"], "chained"),
    ],
)
def test_other_schemes_are_refused_unread(
    uri: str, schemes: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "_read_up_to", lambda *_: pytest.fail("read"))
    monkeypatch.setattr(http_client, "read", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match=message) as raised:
        fetch(uri, PhotoConfig(schemes=tuple(schemes)))
    assert "SeCrEt" not in str(raised.value)


@pytest.mark.parametrize(
    ("photos", "message"),
    [
        ({"schemes": ["ftp"]}, "photos.schemes = 'ftp': must be among file, "),
        ({"private_networks": ["intranet"]}, "photos.private_networks = 'intranet': must be a network in CIDR form"),
        ({"max_pixels": 0}, "photos.max_pixels = 0: must be 1 or more"),
    ],
)
def test_settings_are_checked(photos: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config({"photos": photos})


def test_a_pipe_or_folder_or_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for place in (tmp_path / "pipe.png", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="a folder, or no plain file"):
            fetch(str(place), PhotoConfig())


def test_loopback_and_link_local_addresses_are_refused() -> None:
    for host in ("127.0.0.1:9", "[::1]:9", "localhost:9", "[::ffff:127.0.0.1]:9"):
        with pytest.raises(ValueError, match="no public address"):
            fetch(f"http://{host}/1.png", PhotoConfig())
    with pytest.raises(ValueError, match=r"169\.254\.169\.254 is no public address"):  # where clouds keep credentials
        fetch("http://169.254.169.254/latest/meta-data/", PhotoConfig())


def test_errors_of_clients_are_storage_errors_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: Exception) -> None:
        def raising(*_: object) -> bytes:
            raise error

        monkeypatch.setattr("pipeline.inputs.photos.read_bytes", raising)

    fail(EndpointConnectionError(endpoint_url="https://me:SeCrEt@host/"))
    with pytest.raises(OSError, match=r"EndpointConnectionError: .*https://\*\*\*@host/"):
        fetch("s3://b/1.png", PhotoConfig())
    fail(ImportError("Please install gcsfs to access Google Storage"))
    with pytest.raises(ValueError, match="install gcsfs"):
        fetch("gs://b/1.png", PhotoConfig())
    fail(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"))
    with pytest.raises(ValueError, match="bad"):
        fetch("s3://b/1.png", PhotoConfig())


def concept(*images: str, masks: tuple[str, ...] = ()) -> Concept:
    return Concept(concept_id="c", placeholder_token="<c>", images=images, masks=masks)


def test_the_pixels_of_a_concept_are_bounded(tmp_path: Path) -> None:
    photos = [write_photo(tmp_path / f"{i}.png", i) for i in range(3)]  # 40 x 36 each
    assert len(open_pictures(concept(*photos), PhotoConfig(max_concept_pixels=3 * 1440))[0]) == 3
    with pytest.raises(ValueError, match=r"first 3 photos hold 4,320 px, more than photos\.max_concept_pixels = 4,000"):
        open_pictures(concept(*photos), PhotoConfig(max_concept_pixels=4000))
    with pytest.raises(ValueError, match=r"photo .*0\.png: the picture is too large: 40 x 36 px; at most 1,000 px"):
        open_pictures(concept(*photos), PhotoConfig(max_pixels=1000))


def test_masks_are_opened_with_their_photos(tmp_path: Path) -> None:
    photo, mask = write_photo(tmp_path / "p.png", 1), tmp_path / "m.png"
    Image.new("L", (20, 18), 255).save(mask)
    photos, masks = open_pictures(concept(photo, masks=(str(mask),)), PhotoConfig())
    assert photos[0].size == masks[0].size == (40, 36)
    mask.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"mask .*m\.png: not a picture but a web page"):
        open_pictures(concept(photo, masks=(str(mask),)), PhotoConfig())


def test_a_private_web_server_is_reached_once_its_network_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "1.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}/1.png"
        allowed = PhotoConfig(private_networks=("127.0.0.0/8",))
        (photo,), _ = open_pictures(concept(uri), allowed)
        with pytest.raises(ValueError, match=r"photo http://.*1\.png: 127\.0\.0\.1 is no public address"):
            open_pictures(concept(uri), PhotoConfig())
        with pytest.raises(ValueError, match="more than 9 bytes"):
            fetch(uri, PhotoConfig(private_networks=("127.0.0.0/8",), max_bytes=9))
        server.shutdown()
    assert photo.size == (30, 20)


def test_bytes_that_are_not_those_of_the_plan_are_refused(root: str) -> None:
    store = RunStore(root)
    uri = store.uri("p/1.png")
    store.put("p/1.png", b"as planned")
    ((_, planned),) = content_hashes([uri]).items()
    assert fetch_as_planned(uri, PhotoConfig(), planned) == b"as planned"
    store.put("p/1.png", b"another")
    with pytest.raises(InputChanged, match=r"p/1\.png has changed since the plan was made"):
        fetch_as_planned(uri, PhotoConfig(), planned)


def test_a_photo_or_mask_that_was_replaced_is_told_before_it_is_decoded(tmp_path: Path) -> None:
    photo, mask = write_photo(tmp_path / "p.png", 1), str(tmp_path / "m.png")
    Image.new("L", (40, 36), 255).save(mask)
    known = content_hashes([photo, mask])
    planned = {"images": [known[photo]], "masks": [known[mask]]}
    masked = concept(photo, masks=(mask,))
    assert len(open_pictures(masked, PhotoConfig(), planned)[1]) == 1
    Path(mask).write_bytes(b"half a pict")
    with pytest.raises(InputChanged, match=r"mask .*m\.png has changed"):
        open_pictures(masked, PhotoConfig(), planned)
    write_photo(tmp_path / "p.png", 2)
    with pytest.raises(InputChanged, match=r"photo .*p\.png has changed"):
        open_pictures(masked, PhotoConfig(), planned)


def test_under_encryption_with_own_keys_the_tag_says_whether_a_photo_changed(s3_memory: S3Memory) -> None:
    """There the entity tag, which the plan holds, is no MD5; it comes with the bytes, so both are of one object."""
    s3_memory.tag_salt = b"own key"
    uri = "s3://bucket/p/1.png"
    s3_memory.objects["bucket/p/1.png"] = b"as planned"
    ((_, planned),) = content_hashes([uri]).items()
    assert planned != content_md5(b"as planned")
    assert fetch_as_planned(uri, PhotoConfig(), planned) == b"as planned"
    assert s3_memory.requests["get"] == 2
    s3_memory.objects["bucket/p/1.png"] = b"another"
    with pytest.raises(InputChanged, match=r"p/1\.png has changed since the plan was made"):
        fetch_as_planned(uri, PhotoConfig(), planned)
