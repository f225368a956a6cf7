"""`python -m pipeline.export OUTPUT --for TOOLS --to URI`: learned concepts as files that other tools load.

    webui        AUTOMATIC1111, Forge and SD.Next       embeddings/NAME.safetensors, loras/NAME-lora.safetensors
    comfyui      ComfyUI                                the same
    invoke       InvokeAI                               the same
    kohya        kohya-ss/sd-scripts                    the same
    onetrainer   OneTrainer, to go on training          embeddings/NAME.safetensors
    diffusers    diffusers                              NAME/learned_embeds.safetensors, NAME/pytorch_lora_weights...
    peft         PEFT, of concepts with an adapter      NAME/adapter_config.json, adapter_model.safetensors
    merged       text encoders with the adapter merged  NAME/text_encoder/, as large as the model's own

Every tool has a folder of its own under URI, with a preview picture of each concept. NAME is made of the concept id; it
is the word of prompts in most tools and never a word of the model's vocabulary. Beside the folders lie index.csv and
index.parquet (each concept's word in each tool, base model, adapter, scores, files with digests) and a model card,
README.md. Each file is read back and compared with the concept. What a tool would load as something else than it is,
as an adapter of TextBoost v2, is refused with a remedy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipeline.config import RunConfig
from pipeline.config_file import load_config
from pipeline.exit_codes import FAILED, OK
from pipeline.exports.names import file_names
from pipeline.inputs.models import load_model_vocabularies
from pipeline.ledger.gate import PASSED, gate_verdict
from pipeline.ledger.records import ConceptRecord, latest, load_records
from pipeline.ledger.selection import unknown_concept
from pipeline.report.command_errors import exit_code_of
from pipeline.report.run_file import RUN_FILE, read_run
from pipeline.store.addresses import absolute, absolute_output
from pipeline.store.redact import redact
from pipeline.store.storage import RunStore

if TYPE_CHECKING:
    from pipeline.exports.index import Entry

# torch is imported inside the functions that need it, so that --help answers at once.

_TOOLS = ("webui", "comfyui", "invoke", "kohya", "onetrainer", "diffusers", "peft", "merged")
_SHOWN = 20


def main(arguments: list[str] | None = None, prog: str = "python -m pipeline.export") -> int:
    """Run the command and return its exit code: FAILED if a concept was refused for a tool."""
    options = parse(arguments, prog)
    return exit_code_of(lambda: conclude(export(options), absolute(options.to)))


def parse(arguments: list[str] | None, prog: str = "python -m pipeline.export") -> argparse.Namespace:
    """Parse the command line; None takes the process's own arguments."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", metavar="OUTPUT", help="output of a run: folder or any fsspec URI")
    parser.add_argument(
        "--for", dest="tools", metavar="TOOLS", required=True, help=f"with commas between: {', '.join(_TOOLS)}"
    )
    parser.add_argument("--to", metavar="URI", required=True, help="folder to write to")
    parser.add_argument("--only", metavar="IDS", help="concept ids, with commas between (default: all that are done)")
    parser.add_argument(
        "--gate", choices=("any", PASSED), default="any", help="passed: only concepts that passed the quality gate"
    )
    parser.add_argument("--zip", action="store_true", help="write an archive for each tool in place of its folder")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="also upload the folder to a model repository of the Hugging Face hub"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser.parse_args(arguments)


def export(options: argparse.Namespace) -> list[Entry]:
    """Export the chosen concepts. Raises ValueError for a wrong option, before anything is written."""
    tools = _chosen_tools(options.tools)
    source, target = RunStore(options.output), RunStore(absolute_output(options.to))
    if options.push and "://" in target.root:
        raise ValueError(f"--push uploads a folder of this machine; {options.to} is none")
    if not options.overwrite and target.exists("index.parquet"):
        raise ValueError(f"{target.uri('index.parquet')} is there already; give another --to, or --overwrite")
    records = latest(load_records(source))
    if not records:
        raise ValueError(f"{source.root}: no concepts there; give the output of a run")
    config = _config_of(source)
    names = file_names((record.concept_id for record in records), _vocabulary_check(config))
    chosen = choose(records, options.only, options.gate, config, source.root)
    from pipeline.exports.writing import Export

    plan = Export(source=source, target=target, tools=tools, grid=config.grid, zipped=options.zip)
    entries = plan.write(names, chosen)
    if options.push:
        push(target.root, options.push)
    return entries


def push(folder: str, repository: str) -> None:
    """Upload an export to a model repository, which is made private if it does not exist: its licence is not stated.

    Credentials are those of `hf auth login` or HF_TOKEN. Raises OSError if the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export learned concepts")


def choose(
    records: Sequence[ConceptRecord], only: str | None, gate: str, config: RunConfig, place: str
) -> list[ConceptRecord]:
    """Return the concepts to export, by id. Raises ValueError for one that is not there or not done, and if none is
    left."""
    by_id = {record.concept_id: record for record in records}
    wanted = [name.strip() for name in only.split(",") if name.strip()] if only is not None else sorted(by_id)
    chosen = []
    for concept_id in dict.fromkeys(wanted):
        if concept_id not in by_id:
            raise unknown_concept(concept_id, by_id, place)
        record = by_id[concept_id]
        if record.status != "done" and not record.is_damaged:  # a damaged one is refused by name
            if only is not None:
                raise ValueError(f"concept {concept_id!r} was not learned: {record.error}; mend that and run it again")
        elif gate != PASSED or gate_verdict(record, config.gate) == PASSED:
            chosen.append(record)
    if not chosen:
        passed = " that passed the gate (it needs scores and bounds)" if gate == PASSED else ""
        raise ValueError(f"{place}: no learned concept{passed} to export")
    return chosen


def conclude(entries: Sequence[Entry], place: str) -> int:
    """Print what was exported and what was refused; return the exit code."""
    num_files = sum(len(entry.files) for entry in entries)
    num_exported = sum(bool(entry.files) for entry in entries)
    sys.stdout.write(redact(f"{num_exported:,} of {len(entries):,} concepts exported, {num_files:,} files: {place}\n"))
    reasons = [f"{entry.record.concept_id}: {tool}: {why}" for entry in entries for tool, why in entry.refused.items()]
    for reason in reasons[:_SHOWN]:
        sys.stderr.write(redact(f"REFUSED {reason}\n"))
    if len(reasons) > _SHOWN:
        sys.stderr.write(f"REFUSED {len(reasons) - _SHOWN:,} more, see the column 'refused' of the index\n")
    if not reasons and not num_exported:
        sys.stderr.write("nothing was written: these tools take concepts that were learned with an adapter\n")
    return FAILED if reasons or not num_exported else OK


def _chosen_tools(text: str) -> list[str]:
    """Return the tools that `--for` names. Raises ValueError for one that is unknown."""
    tools = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in tools if name not in _TOOLS]
    if unknown or not tools:
        raise ValueError(f"--for {text}: {f'{unknown[0]!r} is none of' if unknown else 'name'} {', '.join(_TOOLS)}")
    return tools


def _config_of(store: RunStore) -> RunConfig:
    """Return the configuration of the run, or the default one where the output does not keep it."""
    if not store.exists(RUN_FILE):
        return RunConfig()
    return load_config("", [], base=read_run(store).get("config", {}), output=store.root)


def _vocabulary_check(config: RunConfig) -> Callable[[str], bool]:
    """Return a function that tells whether a name is one word of the model's vocabulary.

    Where the model is not on this machine, the ending of the names has to do: no tokenizer of CLIP or BERT has a word
    with a hyphen in it.
    """
    try:
        vocabularies = load_model_vocabularies(config)
    except ValueError as error:
        sys.stderr.write(redact(f"note: names are not compared with the model's vocabulary: {error}\n"))
        return lambda _: False
    return lambda name: any(len(each.tokenize(name)) == 1 for each in vocabularies.values())


if __name__ == "__main__":
    sys.exit(main())
