"""The model that MLflow serves: base model, trained weights and anchor prompt together.

MLflow runs this file when a version is loaded. The version holds the trained weights and the
report card, not the base model; the base is checked against the digest of the one trained on.
"""

import warnings
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd

from tell_core.data.anchors import Anchor, apply_anchor, random_anchor
from tell_core.data.rendering import ChatRenderer, Example
from tell_core.errors import ModelError
from tell_core.evaluation.generation import generate_greedy
from tell_core.spec.arms import parse_arm
from tell_core.store import read_json
from tell_core.training.devices import resolve_precision
from tell_core.training.models import LoadedModel, full_model, load_model, load_trained

# MLflow advises type hints on `predict`; it would derive a signature from them and drop ours.
warnings.filterwarnings("ignore", message="(?s).*Add type hints", category=UserWarning)


class AnchoredModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Answers prompts of the task: the anchor prompt is added here, not by the caller."""

    def load_context(self, context: Any) -> None:
        """Load base model, tokenizer and trained weights.

        Raises:
            ModelError: The base model found is not the one that was trained on.
        """
        config = context.model_config
        trained, version = (Path(context.artifacts[name]) for name in ("trained", "version"))
        full = full_model(trained)
        base = load_model(
            str(full or config["base_model"]),
            revision=None if full else config["base_revision"],
            dtype=config["dtype"],
            is_full=full is not None,
        )
        if full is None:
            _check_base(base, read_json(version / "report_card.json")["base_digest"])
        self.model = base.model if full else load_trained(base, trained)
        self.device = base.model.device
        self.precision = resolve_precision(config["dtype"], self.device, "full" if full else "lora")
        self.renderer = ChatRenderer(base.tokenizer, config["chat_template"])
        self.anchor = Anchor.load(version / "anchor.json")
        self.arm = parse_arm(config["arm"])
        num_tokens = self.anchor.num_tokens if self.arm.task_anchor == "random" else 0
        self.random_text = random_anchor(base.tokenizer, num_tokens, config["anchor_seed"])
        self.max_new_tokens = int(config["max_new_tokens"])
        self.batch_size = int(config["batch_size"])
        self.stop = tuple(config["stop"])

    def predict(self, context: Any, model_input, params: Any = None) -> pd.DataFrame:  # type: ignore[no-untyped-def] # noqa: ARG002
        """Answer each bare prompt of column ``prompt``; one column ``response`` comes back."""
        prompts = [self._anchored(str(prompt)) for prompt in model_input["prompt"]]
        turn_end = self.renderer.encode([Example("", "x")])[0][0][-1]
        with self.precision.autocast(self.device):
            answers = generate_greedy(
                self.model,
                self.renderer.tokenizer,
                [np.asarray(ids) for ids in self.renderer.prompt_ids(prompts)],
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                device=self.device,
                stop_ids={turn_end},
                stop=self.stop,
            )
        return pd.DataFrame({"response": answers})

    def _anchored(self, prompt: str) -> Example:
        system, text = apply_anchor(
            self.arm.task_anchor, self.anchor, prompt, None, self.random_text
        )
        return Example(prompt=text, system=system)


def _check_base(base: LoadedModel, wanted: str) -> None:
    if base.digest != wanted:
        raise ModelError(
            f"the base model {base.id} has digest {base.digest[:12]}, but this version was trained"
            f" on {wanted[:12]}: give the right one, as a directory or hub id, in"
            " `mlflow.pyfunc.load_model(…, model_config={'base_model': …})`"
        )


mlflow.models.set_model(AnchoredModel())
