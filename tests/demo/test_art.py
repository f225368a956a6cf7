"""The atlas is built from art packages, in which some sets lack some objects."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from demo import art
from demo.objects import WorldObject

CAT, KITE = WorldObject("cat", "cat-face"), WorldObject("kite", "kite")
_NAMES = {"\U0001f431": ("cat_face", "Animals & Nature"), "\U0001fa81": ("kite", "Activities")}
_SQUARE = {"body": '<rect x="4" y="4" width="8" height="4" fill="#f00"/>'}


def _pack(folder: Path, package: str, files: dict[str, bytes]) -> None:
    """Write an npm archive where the atlas looks for it."""
    name, _, version = package.rpartition("@")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz", "w:gz") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def _pack_all(work: Path, icons_of: dict[str, dict], names: dict[str, tuple[str, str]] = _NAMES) -> None:
    """Write archives of all packages; the icon sets that `icons_of` does not name hold both objects."""
    both = {"icons": {"cat-face": _SQUARE, "kite": _SQUARE}}
    for art_set, package in art.ICON_PACKAGES.items():
        _pack(work / "npm", package, {"icons.json": json.dumps(icons_of.get(art_set, both)).encode()})
    picture = io.BytesIO()
    Image.new("RGBA", (32, 16), (0, 0, 255, 255)).save(picture, "WEBP")
    webp = {f"assets/{ord(emoji):x}.webp": picture.getvalue() for emoji in names}
    _pack(work / "npm", art.FLUENT_PACKAGE, webp)
    entries = {emoji: {"slug": slug, "group": group} for emoji, (slug, group) in names.items()}
    _pack(work / "npm", art.NAMES_PACKAGE, {"data-by-emoji.json": json.dumps(entries).encode()})


@pytest.fixture(autouse=True)
def two_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(art, "TRAINING", (CAT, KITE))
    monkeypatch.setattr(art, "HELD_OUT", ())


def test_sprites_are_trimmed_and_scaled(tmp_path: Path) -> None:
    _pack_all(tmp_path, {})
    atlas = art.load_atlas(tmp_path)
    for art_set in art.ART_SETS:
        sprite = atlas.sprite(art_set, "kite")
        assert (sprite.mode, sprite.size) == ("RGBA", (art.SPRITE_PX, art.SPRITE_PX // 2)), art_set


def test_a_set_may_lack_an_object(tmp_path: Path) -> None:
    _pack_all(tmp_path, {"emojione": {"icons": {"cat-face": _SQUARE}}})
    atlas = art.load_atlas(tmp_path)
    assert atlas.has("emojione", "cat-face")
    assert not atlas.has("emojione", "kite")
    with pytest.raises(KeyError):
        atlas.sprite("emojione", "kite")


def test_a_required_set_may_not_lack_an_object(tmp_path: Path) -> None:
    _pack_all(tmp_path, {"twemoji": {"icons": {"cat-face": _SQUARE}}})
    with pytest.raises(ValueError, match="twemoji has no drawing of kite"):
        art.load_atlas(tmp_path)


def test_an_alias_is_drawn_unless_it_turns_its_parent(tmp_path: Path) -> None:
    aliases = {"kite": {"parent": "cat-face"}}
    turned = {"kite": {"parent": "cat-face", "hFlip": True}}
    icons = {"cat-face": _SQUARE}
    _pack_all(
        tmp_path, {"noto-v1": {"icons": icons, "aliases": aliases}, "emojione": {"icons": icons, "aliases": turned}}
    )
    atlas = art.load_atlas(tmp_path)
    assert atlas.has("noto-v1", "kite")
    assert not atlas.has("emojione", "kite")


def test_excluded_groups_are_refused(tmp_path: Path) -> None:
    _pack_all(tmp_path, {}, {**_NAMES, "\U0001fa81": ("kite", "Flags")})
    with pytest.raises(ValueError, match="excluded group"):
        art.load_atlas(tmp_path)


def test_stored_atlas_is_read_back_and_rebuilt_when_an_object_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pack_all(tmp_path, {})
    monkeypatch.setattr(art, "TRAINING", (CAT,))
    first = art.load_atlas(tmp_path)
    for archive in (tmp_path / "npm").iterdir():
        archive.rename(archive.with_suffix(".away"))
    again = art.load_atlas(tmp_path)
    assert again.sprite("noto", "cat-face").tobytes() == first.sprite("noto", "cat-face").tobytes()
    for archive in (tmp_path / "npm").iterdir():
        archive.rename(archive.with_suffix(".tgz"))
    monkeypatch.setattr(art, "TRAINING", (CAT, KITE))
    assert art.load_atlas(tmp_path).has("noto", "kite")


def test_held_out_art_sets_are_no_training_sets() -> None:
    assert not set(art.HELD_OUT_SETS) & set(art.TRAINING_SETS)
    assert set(art.ICON_PACKAGES) | {"fluent"} == set(art.ART_SETS)
