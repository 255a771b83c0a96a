"""The model that MLflow serves: base model, trained weights and anchor prompt together.

MLflow runs this file when a version is loaded. The version holds the trained weights and the
report card, not the base model; the base is checked against the digest of the one trained on.
"""

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
from tell_core.training.models import load_model, load_trained


class AnchoredModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc, name-defined]
    """Answers prompts of the task: the anchor prompt is added here, not by the caller."""

    def load_context(self, context: Any) -> None:
        """Load base model, tokenizer and trained weights.

        Raises:
            ModelError: The base model found is not the one that was trained on.
        """
        config = context.model_config
        card = read_json(Path(context.artifacts["report_card"]))
        base = load_model(config["base_model"], revision=config["base_revision"])
        found = base.digest
        if found != card["base_digest"]:
            raise ModelError(
                f"the base model {config['base_model']} has digest {found[:12]}, but this version"
                f" was trained on {card['base_digest'][:12]}: point `model_config['base_model']`"
                " to the right one"
            )
        self.device = base.model.device
        self.model = load_trained(base, Path(context.artifacts["trained"]))
        self.renderer = ChatRenderer(base.tokenizer, config["chat_template"])
        self.anchor = Anchor.load(Path(context.artifacts["anchor"]))
        self.arm = parse_arm(config["arm"])
        self.random_text = random_anchor(
            base.tokenizer, self.anchor.num_tokens, config["anchor_seed"]
        )
        self.max_new_tokens = int(config["max_new_tokens"])
        self.batch_size = int(config["batch_size"])

    # No type hints on model_input: MLflow would derive a signature from them and drop ours.
    def predict(self, context: Any, model_input, params: Any = None) -> pd.DataFrame:  # type: ignore[no-untyped-def] # noqa: ARG002
        """Answer each bare prompt of column ``prompt``; one column ``response`` comes back."""
        prompts = [self._anchored(str(prompt)) for prompt in model_input["prompt"]]
        answers = generate_greedy(
            self.model,
            self.renderer.tokenizer,
            [np.asarray(ids) for ids in self.renderer.prompt_ids(prompts)],
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            device=self.device,
        )
        return pd.DataFrame({"response": answers})

    def _anchored(self, prompt: str) -> Example:
        system, text = apply_anchor(
            self.arm.task_anchor, self.anchor, prompt, None, self.random_text
        )
        return Example(prompt=text, system=system)


mlflow.models.set_model(AnchoredModel())
