"""`python -m pipeline.use COMMAND`: draw with learned concepts, in the ways of Gal et al. 2022, section 4.

    variations CONCEPT                pictures of a concept beside its photos
    draw PROMPT...                    any prompts, with any placeholder tokens in them
    style STYLE OBJECT...             a learned style, alone and on objects: plain words or learned concepts
    compose FIRST SECOND              two learned concepts in one picture, and each alone
    bias WORD CONCEPT --caption ...   the bias of a word, and of the same word learned anew from a diverse set
    edit PICTURE MASK PROMPT...       redraw the white part of the mask (Blended Latent Diffusion)

A concept is named by its id or its placeholder token and looked up in --learned. Where a command puts a concept into a
prompt, it names the concept as it was learned: by its placeholder token, and with the class cue by its class noun
behind the token. To a token in a given PROMPT, nothing is added. Every command writes its pictures, a labelled sheet
(sheet.png) and a list of the pictures with their prompts, seeds, model and concepts (pictures.json) to --output.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.exit_codes import OK
from pipeline.inputs.models import portable
from pipeline.inputs.prompt_table import prompt_notes
from pipeline.report.command_errors import exit_code_of
from pipeline.store.addresses import absolute, absolute_output, read_bytes
from pipeline.store.storage import RunStore

if TYPE_CHECKING:
    from PIL import Image

    from pipeline.actor.library import LearnedConcept, Library
    from pipeline.sheets.contact_sheet import ContactSheet, DrawFunction
    from textual_inversion.config import SamplingConfig
    from textual_inversion.families.base import Backbone
    from textual_inversion.generate import ImageRequest

# torch is imported inside the functions that need it, so that --help answers at once.

OBJECT_PROMPT = "a photo of a {}"
STYLE_PROMPT = "a painting in the style of {}"
STYLED_OBJECT_PROMPT = "a picture of a {} in the style of {}"
COMPOSITION_PROMPT = "a photo of a {} and a {}"


def main(arguments: list[str] | None = None, prog: str = "python -m pipeline.use") -> int:
    """Run the command and return its exit code."""
    options = parse(arguments, prog)
    return exit_code_of(lambda: _use(options))


def _use(options: argparse.Namespace) -> int:
    from pipeline.actor.library import open_library

    config = configure(options)
    options.use(options, config, open_library(options.learned))
    sys.stdout.write(f"{RunStore(config.output).uri('sheet.png')}\n")
    return OK


def parse(arguments: list[str] | None, prog: str = "python -m pipeline.use") -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, use: Any, count: int, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, parents=[_common_options()], help=help, description=help)
        added.add_argument("-n", "--count", type=int, default=count, help="pictures per prompt (default: %(default)s)")
        added.set_defaults(use=use)
        return added

    subparser = command("variations", variations, 8, "a concept from several seeds, beside its photos")
    subparser.add_argument("concept", metavar="CONCEPT")
    subparser = command("draw", draw, 4, "any prompts with any learned concepts in them")
    subparser.add_argument("prompts", metavar="PROMPT", nargs="+", help="e.g. 'a photo of a <tiger> on the beach'")
    subparser = command("style", style, 4, "a learned style, alone and on objects")
    subparser.add_argument("concept", metavar="STYLE")
    subparser.add_argument("objects", metavar="OBJECT", nargs="*", help="the name of a learned concept, or a word")
    subparser = command("compose", compose, 4, "two learned concepts in one picture, and each alone")
    subparser.add_argument("concepts", metavar="CONCEPT", nargs=2)
    subparser.add_argument(
        "--prompt", help=f"prompt with two {{}} (default: {COMPOSITION_PROMPT!r}, or {STYLED_OBJECT_PROMPT!r})"
    )
    subparser = command("bias", bias, 64, "the bias of a word, and of the same word learned anew from a diverse set")
    subparser.add_argument("word", metavar="WORD", help="a word of the model's vocabulary")
    subparser.add_argument("concept", metavar="CONCEPT", help="learned with WORD as initializer")
    subparser.add_argument(
        "--caption", action="append", default=[], help="a caption that CLIP may assign to a picture; give two or more"
    )
    subparser.add_argument(
        "--prompt", default=OBJECT_PROMPT, help="prompt with {} for either word (default: %(default)r)"
    )
    subparser = command("edit", edit, 4, "redraw the masked part of a picture")
    subparser.add_argument("picture", metavar="PICTURE")
    subparser.add_argument("mask", metavar="MASK", help="picture that is white where PICTURE is redrawn")
    subparser.add_argument("prompts", metavar="PROMPT", nargs="+")
    subparser.add_argument(
        "--strength", type=float, default=1.0, help="above 0, at most 1; below 1 keeps some of the picture"
    )
    subparser.add_argument(
        "--redecode", action="store_true", help="keep the autoencoder's version of the rest of the picture"
    )
    subparser.add_argument(
        "--crop", action="store_true", help="cut out the central squares and scale them to the model's size"
    )
    return parser.parse_args(arguments)


def _common_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--learned",
        metavar="[WORD=]URI",
        action="append",
        default=[],
        help="a run's output folder, or a .safetensors file, to which WORD gives another placeholder token; may be "
        "repeated",
    )
    options.add_argument("--output", metavar="URI", required=True, help="folder to write to")
    options.add_argument("--overwrite", action="store_true", help="replace files that an earlier command wrote there")
    options.add_argument("--model", help="directory or hub id (default: the model the concepts were learned on)")
    options.add_argument(
        "--negative-prompt",
        metavar="PROMPT",
        help="what guidance leads away from, with any placeholder tokens in it (default: generation.negative_prompt)",
    )
    options.add_argument("--seed", type=int, default=0, help="seed of each prompt's first picture; the next adds 1")
    options.add_argument("--config", metavar="TOML", help="file of settings, as for pipeline.run")
    options.add_argument(
        "--set", metavar="A.B=C", action="append", default=[], help="e.g. generation.sampling.steps=50"
    )
    return options


def configure(options: argparse.Namespace) -> RunConfig:
    """Build the configuration from the command's options. Raises ValueError for a wrong option."""
    if options.count < 1:
        raise ValueError(f"--count {options.count}: draw at least 1 picture per prompt")
    toml = read_bytes(absolute(options.config)).decode() if options.config else ""
    overrides = list(options.set)
    if options.negative_prompt:
        overrides.append(f"generation.negative_prompt={json.dumps(options.negative_prompt, ensure_ascii=False)}")
    config = load_config(toml, overrides, model=options.model, output=absolute_output(options.output))
    return dataclasses.replace(config, model=portable(config.model))


def variations(options: argparse.Namespace, config: RunConfig, library: Library) -> None:
    """Draw variations of a concept (Gal et al. 2022, section 4.1)."""
    concept = library.named(options.concept)
    sheet = _new_sheet(library, [_default_prompt(concept)], options, config, [concept])
    _draw_and_write(sheet, config, options)


def draw(options: argparse.Namespace, config: RunConfig, library: Library) -> None:
    """Draw prompts with learned concepts in them (Gal et al. 2022, section 4.2)."""
    sheet = _new_sheet(library, options.prompts, options, config)
    _note_prompts(sheet)
    _draw_and_write(sheet, config, options)


def style(options: argparse.Namespace, config: RunConfig, library: Library) -> None:
    """Draw a learned style, alone and on objects (Gal et al. 2022, section 4.3)."""
    concept = library.named(options.concept)
    words = [library.named(name).name_in_prompts if library.knows(name) else name for name in options.objects]
    prompts = [STYLE_PROMPT.format(concept.name_in_prompts)]
    prompts += [STYLED_OBJECT_PROMPT.format(word, concept.name_in_prompts) for word in words]
    _draw_and_write(_new_sheet(library, prompts, options, config, [concept]), config, options)


def compose(options: argparse.Namespace, config: RunConfig, library: Library) -> None:
    """Draw two learned concepts together, and each alone (Gal et al. 2022, section 4.4)."""
    pair = sorted((library.named(name) for name in options.concepts), key=lambda concept: concept.category == "style")
    together = options.prompt or (STYLED_OBJECT_PROMPT if pair[1].category == "style" else COMPOSITION_PROMPT)
    if together.count("{}") != 2:
        raise ValueError(f"--prompt {together!r} must have {{}} twice, for the two concepts")
    prompts = [together.format(*(concept.name_in_prompts for concept in pair)), *map(_default_prompt, pair)]
    _draw_and_write(_new_sheet(library, prompts, options, config, pair, photos_each=2), config, options)


def bias(options: argparse.Namespace, config: RunConfig, library: Library) -> None:
    """Draw a word and the same word learned anew, and measure the change of bias (Gal et al. 2022, section 4.5).

    The measured proportions go into the list of pictures as `shift`.
    """
    from pipeline.sheets.bias_report import load_extractor, measure_bias

    if options.prompt.count("{}") != 1:
        raise ValueError(f"--prompt {options.prompt!r} must have {{}} once, for the word")
    concept = library.named(options.concept)
    prompts = [options.prompt.format(word) for word in (options.word, concept.name_in_prompts)]
    sheet = _new_sheet(library, prompts, options, config, [concept], title="the set it was learned from")
    config = _choose_model(sheet, config, options)
    extractor = load_extractor(config, options.caption)
    (before, after), sampling = _draw_rows(sheet, config)
    report = measure_bias(extractor, options.caption, sheet.given, before, after)
    sys.stdout.write("".join(f"{line}\n" for line in report.lines()))
    _write(sheet, [before, after], sampling, config, labels=report.labels(sheet.prompts), shift=report.rows())


def edit(options: argparse.Namespace, config: RunConfig, library: Library) -> None:
    """Redraw a masked part of a picture by Avrahami et al. 2023 with learned concepts (Gal et al. 2022, section
    4.6)."""
    from PIL import Image, ImageOps

    from pipeline.sheets.contact_sheet import ContactSheet, read_and_decode
    from textual_inversion import edit as editing
    from textual_inversion.photos import open_mask, open_photo

    picture = read_and_decode(options.picture, open_photo)
    mask = read_and_decode(options.mask, partial(open_mask, photo=picture))
    sheet = ContactSheet.for_prompts(
        library,
        options.prompts,
        _seeds(options),
        title="picture and mask",
        given=[picture, mask],
        negative_prompt=config.generation.negative_prompt,
    )
    _note_prompts(sheet)
    config = _choose_model(sheet, config, options)

    def redraw(backbone: Backbone, requests: list[ImageRequest], sampling: SamplingConfig) -> list[Image.Image]:
        side = (backbone.resolution, backbone.resolution)
        picture_square = picture
        mask_square = mask
        if options.crop:
            picture_square = ImageOps.fit(picture, side, Image.Resampling.LANCZOS)
            mask_square = ImageOps.fit(mask, side, Image.Resampling.BOX)
        return editing.edit(
            backbone,
            picture_square,
            mask_square,
            requests,
            sampling,
            strength=options.strength,
            keep_pixels=not options.redecode,
        )

    edit_facts = {name: getattr(options, name) for name in ("picture", "mask", "strength", "redecode", "crop")}
    _write(sheet, *_draw_rows(sheet, config, redraw), config, edit=edit_facts)


def _note_prompts(sheet: ContactSheet) -> None:
    """Say which given prompts name a concept otherwise than it was learned, or have weights. They are drawn as they
    are."""
    for note in prompt_notes([*sheet.prompts, sheet.negative_prompt]):
        sys.stderr.write(f"note: {note}\n")
    for prompt, concepts in zip(sheet.prompts, sheet.concepts, strict=True):
        for concept in concepts:
            if concept.name_in_prompts not in prompt:
                sys.stderr.write(f"note: {prompt!r}: the concept was learned as {concept.name_in_prompts!r}\n")


def _default_prompt(concept: LearnedConcept) -> str:
    return (STYLE_PROMPT if concept.category == "style" else OBJECT_PROMPT).format(concept.name_in_prompts)


def _seeds(options: argparse.Namespace) -> range:
    return range(options.seed, options.seed + options.count)


def _new_sheet(
    library: Library,
    prompts: Sequence[str],
    options: argparse.Namespace,
    config: RunConfig,
    concepts: Sequence[LearnedConcept] = (),
    *,
    photos_each: int | None = None,
    title: str = "photos",
) -> ContactSheet:
    """Make a sheet of the prompts under the photos of the concepts, at most `photos_each` of each."""
    from pipeline.sheets.contact_sheet import ContactSheet, read_concept_photos

    photos = read_concept_photos(concepts, photos_each)
    return ContactSheet.for_prompts(
        library, prompts, _seeds(options), title=title, given=photos, negative_prompt=config.generation.negative_prompt
    )


def _draw_and_write(sheet: ContactSheet, config: RunConfig, options: argparse.Namespace) -> None:
    config = _choose_model(sheet, config, options)
    _write(sheet, *_draw_rows(sheet, config), config)


def _choose_model(sheet: ContactSheet, config: RunConfig, options: argparse.Namespace) -> RunConfig:
    """Return the configuration with the model to draw with. Raises ValueError for that choice, and if the sheet would
    overwrite files, before anything is drawn."""
    from pipeline.sheets.contact_sheet import check_not_written, choose_model

    if not options.overwrite:
        check_not_written(RunStore(config.output), sheet)
    return choose_model(list(sheet.embeddings.values()), config, options.model)


def _draw_rows(
    sheet: ContactSheet, config: RunConfig, draw: DrawFunction | None = None
) -> tuple[list[list[Image.Image]], SamplingConfig]:
    """Draw the sheet's rows; return them with the settings used, which hold the model's own steps and guidance scale
    where the configuration asks for those."""
    from pipeline.actor.memory_plan import fit_drawing
    from pipeline.actor.model_loading import load_model
    from pipeline.actor.pass_estimates import PassEstimates
    from textual_inversion.batch_invariance import choose_sampling
    from textual_inversion.generate import generate, with_own_defaults

    backbone = load_model(config)
    fit_drawing(PassEstimates(backbone), config, config.generation.sampling)
    sampling, _ = choose_sampling(backbone, config.generation.sampling, config.inversion.adapter)
    sampling = with_own_defaults(sampling, backbone)
    return sheet.draw(backbone, sampling, draw or generate), sampling


def _write(
    sheet: ContactSheet,
    rows: Sequence[Sequence[Image.Image]],
    sampling: SamplingConfig,
    config: RunConfig,
    **more: Any,
) -> None:
    from pipeline.sheets.contact_sheet import write

    write(RunStore(config.output), sheet, rows, sampling, config.model, **more)


if __name__ == "__main__":
    sys.exit(main())
