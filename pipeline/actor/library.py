"""Find learned concepts to draw with: those of finished runs, and embedding files of this or another tool."""

from __future__ import annotations

import difflib
import hashlib
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pipeline.ledger.records import ConceptRecord, StoredFile, latest, load_records, read_record
from pipeline.store.addresses import absolute, read_bytes
from pipeline.store.storage import ConceptFolder, RunStore
from textual_inversion.adapter_formats import with_adapter
from textual_inversion.concept import LearnedEmbedding
from textual_inversion.dialects import parse_embedding
from textual_inversion.prompts import name_in_prompt, words_in

SUFFIXES = (".safetensors", ".pt", ".bin")
"""Endings of embedding files, of any layout that `dialects` reads."""


_NAMELESS = "*"
"""Placeholder token of a file that holds none, until it gets a word or its own name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnedConcept:
    """A learned concept that pictures can be drawn of."""

    name: str
    """Concept id, or the file's name without its ending."""
    placeholder_token: str
    prompt_as: str = ""
    """Text that names it in prompts, the placeholder token and its class noun; empty where that is the token alone."""
    uri: str
    """Address of its embedding."""
    category: str = "object"
    initializer: str = ""
    images: tuple[str, ...] = ()
    """Addresses of the photos that it was learned from, where they are known."""
    image_hashes: tuple[str, ...] = ()
    """Content hashes of those photos when it was learned; empty where its record keeps none."""
    files: Mapping[str, StoredFile] = field(default_factory=dict, hash=False)
    """Name -> digest of the files that its record names; empty for a file without a record."""

    @property
    def name_in_prompts(self) -> str:
        """Text that `{}` stands for in the concept's prompts."""
        return self.prompt_as or self.placeholder_token

    def read(self) -> LearnedEmbedding:
        """Return its embedding under its placeholder token. Raises ValueError as `read_embedding` does."""
        embedding = read_embedding(self.uri, self.files, self.placeholder_token)
        return replace(embedding, placeholder_token=self.placeholder_token)


def read_embedding(
    uri: str, files: Mapping[str, StoredFile] | None = None, placeholder_token: str = ""
) -> LearnedEmbedding:
    """Read an embedding of this or another tool, and the adapter beside it if it was learned with one.

    `files` are the digests in its record (name -> file). `placeholder_token` is that of a file without one; empty
    takes the file's name, as other tools do. Raises ValueError naming the file if it cannot be read, is not an
    embedding, or is not the file of the record.
    """
    name = placeholder_token or posixpath.splitext(posixpath.basename(uri))[0]

    def read(address: str) -> bytes:
        data = read_bytes(address)
        recorded = (files or {}).get(posixpath.basename(address))
        if recorded and recorded.sha256 != hashlib.sha256(data).hexdigest():
            raise ValueError(f"{address} is not the file that its record names: the SHA-256 digests differ")
        return data

    def beside(name: str) -> bytes:
        address = f"{uri.rpartition('/')[0]}/{name}"
        try:
            return read(address)
        except OSError as error:
            raise ValueError(f"it was learned with an adapter, and {address} cannot be read ({error})") from error

    try:
        return with_adapter(parse_embedding(read(uri), name), beside)
    except (OSError, ValueError) as error:
        raise ValueError(f"{uri} cannot be used: {error}") from error


def read_result(store: RunStore, path: str) -> LearnedEmbedding:
    """Read the embedding of a run at a path of its output, compared with the record beside it.

    Raises ValueError naming the file if it is not the one of the record or cannot be read, and OSError or ValueError if
    the record cannot be read.
    """
    folder = ConceptFolder.from_path(path)
    if folder is None:
        raise ValueError(f"{path} is no concept's file")
    return read_embedding(store.uri(path), read_record(store, folder).files)


class Library:
    """Learned concepts that a command may draw with."""

    def __init__(self, concepts: Iterable[LearnedConcept], failures: Iterable[ConceptRecord] = ()) -> None:
        self.concepts = tuple(concepts)
        self._failures = {record.concept_id: record.error for record in failures}

    def named(self, name: str) -> LearnedConcept:
        """Return a concept by its id or placeholder token. Raises ValueError if none or several have it."""
        found = [concept for concept in self.concepts if name in (concept.name, concept.placeholder_token)]
        if found:
            return _only(name, found)
        if name in self._failures:
            raise ValueError(f"concept {name!r} was not learned: {self._failures[name]}; mend that and run it again")
        names = [concept.name for concept in self.concepts]
        close = difflib.get_close_matches(name, names, n=3) or names[:8]
        raise ValueError(f"no learned concept is named {name!r}; there are {len(names)}, such as {', '.join(close)}")

    def knows(self, name: str) -> bool:
        return any(name in (concept.name, concept.placeholder_token) for concept in self.concepts)

    def in_prompt(self, prompt: str) -> tuple[LearnedConcept, ...]:
        """Return the concepts whose placeholder tokens stand in the prompt, in its order.

        Raises ValueError for a token of several concepts, and for a word in angle brackets that is none of them.
        """
        words = sorted({concept.placeholder_token for concept in self.concepts}, key=len, reverse=True)
        found = words_in(prompt, words)
        unknown = [word for word in re.findall(r"<[^<>\s]+>", prompt) if not words_in(word, found)]
        if unknown:
            close = difflib.get_close_matches(unknown[0], words, n=3, cutoff=0.3) or words[:8]
            known = f"the known ones are {', '.join(close)}" if words else "no --learned was given"
            raise ValueError(f"prompt {prompt!r}: {unknown[0]} is no learned concept's placeholder token; {known}")
        return tuple(
            _only(word, [concept for concept in self.concepts if concept.placeholder_token == word]) for word in found
        )


def open_library(sources: Sequence[str]) -> Library:
    """Return the learned concepts of output folders of runs and of embedding files (`SUFFIXES`), at any fsspec URIs.

    `WORD=` before a file gives its concept another placeholder token. Raises ValueError for a source without a learned
    concept.
    """
    concepts: list[LearnedConcept] = []
    failures: list[ConceptRecord] = []
    for source in sources:
        if source.endswith(SUFFIXES):
            concepts.append(_of_file(source))
            continue
        records = latest(load_records(RunStore(source)))
        if not records:
            endings = " or ".join(SUFFIXES)
            raise ValueError(f"{source}: no concepts there; give the output folder of a run, or a {endings} file")
        concepts += [_of_record(RunStore(source), record) for record in records if record.status == "done"]
        failures += [record for record in records if record.status == "failed"]
    return Library(concepts, failures)


def _of_record(store: RunStore, record: ConceptRecord) -> LearnedConcept:
    return LearnedConcept(
        name=record.concept_id,
        placeholder_token=record.placeholder_token,
        prompt_as=record.prompt_as,
        uri=store.uri(record.result.embedding),
        category=record.category,
        initializer=record.initializer,
        images=record.images,
        image_hashes=tuple(record.inputs.get("images", ())),
        files=record.files,
    )


def _of_file(source: str) -> LearnedConcept:
    word, equals, path = source.partition("=")
    if not equals or "/" in word:
        word = ""
        path = source
    uri = absolute(path)
    stem = posixpath.splitext(posixpath.basename(uri))[0]
    embedding = read_embedding(uri, placeholder_token=word or _NAMELESS)
    token = word or (stem if embedding.placeholder_token == _NAMELESS else embedding.placeholder_token)
    if any(letter.isspace() for letter in token):
        raise ValueError(
            f"{path} holds no placeholder token, and its name {stem!r} is not one word; give it a word: "
            f"--learned '<my-word>={path}'"
        )
    prompt_as = name_in_prompt(token, embedding.class_noun)
    return LearnedConcept(name=stem, placeholder_token=token, prompt_as=prompt_as, uri=uri)


def _only(name: str, found: Sequence[LearnedConcept]) -> LearnedConcept:
    if len(found) > 1:
        uris = ", ".join(concept.uri for concept in found[:3])
        raise ValueError(
            f"{name!r} is the name of {len(found)} learned concepts ({uris}); give the one you mean a word of its own: "
            f"--learned '<my-word>={found[0].uri}'"
        )
    return found[0]
