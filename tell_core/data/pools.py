"""Pools: the curated corpora as cells draw from them, read and rendered once per process."""

from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tell_core.data.anchors import Anchor, apply_anchor, random_anchor
from tell_core.data.corpus import Corpus
from tell_core.data.encoding import EncodedExamples, IntArray, from_lists
from tell_core.data.rendering import ChatRenderer, Example, with_shots
from tell_core.spec.arms import TaskAnchor

_MAX_KEPT_TOKENS = 32_000_000
_Rendered = tuple[IntArray, int]


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
    """The corpora of one curated directory.

    Columns read and examples rendered are kept, so that cells which draw the same examples share
    the work. What is kept is bounded: beyond 32 million rendered tokens all are let go.

    Args:
        directory: Directory written by `curate`.
        renderer: Renderer of the base model.
    """

    def __init__(self, directory: Path, renderer: ChatRenderer):
        self.directory = directory
        self.renderer = renderer
        self._corpora: dict[str, Corpus] = {}
        self._rendered: dict[tuple[str, Look], dict[int, _Rendered]] = {}
        self._num_kept_tokens = 0
        self._random_texts: dict[int, str] = {}

    @cached_property
    def anchor(self) -> Anchor:
        """The resolved anchor prompt."""
        return Anchor.load(self.directory / "anchor.json")

    def corpus(self, part: str) -> Corpus:
        """The corpus of a part, such as ``task_train``."""
        return self._corpora.setdefault(part, Corpus(self.directory / f"{part}.parquet"))

    def seen(self, part: str, rows: IntArray, look: Look) -> list[Example]:
        """The examples of ``rows`` as a model sees them, in that order."""
        shown = []
        for example in self.corpus(part).examples(rows):
            system, prompt = apply_anchor(
                look.anchor, self.anchor, example.prompt, example.system, look.random_text
            )
            shown.append(with_shots(example._replace(system=system, prompt=prompt), look.shots))
        return shown

    def encoded(self, part: str, rows: IntArray, look: Look, *, is_task: bool) -> EncodedExamples:
        """The examples of ``rows`` as tokens, in that order."""
        look = self._same_text(look)
        kept = self._rendered.get((part, look), {})
        found = {row: kept[row] for row in rows.tolist() if row in kept}
        missing = np.asarray([row for row in rows.tolist() if row not in found], dtype=np.int64)
        if len(missing):
            fresh = self.renderer.encode(self.seen(part, missing, look))
            arrays = [(np.asarray(ids, dtype=np.int32), start) for ids, start in fresh]
            new = dict(zip(missing.tolist(), arrays, strict=True))
            self._keep(part, look, new)
            found |= new
        return from_lists([found[row] for row in rows.tolist()], is_task)

    def random_text(self, seed: int) -> str:
        """Random text as long as the anchor prompt."""
        if seed not in self._random_texts:
            tokenizer, num_tokens = self.renderer.tokenizer, self.anchor.num_tokens
            self._random_texts[seed] = random_anchor(tokenizer, num_tokens, seed)
        return self._random_texts[seed]

    def _same_text(self, look: Look) -> Look:
        """One look for both where the anchor prompt is the task's own instruction."""
        anchor = self.anchor
        is_own = anchor.position == "before" and anchor.text == anchor.own_instruction
        return look._replace(anchor="own") if is_own and look.anchor == "anchor" else look

    def _keep(self, part: str, look: Look, rendered: dict[int, _Rendered]) -> None:
        num_tokens = sum(len(ids) for ids, _ in rendered.values())
        if self._num_kept_tokens + num_tokens > _MAX_KEPT_TOKENS:
            self._rendered.clear()
            self._num_kept_tokens = 0
        if num_tokens <= _MAX_KEPT_TOKENS:
            self._rendered.setdefault((part, look), {}).update(rendered)
            self._num_kept_tokens += num_tokens


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
