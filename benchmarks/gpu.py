"""What a GPU machine can tell, with one command: its tests, then its benchmarks.

Writes DIRECTORY/result.json and result.md (hardware, versions, what each step found) and a log for
each step. A step that fails or is not possible stops no other; the exit code is 1 when one failed.
Everything ends after --seconds, by default half a minute before ten minutes are over, and no step
can take the time of one that an aim hangs on. Needs no network and what
`tests/tell_core/training/test_gpu.py` names; with a model directory and a mixture for it (`inputs/`
of a bundle), it measures more; with trl it compares.

    make gpu GPU_OUT=DIRECTORY GPU_MODEL=MODEL GPU_MIXTURE=BUNDLE/inputs
    python benchmarks/gpu.py --out DIRECTORY --device cpu     # tiny shapes: does it work at all?
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/tell_core/training/test_gpu.py"
_VERSIONED = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl")
_UTILISATION = (
    "Aim: model_flops_utilisation of at least 0.45, by the convention of tell_core/training/"
    "telemetry.py: 6 operations per parameter and token, of which adapters need about 4, output"
    " layer at supervised tokens only, over the dense bfloat16 peak of the data sheet. What takes"
    " the rest is share_of_time, of wall time: mm is matrix products, idle a GPU that waits"
)
_TRL = (
    "Aim: tell_is_faster_by trl_padded at least 3. Gradient checkpointing, on by default in"
    " SFTTrainer, is off, which favours SFTTrainer"
)


@dataclass(frozen=True)
class Step:
    """One thing to run.

    Attributes:
        name: Of its log, and its heading.
        arguments: Of this Python.
        seconds: After which it is given up; on a CPU, where memory is measured in processes of
            their own, it may take all the time that is left.
        obstacle: Why it cannot be run; None when it can.
        aim: What it should show, and how that is counted.
    """

    name: str
    arguments: list[str]
    seconds: int
    obstacle: str | None = None
    aim: str = ""


def main() -> int:
    """Run the steps, write the results; returns the exit code."""
    arguments = _parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results: dict[str, Any] = {"machine": _machine(), "steps": {}}
    for step in _steps(arguments):
        left = int(arguments.seconds - (time.monotonic() - started))
        seconds = min(step.seconds, left) if arguments.device == "cuda" else left
        results["steps"][step.name] = _run(step, arguments.out, seconds)
        (arguments.out / "result.json").write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "result.md").write_text(_markdown(results))
    print((arguments.out / "result.md").read_text())
    return int(any(step["outcome"] == "failed" for step in results["steps"].values()))


def _steps(arguments: argparse.Namespace) -> list[Step]:
    """Tests first, then what the project promises of a GPU."""
    device, is_cpu = arguments.device, arguments.device == "cpu"
    marked = ["-m", "slow", "-k", "cpu"] if is_cpu else ["-m", "gpu"]
    common = ["benchmarks/training.py", "--device", device]
    shape = ["--shape", "llama-8b", "--vocabulary", "128256", "--dtype", "bfloat16"]
    shape += ["--random-tokens", "2048", "--batch-size", "8", "--steps", "4"]
    if is_cpu:
        shape = ["--shape", "64x2", "--vocabulary", "512", "--random-tokens", "64"]
        shape += ["--batch-size", "4", "--steps", "2"]
    model, mixture = str(arguments.model), str(arguments.mixture)
    ours = ["--pairs", "5", "--engines", "tell"]
    no_model = None if arguments.model else "no model directory was given (--model)"
    no_data = no_model or (None if arguments.mixture else "no mixture was given (--mixture)")
    no_trl = no_data or (None if find_spec("trl") else "trl is not installed")
    real = [*common, "--model", model, "--mixture", mixture, "--batch-size", "16"]
    real += ["--dtype", "float32" if is_cpu else "bfloat16", "--steps", "1" if is_cpu else "8"]
    real += ["--pairs", "1" if is_cpu else "5"]
    saving = ["benchmarks/checkpoints.py", "--model", model, "--device", device]
    return [
        Step("tests", ["-m", "pytest", "-q", "-rs", *marked, TESTS], 240),
        Step("utilisation", [*common, *shape, *ours, "--profile"], 150, None, _UTILISATION),
        Step("trl", [*real, "--engines", "tell", "trl_packing", "trl_padded"], 110, no_trl, _TRL),
        Step("bare-loop", [*real, "--engines", "tell", "bare_loop"], 60, no_data,
             "Aim: tell_is_faster_by bare_loop at least 0.97"),
        Step("checkpoints-lora", [*saving, "--method", "lora"], 60, no_model),
        Step("checkpoints-full", [*saving, "--method", "full", "--repeats", "3"], 90, no_model),
    ]  # fmt: skip


def _run(step: Step, out: Path, seconds: int) -> dict[str, Any]:
    """Run one step; its output goes to a log, the JSON at its end into the result."""
    aim = {"aim": step.aim} if step.aim else {}
    if step.obstacle or seconds <= 0:
        return {"outcome": "not run", "reason": step.obstacle or "no time was left"} | aim
    print(f"{step.name} ...", file=sys.stderr, flush=True)
    log, started = out / f"{step.name}.log", time.monotonic()
    code, reason = _run_logged(step.arguments, log, seconds)
    said = log.read_text(errors="replace")
    found: dict[str, Any] = aim | {
        "outcome": "failed" if code else "done",
        "command": "python " + " ".join(step.arguments),
        "seconds": round(time.monotonic() - started, 1),
    }
    if code:
        return found | {"reason": reason, "end": said.splitlines()[-20:]}
    start = f"\n{said}".rfind("\n{\n")
    if start < 0:
        return found | {"end": said.splitlines()[-12:]}
    # Libraries may say something when they end, after it.
    return found | {"found": json.JSONDecoder().raw_decode(said[start:])[0]}


def _run_logged(arguments: list[str], log: Path, seconds: int) -> tuple[int, str]:
    """Exit code, and what went wrong if it did; nothing of it runs any longer afterwards."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(seconds)
            return code, f"exit code {code}"
        except subprocess.TimeoutExpired:
            return 1, f"not finished after {seconds} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _machine() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "gpus": gpus,
        "gpu_memory_bytes": [
            torch.cuda.get_device_properties(index).total_memory for index in range(len(gpus))
        ],
        "cpu": platform.processor() or platform.machine(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in _VERSIONED},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _markdown(results: dict[str, Any]) -> str:
    """The results as a piece of docs/performance.md."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {one}" for name, one in machine["versions"].items() if one)
    lines = [
        f"{', '.join(machine['gpus']) or 'No GPU'}; {machine['cpu']}, {machine['system']}, Python"
        f" {machine['python']}, CUDA {machine['cuda']}, {versions}.",
    ]
    for name, step in results["steps"].items():
        lines += ["", f"### {name}: {step['outcome']}", ""]
        lines += [f"{step[name]}." for name in ("aim", "reason") if name in step]
        if "command" in step:
            lines += ["```sh", step["command"], "```"]
        if "found" in step:
            lines += ["", "| | |", "|---|---|"]
            lines += [f"| {key} | {_cell(value)} |" for key, value in step["found"].items()]
        if "end" in step:
            lines += ["", "```text", *step["end"], "```"]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_cell(one)}" for key, one in value.items()).replace("|", "/")
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", type=Path, help="a model directory, such as SmolLM2-135M")
    parser.add_argument("--mixture", type=Path, help="a mix stage, or inputs/ of a bundle")
    parser.add_argument("--seconds", type=int, default=570, help="for all steps together")
    arguments = parser.parse_args()
    for name in ("out", "model", "mixture"):
        if path := getattr(arguments, name):
            setattr(arguments, name, path.resolve())
    return arguments


if __name__ == "__main__":
    sys.exit(main())
