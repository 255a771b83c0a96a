"""Can the hidden states of a model tell task prompts from general ones?

A linear probe is cross-validated by document: states of one document are alike whatever their
class, so a probe that has seen the document in training recognises it, not the class. The state is
that of the last prompt token, which comes after the anchor prompt and is the same token (the one
that opens the answer) on every prompt; states on the anchor itself would tell the classes apart by
its words alone.

Shape letters: N states, D hidden size, G documents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tell_core.errors import AnalysisError

if TYPE_CHECKING:
    from torch import nn

    from tell_core.data.encoding import EncodedExamples

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

NUM_FOLDS = 5
MIN_DOCUMENTS = 10
_PROBE_STRENGTH = 0.01  # inverse of the penalty; states have more dimensions than there are states


class Separability(NamedTuple):
    """How well states tell task from general data.

    Attributes:
        auc: Area under the ROC curve over documents held out of the probe; 0.5 is chance.
        p_value: Share of permutations of the classes over documents with an area as large.
        num_documents: G.
    """

    auc: float
    p_value: float
    num_documents: int


def separability(
    states: FloatArray,
    is_task: BoolArray,
    documents: IntArray,
    *,
    num_permutations: int = 100,
    seed: int = 0,
) -> Separability:
    """Cross-validate a linear probe by document, with a permutation test.

    Args:
        states: Shape (N, D).
        is_task: Shape (N,). The class; constant within a document.
        documents: Shape (N,). Document of each state.
        num_permutations: Permutations of the classes over documents.
        seed: Seed of folds and permutations.

    Raises:
        AnalysisError: Fewer than `MIN_DOCUMENTS` documents of one class.
    """
    names, first, place = np.unique(documents, return_index=True, return_inverse=True)
    classes = is_task[first]
    if min(classes.sum(), (~classes).sum()) < MIN_DOCUMENTS:
        raise AnalysisError(
            f"{int(classes.sum())} task and {int((~classes).sum())} general documents; a probe by"
            f" document needs at least {MIN_DOCUMENTS} of each: raise `task.dev_examples` and"
            " `curation.general_heldout_examples`"
        )
    auc = grouped_auc(states, is_task, documents, seed)
    generator = np.random.default_rng(seed)
    drawn = [
        grouped_auc(states, generator.permutation(classes)[place], documents, seed)
        for _ in range(num_permutations)
    ]
    num_as_large = sum(value >= auc for value in drawn)
    return Separability(auc, (1 + num_as_large) / (1 + num_permutations), len(names))


def grouped_auc(states: FloatArray, is_task: BoolArray, documents: IntArray, seed: int) -> float:
    """Area under the curve of a probe that never saw the documents it is tested on."""
    folds = StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    return _held_out_auc(states, is_task, folds.split(states, is_task, documents))


def plain_auc(states: FloatArray, is_task: BoolArray, seed: int) -> float:
    """The same with states of one document on both sides: an overestimate, to be shown as such."""
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    return _held_out_auc(states, is_task, folds.split(states, is_task))


def _held_out_auc(states: FloatArray, is_task: BoolArray, folds: object) -> float:
    """Mean over the folds: scores of different probes have no common scale."""
    areas = []
    for train, test in folds:  # type: ignore[attr-defined]
        if 0 < is_task[test].sum() < len(test) and 0 < is_task[train].sum() < len(train):
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=_PROBE_STRENGTH))
            probe.fit(states[train], is_task[train])
            areas.append(roc_auc_score(is_task[test], probe.decision_function(states[test])))
    return float(np.mean(areas))


def projection(states: FloatArray) -> FloatArray:
    """The two directions of largest variance, shape (N, 2); their signs are fixed."""
    scaled = StandardScaler().fit_transform(states)
    return np.asarray(PCA(2, svd_solver="full").fit_transform(scaled), dtype=np.float64)


def last_prompt_states(model: nn.Module, examples: EncodedExamples, layer: int) -> FloatArray:
    """Hidden state of the last prompt token of each example, shape (N, D).

    Args:
        model: A causal language model.
        examples: Rendered examples; what follows the prompt is left out.
        layer: Number of blocks that the state has passed through.
    """
    import torch

    device = next(model.parameters()).device
    states = []
    with torch.no_grad():
        for row in range(len(examples)):
            prompt = examples.example(row)[: int(examples.response_starts[row])]
            ids = torch.as_tensor(np.asarray(prompt, dtype=np.int64), device=device)[None]
            found = model(input_ids=ids, output_hidden_states=True, use_cache=False)
            states.append(found.hidden_states[layer][0, -1].double().cpu().numpy())
    return np.stack(states)


def document_fixture(seed: int = 0) -> tuple[FloatArray, BoolArray, IntArray]:
    """States with strong effects of their document and none of their class.

    40 documents of 12 states in 64 dimensions, half of them called task at random.

    Returns:
        States (N, D), classes (N,) and documents (N,).
    """
    generator = np.random.default_rng(seed)
    documents = np.repeat(np.arange(40), 12)
    effects = generator.normal(0, 2, (40, 64))
    states = effects[documents] + generator.normal(0, 1, (len(documents), 64))
    is_task = generator.permutation(np.arange(40) < 20)[documents]
    return states, is_task, documents
