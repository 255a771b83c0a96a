"""What probes cost beside training: cells of the demo's grid, traced on few and on many tokens.

Steps spread over a training and a probe of each set are timed in turn, in CPU seconds, so that what
else the machine does hits both; a probe costs the median over rounds of their ratio. Shares of a
training's own time follow from its numbers of steps and probes, with and without the losses of the
untrained model that an earlier training of the same process has left.

    python benchmarks/probes.py --world runs/demo/stages/world-...
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tell_core.data.encoding import EncodedExamples, Mixture
from tell_core.pipeline import curate_stage, mix_stage, settled
from tell_core.spec.cells import Cell, plan_cells
from tell_core.spec.loading import load_spec
from tell_core.spec.model import TrainingSpec
from tell_core.training.devices import resolve_precision
from tell_core.training.loop import read_inputs
from tell_core.training.models import load_model
from tell_core.training.probes import num_affordable_probes
from tell_core.training.trainer import Trainer

CPU = torch.device("cpu")
TRAINING = TrainingSpec(
    method="full", learning_rate=2e-3, epochs=12, batch_size=16, num_probes=16, device="cpu"
)
LIMITED = TRAINING.model_copy(update={"probe_share": 0.1})
_FEW_ITEMS = 32  # the demo's, of the task and as many general
_STEPS = 10  # of a round


def main() -> None:
    """Time every cell of one seed, print JSON."""
    arguments = _parse()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        cells = _mixtures(arguments.world, Path(directory) / "few", _FEW_ITEMS)
        many = _mixtures(arguments.world, Path(directory) / "many", arguments.items)[0][1]
        base = load_model(str(arguments.world / "base" / "model"), is_full=True, device=CPU)
        found = []
        for cell, inputs in cells:
            mixture, few = read_inputs(inputs, base.model)
            probes = {"few": few, "many": EncodedExamples.load(many / "probe.safetensors")}
            model = copy.deepcopy(base.model).requires_grad_(True).train()
            found.append({"cell": cell.label} | _timed(model, mixture, probes, arguments.rounds))
            print(json.dumps(found[-1]), flush=True)
    print(json.dumps(_together(found), indent=1))


def _timed(
    model: Any, mixture: Mixture, probes: dict[str, EncodedExamples], rounds: int
) -> dict[str, Any]:
    """How many steps' time a probe of each set takes, and the shares that follow."""
    precision = resolve_precision("auto", CPU, TRAINING.method)
    trainers = {
        name: Trainer(model, mixture, probe, TRAINING, 0, CPU, precision)
        for name, probe in probes.items()
    }
    trainer, ratios = trainers["few"], {name: [] for name in probes}
    steps = []
    with trainer.engine.attended():
        for number in range(rounds + 1):  # the first warms up
            steps.append(_cpu_seconds(_some_steps, trainer, number) / _STEPS)
            for name, of_set in trainers.items():
                ratios[name].append(_cpu_seconds(of_set._token_losses) / steps[-1])
    found: dict[str, Any] = {
        "steps": trainer.num_steps,
        "step_seconds": statistics.median(steps[1:]),
    }
    for name, probe in probes.items():
        ratio = statistics.median(ratios[name][1:])
        found[name] = {"tokens": int(probe.supervised_counts.sum()), "steps_per_probe": ratio}
        for limit, training in (("unlimited", TRAINING), ("limited", LIMITED)):
            count = num_affordable_probes(mixture, probe, training)
            share = ratio / trainer.num_steps
            found[name][limit] = {
                "probes": count, "before": count * share, "after": (count - 1) * share,
            }  # fmt: skip
    return found


def _some_steps(trainer: Trainer, number: int) -> None:
    """Steps spread over the training, others in every round."""
    for index in range(_STEPS):
        at = index * trainer.num_steps // _STEPS + number
        trainer.progress.step = at % trainer.num_steps
        trainer.train_step()


def _together(found: list[dict[str, Any]]) -> dict[str, float]:
    """Probe seconds of all cells over training seconds of all."""
    seconds = [one["steps"] * one["step_seconds"] for one in found]
    return {
        f"{name}, {limit}, {when}": sum(
            one[name][limit][when] * own for one, own in zip(found, seconds, strict=True)
        )
        / sum(seconds)
        for name in ("few", "many")
        for limit in ("unlimited", "limited")
        for when in ("before", "after")
    }


def _cpu_seconds(work: Callable[..., object], *arguments: Any) -> float:
    started = time.process_time()
    work(*arguments)
    return time.process_time() - started


def _mixtures(world: Path, root: Path, items: int) -> list[tuple[Cell, Path]]:
    """Cells of the first seed that are trained, with their inputs; as many items of each kind."""
    settings = [f"world={world}", f"task.dev_examples={items}"]
    settings += [f"curation.general_heldout_examples={items}"]
    spec = load_spec(Path("configs/demo.yaml"), settings)
    spec = settled(spec, TRAINING.candidates[0])
    curated = curate_stage(spec, root)
    cells = [cell for cell in plan_cells(spec) if cell.arm != "base" and cell.seed == 0]
    return [(cell, mix_stage(spec, cell, curated).path) for cell in cells]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--world", type=Path, required=True, help="a world stage of the demo")
    parser.add_argument("--items", type=int, default=138, help="of the task, and as many general")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    main()
