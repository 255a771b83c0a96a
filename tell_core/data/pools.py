"""Pools: the curated corpora as cells draw from them, each look rendered once and kept on disk."""

import fcntl
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from tell_core.data.anchors import Anchor, apply_anchor, random_anchor
from tell_core.data.corpus import Corpus
from tell_core.data.encoding import EncodedExamples, IntArray, from_lists
from tell_core.data.rendering import ChatRenderer, Example, with_shots
from tell_core.data.token_store import STORE_FILE, IndexPart, TokenStore, open_writer
from tell_core.errors import DataError
from tell_core.spec.arms import TaskAnchor
from tell_core.spec.identity import fingerprint
from tell_core.store import is_intact, read_json, write_beside

_VERSION = 1  # raised by hand when the same look comes out as other tokens
_BATCH_ROWS = 2048
_LOCK_FILE = ".tokens.lock"
_MAX_MADE = 32
T = TypeVar("T")


class Look(NamedTuple):
    """What stands on a prompt beside its own text.

    Attributes:
        anchor: Instruction or anchor prompt, as in `apply_anchor`.
        random_text: Text for anchor "random".
        shots: Solved examples before the prompt, as they are seen.
    """

    anchor: TaskAnchor
    random_text: str = ""
    shots: tuple[Example, ...] = ()


class Pools:
    """The corpora of one curated directory, and their tokens by look.

    Tokens are rendered when they are first asked for, the whole corpus at once, into a stage
    directory ``tokens-…`` beside the curated one; its name holds a digest of corpus, look,
    tokenizer and chat template. Every cell and process then reads the same file. The bare look is
    there from curation.

    Args:
        directory: Directory written by `curate`.
        renderer: Renderer of the base model.

    Raises:
        DataError: The data were curated with another tokenizer or chat template.
    """

    def __init__(self, directory: Path, renderer: ChatRenderer):
        self.directory = directory
        self.renderer = renderer
        self._corpora: dict[str, Corpus] = {}
        self._stores: dict[str, TokenStore] = {}
        self._random_texts: dict[int, str] = {}
        self._made: dict[tuple[Hashable, ...], Any] = {}
        _require_same_renderer(directory, renderer)

    @cached_property
    def anchor(self) -> Anchor:
        """The resolved anchor prompt."""
        return Anchor.load(self.directory / "anchor.json")

    def corpus(self, part: str) -> Corpus:
        """The corpus of a part, such as ``task_train``."""
        return self._corpora.setdefault(part, Corpus(self.directory / f"{part}.parquet"))

    def seen(self, part: str, rows: IntArray, look: Look) -> list[Example]:
        """The examples of ``rows`` as a model sees them, in that order."""
        return self._shown(self.corpus(part).examples(rows), look)

    def store(self, part: str, look: Look, rows: IntArray | None = None) -> TokenStore:
        """The tokens of a part as a model sees it, rendered if they are not there yet.

        Args:
            part: Name of the part.
            look: What stands on its prompts.
            rows: The examples the store holds, in that order; None: all of the part.
        """
        look = self._same_text(look)
        if rows is None and look == Look("none"):
            return self.corpus(part).store
        identity = self._identity(part, look, rows)
        found = self._stores.get(identity)
        if found is None or not found.path.is_file():
            found = self._stores[identity] = self._find_or_render(identity, part, look, rows)
        return found

    def encoded(self, part: str, rows: IntArray, look: Look, *, is_task: bool) -> EncodedExamples:
        """The examples of ``rows`` as tokens, in that order; a store holds just these."""
        store = self.store(part, look, rows)
        return store.take(np.arange(len(rows)), is_task=is_task)

    def index(self, part: str, rows: IntArray, look: Look, *, is_task: bool) -> IndexPart:
        """The examples of ``rows`` where they lie in the store of the whole part."""
        return IndexPart(self.store(part, look), rows, is_task)

    def once(self, key: tuple[Hashable, ...], make: Callable[[], T]) -> T:
        """What ``make`` gives, computed once for all cells of this process that ask with ``key``.

        The last few are kept, the oldest goes first.
        """
        if key not in self._made:
            while len(self._made) >= _MAX_MADE:
                self._made.pop(next(iter(self._made)), None)
            self._made[key] = make()
        return cast(T, self._made[key])

    def random_text(self, seed: int) -> str:
        """Random text as long as the anchor prompt."""
        if seed not in self._random_texts:
            tokenizer, num_tokens = self.renderer.tokenizer, self.anchor.num_tokens
            self._random_texts[seed] = random_anchor(tokenizer, num_tokens, seed)
        return self._random_texts[seed]

    def _same_text(self, look: Look) -> Look:
        """One look for all that put the same text on every prompt."""
        anchor = self.anchor
        is_own = anchor.position == "before" and anchor.text == anchor.own_instruction
        if look.anchor == "anchor" and is_own:
            look = look._replace(anchor="own")
        if look.anchor == "own" and not anchor.own_instruction:
            look = look._replace(anchor="none")
        return look

    def _identity(self, part: str, look: Look, rows: IntArray | None) -> str:
        texts = {"own": self.anchor.own_instruction, "anchor": self.anchor.text, "none": ""}
        position = "before" if look.anchor == "own" else self.anchor.position
        shown = [look.anchor, texts.get(look.anchor, look.random_text), position, look.shots]
        chosen = None if rows is None else rows.tolist()
        corpus = self.corpus(part).digest
        return fingerprint("tokens", _VERSION, corpus, shown, chosen, self.renderer.digest)

    def _find_or_render(
        self, identity: str, part: str, look: Look, rows: IntArray | None
    ) -> TokenStore:
        """The store of a look; several cells may ask for it at once, one of them renders it."""
        directory = self.directory.parent / f"tokens-{identity}"
        with _one_at_a_time(self.directory.parent / _LOCK_FILE):
            if not is_intact(directory):
                with write_beside(directory) as out:
                    self._render(out / STORE_FILE, part, look, rows)
        return TokenStore(directory / STORE_FILE)

    def _render(self, path: Path, part: str, look: Look, rows: IntArray | None) -> None:
        corpus = self.corpus(part)
        batches = (
            corpus.example_batches(_BATCH_ROWS) if rows is None else iter([corpus.examples(rows)])
        )
        with open_writer(path, self.renderer.digest) as writer:
            for examples in batches:
                encoded = self.renderer.encode(self._shown(examples, look))
                writer.append(from_lists(encoded, is_task=False))

    def _shown(self, examples: list[Example], look: Look) -> list[Example]:
        shown = []
        for example in examples:
            system, prompt = apply_anchor(
                look.anchor, self.anchor, example.prompt, example.system, look.random_text
            )
            shown.append(with_shots(example._replace(system=system, prompt=prompt), look.shots))
        return shown


def open_pools(directory: Path, renderer: ChatRenderer) -> Pools:
    """The pools of a curated directory, shared by all callers in this process.

    A directory written anew is opened anew.
    """
    written_at = (directory / "profile.json").stat().st_mtime_ns
    return _opened(directory.resolve(), written_at, renderer)


@lru_cache(maxsize=2)
def _opened(directory: Path, written_at: int, renderer: ChatRenderer) -> Pools:
    del written_at  # only tells one writing of the directory from the next
    return Pools(directory, renderer)


def _require_same_renderer(directory: Path, renderer: ChatRenderer) -> None:
    profile: dict[str, Any] = read_json(directory / "profile.json")
    for what in ("tokenizer", "template"):
        was, is_now = profile[f"{what}_digest"], getattr(renderer, f"{what}_digest")
        if was != is_now:
            raise DataError(
                f"the data in {directory} were curated with another {what} (sha256 {was[:12]}… "
                f"there, {is_now[:12]}… now): their token counts and budgets would be wrong."
                " Curate them again with this one (`tell curate`), or go back to the other one."
            )


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock against other threads and processes; it ends with the process too."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
