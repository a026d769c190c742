"""Publishing to and loading from a stand-in Hub, with the real client in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import deqzoo
from deqzoo.cli import run

_SPEC = importlib.util.spec_from_file_location(
    "hub_double", Path(__file__).with_name("hub_double.py")
)
hub_double = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(hub_double)

REPOSITORY = "org/mdeq-test"


@pytest.fixture
def hub() -> Iterator[hub_double.HubDouble]:
    server = hub_double.HubDouble()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def sealed(tiny_mdeq: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_mdeq, tmp_path / "mdeq-test"))
    assert run(["seal", str(folder)]) == 0
    return folder


def client(
    hub: hub_double.HubDouble, home: Path, *command: object, token: str = hub_double.TOKEN
) -> subprocess.CompletedProcess[str]:
    """Run the command line with its own cache against the stand-in."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": token,
    }
    arguments = [sys.executable, *map(str, command)]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=120)


def publish(hub: hub_double.HubDouble, home: Path, folder: Path, *more: str, **keywords: str):
    return client(
        hub, home, "-m", "deqzoo", "publish", folder, "--repo-id", REPOSITORY, *more, **keywords
    )


LOAD = """
import sys
from deqzoo import DEQModel, UserError
for revision in sys.argv[2:] or [None]:
    try:
        model = DEQModel.from_pretrained(sys.argv[1], revision=revision)
        print(type(model).__name__, model.num_parameters())
    except UserError as error:
        print("refused:", error)
"""


def test_round_trip(hub: hub_double.HubDouble, sealed: Path, tmp_path: Path) -> None:
    done = publish(hub, tmp_path / "a", sealed)
    assert done.returncode == 0, done.stderr
    files = hub.files(REPOSITORY)
    assert files["model.safetensors"] == (sealed / "model.safetensors").read_bytes()
    assert files["README.md"].startswith(b"---\n") and b"model_name" not in files["config.json"]
    assert hub.files(REPOSITORY, f"v{deqzoo.__version__}") == files
    commits = hub.n_commits
    assert publish(hub, tmp_path / "a", sealed).returncode == 0
    assert hub.n_commits == commits  # nothing had changed

    tag = f"v{deqzoo.__version__}"
    loaded = client(hub, tmp_path / "b", "-c", LOAD, REPOSITORY, "main", tag, "v9")
    first, second, missing = loaded.stdout.splitlines()
    assert first.startswith("MDEQForImageClassification") and first == second, loaded.stderr
    assert "no revision 'v9'" in missing
    verified = client(hub, tmp_path / "c", "-m", "deqzoo", "verify", REPOSITORY)
    assert verified.returncode == 0 and f"{REPOSITORY}: ok" in verified.stdout, verified.stdout


def test_branches_and_private_repositories(
    hub: hub_double.HubDouble, sealed: Path, tmp_path: Path
) -> None:
    done = publish(hub, tmp_path / "a", sealed, "--private", "--revision", "trial")
    assert done.returncode == 0, done.stderr
    assert hub.private[REPOSITORY] and "config.json" in hub.files(REPOSITORY, "trial")
    assert hub.files(REPOSITORY, "main") == {}
    hidden = client(hub, tmp_path / "b", "-c", LOAD, REPOSITORY, "trial", token="hf_other")
    assert "no repository" in hidden.stdout and "private" in hidden.stdout
    shown = client(hub, tmp_path / "b", "-c", LOAD, REPOSITORY, "trial")
    assert shown.stdout.startswith("MDEQForImageClassification"), shown.stderr


def test_wrong_token_and_missing_repository(
    hub: hub_double.HubDouble, sealed: Path, tmp_path: Path
) -> None:
    done = publish(hub, tmp_path, sealed, token="hf_wrong")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "HF_TOKEN" in done.stderr and REPOSITORY not in hub.refs
    absent = client(hub, tmp_path, "-c", LOAD, "org/absent")
    assert "the Hub has no repository org/absent" in absent.stdout


def test_interrupted_upload_commits_nothing(
    hub: hub_double.HubDouble, sealed: Path, tmp_path: Path
) -> None:
    hub.refuse_uploads = True
    done = publish(hub, tmp_path, sealed)
    assert done.returncode == 2 and "nothing was committed" in done.stderr.splitlines()[-1]
    assert hub.files(REPOSITORY) == {}
    hub.refuse_uploads = False
    assert publish(hub, tmp_path, sealed).returncode == 0
    assert "model.safetensors" in hub.files(REPOSITORY)


def test_corrupted_download_is_found(
    hub: hub_double.HubDouble, sealed: Path, tmp_path: Path
) -> None:
    assert publish(hub, tmp_path / "a", sealed).returncode == 0
    hub.corrupt = "model.safetensors"
    done = client(hub, tmp_path / "b", "-m", "deqzoo", "verify", REPOSITORY)
    assert done.returncode == 2 and "model.safetensors has changed" in done.stdout


def test_push_to_hub(hub: hub_double.HubDouble, sealed: Path, tmp_path: Path) -> None:
    script = (
        "import sys\nfrom deqzoo import DEQModel\n"
        "DEQModel.from_pretrained(sys.argv[1]).push_to_hub('org/pushed')\n"
    )
    done = client(hub, tmp_path / "a", "-c", script, sealed)
    assert done.returncode == 0, done.stderr
    loaded = client(hub, tmp_path / "b", "-c", LOAD, "org/pushed")
    assert loaded.stdout.startswith("MDEQForImageClassification"), loaded.stderr


def test_dry_run_lists_files_and_sends_nothing(sealed: Path, capsys) -> None:
    (sealed / "training_args.bin").write_bytes(b"a pickle")
    arguments = ["publish", str(sealed), "--repo-id", REPOSITORY, "--dry-run"]
    capsys.readouterr()
    assert run(arguments) == 0
    listed = capsys.readouterr().out
    assert "model.safetensors" in listed and "README.md" in listed and ".bin" not in listed
    (sealed / "config.json").write_text("{}")
    assert run(arguments) == 2
