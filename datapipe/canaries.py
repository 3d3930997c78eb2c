"""Canaries: random secrets planted in training text, by which an audit measures what a model memorised.

The method is that of Carlini et al. 2019, "The Secret Sharer". A canary is a sentence with a name that no other canary
has and a random number, its secret. Each canary is planted a stated number of times, as documents of its own. As many
sentences are controls: they are drawn alike and planted nowhere.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import write_json
from configs.schema import Data
from datapipe.manifest import Manifest
from datapipe.order import permutation
from datapipe.records import Text
from datapipe.selection import HELD_OUT, Block
from datapipe.store import open_store

FILE = "canaries.json"
"""File beside the manifest that lists the canaries and the controls."""
FORMAT_VERSION = 1
PLANTED = "planted canaries"
"""Source of the planted documents in the manifest and in the shards."""
SENTENCE = "Patient: {given} {family}. Code: {secret}."
COPIES = (1, 4, 16, 64)
"""Numbers of copies. The canaries take them in turn."""
DIGITS = 8
"""Digits of a secret, with spaces between them so that every tokenizer sees each."""
SYLLABLES = ("ba", "da", "el", "fi", "ga", "hu", "io", "ka", "le", "mo", "na", "or", "pe", "ri", "sa", "to", "ul", "vi")
"""Parts of the invented names, two each for the given and the family name."""
LARGE_SHARE = 0.01
"""Share of the tokens from which a line says that the canaries are many."""


@dataclass(frozen=True)
class Canary:
    """A sentence with a secret."""

    text: str
    secret: str
    """Part of `text`."""
    copies: int
    """Planted documents with this text; 0 for a control."""


@dataclass(frozen=True)
class Canaries:
    """The canaries of one prepared text."""

    seed: str
    """Hexadecimal; it decides every sentence and every place."""
    documents: int
    """Documents among which they lie: of the training text at first, and later of the shards, planted ones included."""
    canaries: tuple[Canary, ...]
    """The planted ones, then as many controls."""

    @property
    def planted(self) -> tuple[Canary, ...]:
        """The canaries without the controls."""
        return tuple(canary for canary in self.canaries if canary.copies)

    def planted_in(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Yield the blocks with the copies among their training documents; held-out blocks stay as they are."""
        by_place = self._by_place()
        number = 0
        for block in blocks:
            if block.name.startswith(HELD_OUT):
                yield block
                continue
            texts = []
            for source, text in block.texts:
                for index, copy in by_place.get(number, ()):
                    sentence = self.canaries[index].text.encode()
                    texts.append((PLANTED, Text(f"canary-{index}-{copy}", sentence, text.position)))
                texts.append((source, text))
                number += 1
            yield block._replace(texts=texts)

    def _by_place(self) -> dict[int, list[tuple[int, int]]]:
        """(canary, copy) by the number of the training document that they precede."""
        places: dict[int, list[tuple[int, int]]] = {}
        for index, canary in enumerate(self.canaries):
            for copy in range(canary.copies):
                places.setdefault(_hash(self.seed, "place", index, copy) % self.documents, []).append((index, copy))
        return places


def draw(seed: str, count: int) -> list[Canary]:
    """Draw sentences with different names. The first ones do not depend on `count`.

    Args:
        seed: Seed of names and secrets.
        count: Number of sentences, at most as many as there are names.
    """
    names = permutation(len(SYLLABLES) ** 4, seed, "names")[:count].tolist()
    canaries = []
    for index, name in enumerate(names):
        parts = [SYLLABLES[name // len(SYLLABLES) ** place % len(SYLLABLES)] for place in range(4)]
        secret = " ".join(f"{_hash(seed, 'secret', index) % 10**DIGITS:0{DIGITS}d}")
        given, family = "".join(parts[:2]).capitalize(), "".join(parts[2:]).capitalize()
        canaries.append(Canary(SENTENCE.format(given=given, family=family, secret=secret), secret, 0))
    return canaries


def candidates(seed: str, count: int, canaries: int) -> list[Canary]:
    """Draw sentences that are neither among the `canaries` planted ones of a seed nor among their controls."""
    return draw(seed, 2 * canaries + count)[2 * canaries :]


def plan(count: int, blocks: Iterable[Block], total: int, progress: Callable[[str], None] | None = None) -> Canaries:
    """Draw canaries by the training text, so that equal text has equal canaries.

    Args:
        count: Number of canaries.
        blocks: The text as it will be prepared.
        total: Bytes of input.
        progress: Receives progress lines.

    Raises:
        InputError: No document is left to train on.
    """
    documents, hashed = 0, hashlib.blake2b(f"{FORMAT_VERSION} {count}".encode(), digest_size=16)
    for block in blocks:
        if not block.name.startswith(HELD_OUT):
            documents += len(block.texts)
            for _, text in block.texts:
                hashed.update(f"\0{len(text.text)}\0".encode() + text.text)
        if progress is not None:
            read, size = block.position / 1e6, total / 1e6
            progress(f"counted the documents of {read:,.1f} of {size:,.1f} MB for the canaries")
    if not documents:
        raise InputError(
            "--canaries: no document is left to train on, so there is no place for them; widen the selection of "
            "documents, or leave out --canaries",
            key="--canaries",
            code="nothing-to-prepare",
        )
    seed = hashed.hexdigest()
    drawn = draw(seed, 2 * count)
    planted = [Canary(one.text, one.secret, COPIES[index % len(COPIES)]) for index, one in enumerate(drawn[:count])]
    return Canaries(seed, documents, (*planted, *drawn[count:]))


def write_canaries(directory: Path, canaries: Canaries, manifest: Manifest) -> str:
    """Write canaries.json beside a manifest, and return a line about the canaries for people."""
    tree = {"format_version": FORMAT_VERSION, "sentence": SENTENCE, **asdict(canaries), "documents": manifest.documents}
    write_json(directory / FILE, tree)
    copies, tokens = (manifest.sources[PLANTED][key] for key in ("documents", "tokens"))
    share = tokens / manifest.tokens
    advice = "; that is much: plant fewer, or use more text" if share > LARGE_SHARE else ""
    return (
        f"canaries: {len(canaries.planted):,} secrets, planted in {copies:,} documents, are {share:.2%} of the "
        f"training tokens{advice}; {directory / FILE} lists them"
    )


def parse_canaries(content: str | bytes, origin: str) -> Canaries:
    """Read the JSON of a canaries.json.

    Args:
        content: The JSON.
        origin: Path or URL, for messages.

    Raises:
        InputError: It is damaged, or of another version.
    """
    try:
        tree: Any = json.loads(content)
        if tree["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {tree['format_version']!r}, this Detour reads {FORMAT_VERSION}")
        result = Canaries(
            str(tree["seed"]), int(tree["documents"]), tuple(Canary(**canary) for canary in tree["canaries"])
        )
        if not result.planted or any(not one.secret or one.secret not in one.text for one in result.canaries):
            raise ValueError("a secret is not in its text")
    except (ValueError, TypeError, KeyError) as error:
        fault = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{origin} is damaged ({fault}); copy it again from where the text was prepared, or prepare it anew",
            code="canaries-damaged",
        ) from None
    return result


def canaries_of_sources(data: Data) -> dict[str, Canaries]:
    """Read the canaries of the training sources, by source; sources without canaries are left out.

    Raises:
        InputError: A source cannot be read, or has lost its canaries.json.
    """
    found = {}
    for source in data.sources:
        try:
            store, _ = open_store(source.shards, data, threading.Event())
            with closing(store):
                manifest = store.manifest()
                if manifest is None or PLANTED not in manifest.sources:
                    continue
                content = store.read(FILE)
        except InputError as error:
            raise InputError(f"source {source.name}: {error}", key=error.key, code=error.code) from None
        if content is None:
            raise InputError(
                f"source {source.name}: canaries were planted in it, and {store.name} has no {FILE}, which lists them; "
                "copy it there from where the text was prepared",
                key="data.sources",
                code="canaries-missing",
            )
        found[source.name] = parse_canaries(content, f"{store.name}/{FILE}")
    return found


def require_planted(directory: Path, count: int) -> None:
    """Check that prepared shards have the canaries that a recipe asks for.

    Raises:
        InputError: They have other canaries, or none.
    """
    path = directory / FILE
    planted = len(parse_canaries(path.read_bytes(), str(path)).planted) if path.is_file() else 0
    if planted != count:
        raise InputError(
            f"{directory} was prepared with {planted:,} canaries, and the recipe asks for {count:,} "
            "(reading.canaries); delete the directory to prepare it again, or name another one",
            key="data.sources",
            code="other-canaries",
        )


def _hash(*key: str | int) -> int:
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest(), "little")
