"""`python -m pipeline.use COMMAND`: draw with learned concepts, in the ways of Gal et al. 2022, section 4.

    variations CONCEPT                pictures of a concept beside its photos
    draw PROMPT...                    any prompts, with any learned words in them
    style STYLE OBJECT...             a learned style, alone and on objects: plain words or learned ones
    compose FIRST SECOND              two learned concepts in one picture, and each alone
    bias WORD CONCEPT --caption ...   what a word stands for, and the same word learned anew from a diverse set
    edit PICTURE MASK PROMPT...       redraw the white part of the mask (Blended Latent Diffusion)

A concept is named by its id or its placeholder token and looked up in --learned. Every command writes its pictures,
a labelled sheet (sheet.png) and a list of what was drawn with what (pictures.json) to --output.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.exit_codes import OK, USAGE
from pipeline.inputs.models import portable
from pipeline.store.addresses import absolute, read_bytes
from pipeline.store.storage import RunStore

if TYPE_CHECKING:
    from PIL import Image

    from pipeline.actor.library import LearnedConcept, Library
    from pipeline.sheets.contact_sheet import ContactSheet, Paint
    from textual_inversion.config import SamplingConfig
    from textual_inversion.families.base import Backbone
    from textual_inversion.generate import ImageRequest

# torch is imported where it is first needed: --help answers at once.

OBJECT_PROMPT, STYLE_PROMPT = "a photo of a {}", "a painting in the style of {}"
STYLED_OBJECT_PROMPT = "a picture of a {} in the style of {}"
COMPOSITION_PROMPT = "a photo of a {} and a {}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parse(arguments)
    from pipeline.actor.library import open_library

    try:
        config = configure(options)
        options.use(options, config, open_library(options.learned))
    except (ValueError, OSError) as error:  # what was asked for is wrong, or the store refuses
        sys.stderr.write(f"error: {error}\n")
        return USAGE
    sys.stdout.write(f"{RunStore(config.output).uri('sheet.png')}\n")
    return OK


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.use", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--learned", metavar="[WORD=]URI", action="append", default=[],
                        help="a run's output folder, or a .safetensors file, to which WORD gives another placeholder "
                        "token; may be repeated")  # fmt: skip
    common.add_argument("--output", metavar="URI", required=True, help="folder to write to")
    common.add_argument("--overwrite", action="store_true", help="replace what an earlier command wrote there")
    common.add_argument("--model", help="directory or hub id (default: what the concepts were learned on)")
    common.add_argument("--seed", type=int, default=0, help="of each prompt's first picture; further ones count on")
    common.add_argument("--config", metavar="TOML", help="settings, as of pipeline.run")
    common.add_argument("--set", metavar="A.B=C", action="append", default=[], help="e.g. generation.sampling.steps=50")

    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, use: Any, count: int, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[common], help=help, description=help)
        added.add_argument("-n", "--count", type=int, default=count, help="pictures per prompt (default: %(default)s)")
        added.set_defaults(use=use)
        return added

    one = command("variations", variations, 8, "a concept from several seeds, beside its photos")
    one.add_argument("concept", metavar="CONCEPT")
    one = command("draw", draw, 4, "any prompts with any learned concepts in them")
    one.add_argument("prompts", metavar="PROMPT", nargs="+", help="e.g. 'a photo of a <tiger> on the beach'")
    one = command("style", style, 4, "a learned style, alone and on objects")
    one.add_argument("concept", metavar="STYLE")
    one.add_argument("objects", metavar="OBJECT", nargs="*", help="a learned concept where one has the name, or a word")
    one = command("compose", compose, 4, "two learned concepts in one picture, and each alone")
    one.add_argument("concepts", metavar="CONCEPT", nargs=2)
    one.add_argument("--prompt", help=f"with two {{}} (default: {COMPOSITION_PROMPT!r}, or {STYLED_OBJECT_PROMPT!r})")
    one = command("bias", bias, 64, "what a word stands for, and the same word learned anew from a diverse set")
    one.add_argument("word", metavar="WORD", help="of the model's vocabulary")
    one.add_argument("concept", metavar="CONCEPT", help="learned with WORD as initializer")
    one.add_argument(
        "--caption", action="append", default=[], help="an answer the judge may give; repeat, twice at least"
    )
    one.add_argument("--prompt", default=OBJECT_PROMPT, help="with {} for either word (default: %(default)r)")
    one = command("edit", edit, 4, "redraw the masked part of a picture")
    one.add_argument("picture", metavar="PICTURE")
    one.add_argument("mask", metavar="MASK", help="white where it is to be redrawn")
    one.add_argument("prompts", metavar="PROMPT", nargs="+")
    one.add_argument("--strength", type=float, default=1.0, help="below 1 keeps something of what was there")
    one.add_argument("--redecode", action="store_true", help="leave the rest, too, as the autoencoder makes it")
    one.add_argument("--crop", action="store_true", help="take the central squares and scale them to the model's size")
    return parser.parse_args(arguments)


def configure(options: argparse.Namespace) -> RunConfig:
    if options.count < 1:
        raise ValueError(f"--count {options.count}: draw at least 1 picture per prompt")
    toml = read_bytes(absolute(options.config)).decode() if options.config else ""
    config = load_config(toml, options.set, model=options.model, output=absolute(options.output))
    return dataclasses.replace(config, model=portable(config.model))


def variations(options: argparse.Namespace, config: RunConfig, library: Library) -> None:
    """Gal et al. 2022, section 4.1."""
    from pipeline.sheets.contact_sheet import ContactSheet, own_photos

    concept = library.named(options.concept)
    prompts = [_alone(concept)]
    _finish(ContactSheet.of(library, prompts, _seeds(options), given=own_photos([concept])), config, options)


def draw(options: argparse.Namespace, config: RunConfig, library: Library) -> None:
    """Gal et al. 2022, section 4.2."""
    from pipeline.sheets.contact_sheet import ContactSheet

    _finish(ContactSheet.of(library, options.prompts, _seeds(options)), config, options)


def style(options: argparse.Namespace, config: RunConfig, library: Library) -> None:
    """Gal et al. 2022, section 4.3."""
    from pipeline.sheets.contact_sheet import ContactSheet, own_photos

    concept = library.named(options.concept)
    words = [library.named(name).placeholder_token if library.knows(name) else name for name in options.objects]
    prompts = [STYLE_PROMPT.format(concept.placeholder_token)]
    prompts += [STYLED_OBJECT_PROMPT.format(word, concept.placeholder_token) for word in words]
    _finish(ContactSheet.of(library, prompts, _seeds(options), given=own_photos([concept])), config, options)


def compose(options: argparse.Namespace, config: RunConfig, library: Library) -> None:
    """Gal et al. 2022, section 4.4."""
    from pipeline.sheets.contact_sheet import ContactSheet, own_photos

    pair = sorted((library.named(name) for name in options.concepts), key=lambda concept: concept.category == "style")
    together = options.prompt or (STYLED_OBJECT_PROMPT if pair[1].category == "style" else COMPOSITION_PROMPT)
    if together.count("{}") != 2:
        raise ValueError(f"--prompt {together!r} must have {{}} twice, for the two concepts")
    prompts = [together.format(*(concept.placeholder_token for concept in pair)), *map(_alone, pair)]
    _finish(ContactSheet.of(library, prompts, _seeds(options), given=own_photos(pair, most=2)), config, options)


def bias(options: argparse.Namespace, config: RunConfig, library: Library) -> None:
    """Gal et al. 2022, section 4.5; what the judge answers before and after goes into the list as `shift`."""
    from pipeline.sheets.contact_sheet import ContactSheet, own_photos
    from pipeline.sheets.shift import judge_of, measure

    if options.prompt.count("{}") != 1:
        raise ValueError(f"--prompt {options.prompt!r} must have {{}} once, for the word")
    concept = library.named(options.concept)
    photos = own_photos([concept])
    prompts = [options.prompt.format(word) for word in (options.word, concept.placeholder_token)]
    page = ContactSheet.of(library, prompts, _seeds(options), title="the set it was learned from", given=photos)
    config = _ready(page, config, options)
    judge = judge_of(config, options.caption)
    rows = _drawn(page, config)
    shift = measure(judge, options.caption, photos, *rows)
    sys.stdout.write("".join(f"{line}\n" for line in shift.lines()))
    _write(page, rows, config, labels=shift.labels(page.prompts), shift=shift.facts())


def edit(options: argparse.Namespace, config: RunConfig, library: Library) -> None:
    """Avrahami et al. 2023 with learned words, as Gal et al. 2022, section 4.6."""
    from PIL import Image, ImageOps

    from pipeline.sheets.contact_sheet import ContactSheet, opened
    from textual_inversion import edit as editing
    from textual_inversion.photos import open_mask, open_photo

    picture = opened(options.picture, open_photo)
    mask = opened(options.mask, partial(open_mask, photo=picture))
    page = ContactSheet.of(library, options.prompts, _seeds(options), title="picture and mask", given=[picture, mask])
    config = _ready(page, config, options)

    def paint(backbone: Backbone, requests: list[ImageRequest], sampling: SamplingConfig) -> list[Image.Image]:
        side = (backbone.resolution, backbone.resolution)
        squares = picture, mask
        if options.crop:
            squares = (
                ImageOps.fit(picture, side, Image.Resampling.LANCZOS),
                ImageOps.fit(mask, side, Image.Resampling.BOX),
            )
        how = {"strength": options.strength, "keep_pixels": not options.redecode}
        return editing.edit(backbone, *squares, requests, sampling, **how)

    edit_facts = {name: getattr(options, name) for name in ("picture", "mask", "strength", "redecode", "crop")}
    _write(page, _drawn(page, config, paint), config, edit=edit_facts)


def _alone(concept: LearnedConcept) -> str:
    return (STYLE_PROMPT if concept.category == "style" else OBJECT_PROMPT).format(concept.placeholder_token)


def _seeds(options: argparse.Namespace) -> range:
    return range(options.seed, options.seed + options.count)


def _finish(page: ContactSheet, config: RunConfig, options: argparse.Namespace) -> None:
    config = _ready(page, config, options)
    _write(page, _drawn(page, config), config)


def _ready(page: ContactSheet, config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """The configuration with the model to draw with; raises ValueError for what would go wrong after drawing."""
    from pipeline.sheets.contact_sheet import check_free, choose_model

    if not options.overwrite:
        check_free(RunStore(config.output), page)
    return choose_model(list(page.embeddings.values()), config, options.model)


def _drawn(page: ContactSheet, config: RunConfig, paint: Paint | None = None) -> list[list[Image.Image]]:
    from pipeline.actor.model_loading import load_model
    from textual_inversion.generate import generate

    return page.draw(load_model(config), config.generation.sampling, paint or generate)


def _write(page: ContactSheet, rows: Sequence[Sequence[Image.Image]], config: RunConfig, **more: Any) -> None:
    from pipeline.sheets.contact_sheet import write

    write(RunStore(config.output), page, rows, config, **more)


if __name__ == "__main__":
    sys.exit(main())
