"""Publishing to and loading from a stand-in Hub, with the real client in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

# One process with the real client serves all tests, since importing it takes seconds; it reads
# requests as JSON lines and answers likewise.
WORKER = """
import contextlib, io, json, os, sys, traceback
from deqzoo.cli import run
for line in sys.stdin:
    request = json.loads(line)
    os.environ["HF_TOKEN"] = request["token"]
    sys.argv = ["worker", *request["arguments"]]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if request["script"]:
                exec(request["script"], {})
            else:
                code = run(request["arguments"])
        except BaseException:
            traceback.print_exc()
            code = 1
    answer = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
    print(json.dumps(answer), flush=True)
"""

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

IMPATIENT = """
import sys
from deqzoo.cli import run
from deqzoo.hub import publish
usual, publish.TIME_LIMIT_SECONDS = publish.TIME_LIMIT_SECONDS, 1.0
try:
    if run(sys.argv[1:]):
        raise SystemExit("refused")
finally:
    publish.TIME_LIMIT_SECONDS = usual
"""

TERMINAL = """
import os, pty, sys, termios, threading
from huggingface_hub.utils import disable_progress_bars
from deqzoo.cli import run
master, slave = pty.openpty()
termios.tcsetwinsize(slave, (24, 100))
shown = []
def read():
    while True:
        try:
            shown.append(os.read(master, 65536))
        except OSError:  # the other end is closed
            return
reader = threading.Thread(target=read)
reader.start()
usual, sys.stderr = sys.stderr, open(slave, "w")
try:
    code = run(sys.argv[1:])
finally:
    sys.stderr.close()
    sys.stderr = usual
    disable_progress_bars()
reader.join(60)
print(b"".join(shown).decode())
if code:
    raise SystemExit(code)
"""

PUSH = """
import sys
from deqzoo import DEQModel
DEQModel.from_pretrained(sys.argv[1]).push_to_hub("org/pushed")
"""


@dataclass(frozen=True)
class Done:
    """What a request to the worker gave."""

    code: int
    out: str
    err: str


class Client:
    """A process whose Hugging Face libraries talk to the stand-in."""

    def __init__(self, url: str, home: Path) -> None:
        self.home = home
        environment = os.environ | {
            "HF_ENDPOINT": url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            # The client's own limits of ten seconds are too short for a busy machine.
            "HF_HUB_ETAG_TIMEOUT": "300",
            "HF_HUB_DOWNLOAD_TIMEOUT": "300",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, *arguments: object, script: str = "", token: str = hub_double.TOKEN) -> Done:
        """Run a command of the command line, or a script with arguments, in a clean cache."""
        shutil.rmtree(self.home, ignore_errors=True)
        request = {"arguments": [*map(str, arguments)], "script": script, "token": token}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Done(**json.loads(self.process.stdout.readline()))

    def publish(self, folder: Path, *more: str, token: str = hub_double.TOKEN) -> Done:
        """Publish a folder as REPOSITORY."""
        return self("publish", folder, "--repo-id", REPOSITORY, *more, token=token)


@pytest.fixture(scope="module")
def server() -> Iterator[hub_double.HubDouble]:
    server = hub_double.HubDouble()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def client(server: hub_double.HubDouble, tmp_path_factory) -> Iterator[Client]:
    client = Client(server.url, tmp_path_factory.mktemp("cache") / "home")
    yield client
    client.process.stdin.close()
    client.process.wait(timeout=300)


@pytest.fixture
def hub(server: hub_double.HubDouble) -> hub_double.HubDouble:
    """The stand-in without repositories and faults."""
    server.reset()
    return server


@pytest.fixture
def sealed(tiny_mdeq: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_mdeq, tmp_path / "mdeq-test"))
    assert run(["seal", str(folder)]) == 0
    return folder


def test_round_trip(hub: hub_double.HubDouble, client: Client, sealed: Path) -> None:
    done = client.publish(sealed)
    assert done.code == 0, done.err
    files = hub.files(REPOSITORY)
    assert files["model.safetensors"] == (sealed / "model.safetensors").read_bytes()
    assert files["README.md"].startswith(b"---\n")
    assert f'from_pretrained("{REPOSITORY}")' in files["README.md"].decode()
    assert "deqzoo/mdeq-test" not in files["README.md"].decode()
    tag = f"v{deqzoo.__version__}"
    assert hub.files(REPOSITORY, tag) == files
    commits = hub.n_commits
    assert client.publish(sealed).code == 0
    assert hub.n_commits == commits  # nothing had changed

    loaded = client(REPOSITORY, "main", tag, "v9", script=LOAD)
    first, second, missing = loaded.out.splitlines()
    assert first.startswith("MDEQForImageClassification") and first == second, loaded.err
    assert "no revision 'v9'" in missing
    verified = client("verify", REPOSITORY)
    assert verified.code == 0 and f"{REPOSITORY}: ok" in verified.out, verified


def test_a_terminal_sees_the_upload_advance(
    hub: hub_double.HubDouble, client: Client, sealed: Path
) -> None:
    done = client("publish", sealed, "--repo-id", REPOSITORY, script=TERMINAL)
    assert done.code == 0, done.err
    assert "model.safetensors" in done.out and "100%" in done.out, done
    hub.reset()
    quiet = client.publish(sealed)
    assert quiet.code == 0 and "%" not in quiet.out + quiet.err


def test_publishing_again_replaces(
    hub: hub_double.HubDouble, client: Client, sealed: Path, tmp_path: Path
) -> None:
    """A model that shrank, with files of other people and of an evaluation beside it."""
    sharded = Path(shutil.copytree(sealed, tmp_path / "sharded" / "mdeq-test"))
    deqzoo.DEQModel.from_pretrained(sealed).save_pretrained(sharded, max_shard_size="8KB")
    (sharded / "model.safetensors").unlink(missing_ok=True)
    (sharded / "extra.json").write_text("{}")
    assert run(["seal", str(sharded)]) == 0
    assert client.publish(sharded).code == 0
    tag = f"v{deqzoo.__version__}"
    first, before = hub.refs[REPOSITORY][tag], hub.files(REPOSITORY)
    theirs = {".gitattributes": b"*.bin lfs", "docs/guide.md": b"How to"}
    rendered = {"evaluation/old.json": b"{}", "mdeq-test-budget.svg": b"<svg/>"}
    hub.commit(REPOSITORY, "main", hub.files(REPOSITORY) | theirs | rendered)

    done = client.publish(sealed)
    assert done.code == 0, done.err
    assert "model.safetensors.index.json" in done.out
    files = hub.files(REPOSITORY)
    assert files.items() >= theirs.items() and not rendered.keys() & files.keys()
    assert [name for name in files if name.endswith(".safetensors")] == ["model.safetensors"]
    assert "extra.json" not in files and "model.safetensors.index.json" not in files
    # A tag names the same files for ever; what differs is its next edition, and branches have none.
    assert hub.refs[REPOSITORY][tag] == first and hub.files(REPOSITORY, tag) == before
    assert f"tag {tag}-2" in done.out and hub.files(REPOSITORY, f"{tag}-2") == files
    assert f"tag {tag}-2" in client.publish(sealed).out  # nothing new, so no third one
    assert client.publish(sharded, "--revision", "trial").code == 0
    assert "extra.json" in hub.files(REPOSITORY, "trial")
    assert {name for name in hub.refs[REPOSITORY] if name.startswith("v")} == {tag, f"{tag}-2"}


def test_renderings_do_not_spoil_the_seal(
    hub: hub_double.HubDouble, client: Client, sealed: Path
) -> None:
    assert client.publish(sealed).code == 0
    rendered = {".eval_results/deqzoo.yaml": b"[]", "mdeq-test-budget.svg": b"<svg/>"}
    hub.commit(REPOSITORY, "main", hub.files(REPOSITORY) | rendered)
    done = client("verify", REPOSITORY)
    assert done.code == 0, done


def test_branches_and_private_repositories(
    hub: hub_double.HubDouble, client: Client, sealed: Path
) -> None:
    done = client.publish(sealed, "--private", "--revision", "trial")
    assert done.code == 0, done.err
    assert hub.private[REPOSITORY] and "config.json" in hub.files(REPOSITORY, "trial")
    assert hub.files(REPOSITORY, "main") == {}
    hidden = client(REPOSITORY, "trial", script=LOAD, token="hf_other")
    assert "no repository" in hidden.out and "private" in hidden.out
    shown = client(REPOSITORY, "trial", script=LOAD)
    assert shown.out.startswith("MDEQForImageClassification"), shown.err


def test_wrong_token_and_missing_repository(
    hub: hub_double.HubDouble, client: Client, sealed: Path
) -> None:
    done = client.publish(sealed, token="hf_wrong")
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "HF_TOKEN" in done.err and REPOSITORY not in hub.refs
    absent = client("org/absent", script=LOAD)
    assert "the Hub has no repository org/absent" in absent.out


def test_interrupted_upload_commits_nothing(
    hub: hub_double.HubDouble, client: Client, sealed: Path
) -> None:
    hub.refuse_uploads = True
    done = client.publish(sealed)
    assert done.code == 2 and "nothing was committed" in done.err.splitlines()[-1]
    assert hub.files(REPOSITORY) == {}
    hub.refuse_uploads = False
    assert client.publish(sealed).code == 0
    assert "model.safetensors" in hub.files(REPOSITORY)


def test_refused_tag_is_told_from_a_refused_upload(
    hub: hub_double.HubDouble, client: Client, sealed: Path
) -> None:
    hub.refuse_tags = True
    done = client.publish(sealed)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "refused the tag v" in done.err and "are uploaded" in done.err
    assert "model.safetensors" in hub.files(REPOSITORY)


def test_a_refused_tag_leaves_the_old_one(
    hub: hub_double.HubDouble, client: Client, sealed: Path
) -> None:
    assert client.publish(sealed).code == 0
    tag = f"v{deqzoo.__version__}"
    before = hub.refs[REPOSITORY][tag]
    (sealed / "extra.json").write_text("{}")
    assert run(["seal", str(sealed)]) == 0
    hub.refuse_tags = True
    done = client.publish(sealed)
    assert done.code == 2 and "are uploaded" in done.err
    assert hub.refs[REPOSITORY][tag] == before != hub.refs[REPOSITORY]["main"]
    hub.refuse_tags = False
    assert client.publish(sealed).code == 0  # the files are there; the tag follows
    assert hub.refs[REPOSITORY][f"{tag}-2"] == hub.refs[REPOSITORY]["main"]


def test_refused_from_any_request_on_leaves_the_old_files_or_the_new_ones(
    hub: hub_double.HubDouble, client: Client, sealed: Path
) -> None:
    """And the same command again ends with the new ones, tagged, whatever was there."""
    assert client.publish(sealed).code == 0
    refs, old = dict(hub.refs[REPOSITORY]), hub.files(REPOSITORY)
    (sealed / "extra.json").write_text("{}")
    assert run(["seal", str(sealed)]) == 0
    left = []
    for answers in range(100):
        hub.refs[REPOSITORY] = dict(refs)
        hub.objects.clear()
        hub.answers = answers
        done = client.publish(sealed)
        hub.answers = None
        files = hub.files(REPOSITORY)
        left.append("extra.json" in files)
        assert left[-1] or files == old
        if done.code == 0:
            break
        assert done.code == 2 and len(done.err.splitlines()) == 1, done.err
        assert ("(the files are uploaded)" in done.err) <= left[-1]
        if left[-1] or answers % 4 == 0:
            assert client.publish(sealed).code == 0
            assert hub.files(REPOSITORY, f"v{deqzoo.__version__}-2") == hub.files(REPOSITORY)
            assert "extra.json" in hub.files(REPOSITORY)
    assert left == sorted(left) and not left[0] and left[-1] and len(left) > 6


@pytest.mark.parametrize("fault", ["lose_answer", "hang"])
def test_a_lost_answer_is_asked_for(
    hub: hub_double.HubDouble, client: Client, sealed: Path, fault: str
) -> None:
    """The commit is there although its answer never came; nothing else is said."""
    setattr(hub, fault, True)
    done = client("publish", sealed, "--repo-id", REPOSITORY, script=IMPATIENT)
    assert done.code == 0, done.err
    assert hub.refs[REPOSITORY]["main"] in done.out and "interrupted" not in done.err
    assert hub.refs[REPOSITORY][f"v{deqzoo.__version__}"] == hub.refs[REPOSITORY]["main"]
    assert "model.safetensors" in hub.files(REPOSITORY)


def test_of_two_uploads_at_once_one_wins_and_one_says_so(
    hub: hub_double.HubDouble, client: Client, sealed: Path
) -> None:
    assert client.publish(sealed).code == 0
    (sealed / "extra.json").write_text("{}")
    assert run(["seal", str(sealed)]) == 0
    theirs = {"config.json": b"theirs"}
    hub.before_commit = lambda: hub.commit(REPOSITORY, "main", theirs)
    done = client.publish(sealed)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert "somebody else changed org/mdeq-test (main) during this upload" in done.err
    assert hub.files(REPOSITORY) == theirs
    hub.before_commit = lambda: None
    assert client.publish(sealed).code == 0
    assert "extra.json" in hub.files(REPOSITORY)


def test_of_two_clients_at_once_one_wins_and_one_says_so(
    hub: hub_double.HubDouble, client: Client, sealed: Path, tmp_path: Path
) -> None:
    """Both have seen the same state when they commit; then the loser's second try is the next."""
    assert client.publish(sealed).code == 0
    other = Path(shutil.copytree(sealed, tmp_path / "other" / "mdeq-test"))
    for folder, text in ((sealed, "{}"), (other, "[]")):
        (folder / "extra.json").write_text(text)
        assert run(["seal", str(folder)]) == 0
    second = Client(hub.url, tmp_path / "home")
    both = threading.Barrier(2)
    hub.before_commit = lambda: both.wait(300)
    try:
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(client.publish, sealed), pool.submit(second.publish, other)]
            done = [one.result() for one in asked]
        assert sorted(one.code for one in done) == [0, 2]
        lost = [one.code for one in done].index(2)
        (line,) = done[lost].err.splitlines()
        assert f"somebody else changed {REPOSITORY} (main) during this upload" in line
        texts = [b"{}", b"[]"]
        assert hub.files(REPOSITORY)["extra.json"] == texts[1 - lost]
        hub.before_commit = lambda: None
        again = (client, second)[lost].publish((sealed, other)[lost])
        assert again.code == 0 and hub.files(REPOSITORY)["extra.json"] == texts[lost]
        assert f"tag v{deqzoo.__version__}-3" in again.out
    finally:
        second.process.stdin.close()
        second.process.wait(timeout=300)


@pytest.mark.parametrize(
    "token", ["hf_secret\nhf_more", "hf_secret hf_more", "hf_sécret", "hf_secret"]
)
def test_no_message_holds_a_token(
    hub: hub_double.HubDouble, client: Client, sealed: Path, token: str
) -> None:
    hub.refuse_uploads = True
    for more in ((), ("--token", token)):
        done = client.publish(sealed, *more, token=token)
        assert done.code == 2 and len(done.err.splitlines()) == 1, done.err
        assert "cret" not in done.err and "more" not in done.err
        assert REPOSITORY not in hub.refs


def test_corrupted_download_is_found(
    hub: hub_double.HubDouble, client: Client, sealed: Path
) -> None:
    assert client.publish(sealed).code == 0
    hub.corrupt = "model.safetensors"
    done = client("verify", REPOSITORY)
    assert done.code == 2 and "model.safetensors has changed" in done.out


def test_push_to_hub(hub: hub_double.HubDouble, client: Client, sealed: Path) -> None:
    done = client(sealed, script=PUSH)
    assert done.code == 0, done.err
    loaded = client("org/pushed", script=LOAD)
    assert loaded.out.startswith("MDEQForImageClassification"), loaded.err


def test_dry_run_lists_files_and_sends_nothing(sealed: Path, capsys) -> None:
    (sealed / "training_args.bin").write_bytes(b"a pickle")
    arguments = ["publish", str(sealed), "--repo-id", REPOSITORY, "--dry-run"]
    capsys.readouterr()
    assert run(arguments) == 0
    listed = capsys.readouterr().out
    assert "model.safetensors" in listed and "README.md" in listed and ".bin" not in listed
    (sealed / "config.json").write_text("{}")
    assert run(arguments) == 2


@pytest.mark.parametrize("name", ["a b", "org/two/parts", "org/..", "alone"])
def test_dry_run_refuses_what_is_no_repository_name(sealed: Path, capsys, name: str) -> None:
    capsys.readouterr()
    assert run(["publish", str(sealed), "--repo-id", name, "--dry-run"]) == 2
    assert "write ORG/NAME" in capsys.readouterr().err


def test_verify_refuses_foreign_models(tmp_path: Path, capsys) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert run(["verify", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "model type 'bert'" in said and len(said.splitlines()) == 1
