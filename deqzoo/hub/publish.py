"""Uploading a checkpoint and its card to the Hub in one commit."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

import deqzoo
from deqzoo.errors import UserError
from deqzoo.hub.cards import eval_results_yaml, plots, render_card
from deqzoo.hub.catalogue import Entry, entry
from deqzoo.hub.integrity import CHECKSUMS, check_checksums, published_files


@dataclass(frozen=True)
class Report:
    """What an upload did or would do."""

    repository: str
    revision: str
    files: dict[str, int]
    tag: str
    commit: str | None

    def __str__(self) -> str:
        size = sum(self.files.values()) / 2**20
        what = f"{len(self.files)} files, {size:.1f} MiB"
        if self.commit is None:
            listed = "".join(f"\n  {name}  {size:,} bytes" for name, size in self.files.items())
            return f"would upload {what} to {self.repository} ({self.revision}){listed}"
        return f"{self.repository}: {what}, commit {self.commit}, tag {self.tag}"


def publish(
    name: str,
    repo_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Report:
    """Upload a sealed checkpoint with its card, and tag the package's version.

    Repeating it changes nothing where the files are the same. Nothing appears in the repository
    unless every file arrived, since all of them are one commit.

    Args:
        name: zoo name or local folder.
        repo_id: repository on the Hub, ORG/NAME; created if it does not exist.
        private: whether a new repository is private.
        dry_run: only collect and check the files.
        revision: branch to upload to, created from main if it does not exist; main by default.
        token: access token; the stored one or HF_TOKEN if None.

    Raises:
        UserError: files that differ from their checksums, or a refusal of the Hub.
    """
    found = entry(name)
    faults = check_checksums(found.folder)
    if faults:
        raise UserError(f"{found.name} is not as sealed: {'; '.join(faults)}")
    contents = _contents(found)
    tag = f"v{deqzoo.__version__}"
    files = {
        path: len(source) if isinstance(source, bytes) else source.stat().st_size
        for path, source in contents.items()
    }
    branch = revision or "main"
    if dry_run:
        return Report(repo_id, branch, files, tag, None)
    operations = [
        CommitOperationAdd(path, io.BytesIO(source) if isinstance(source, bytes) else str(source))
        for path, source in contents.items()
    ]
    commit = upload(HfApi(token=token), repo_id, operations, branch, private, tag)
    return Report(repo_id, branch, files, tag, commit)


def _contents(found: Entry) -> dict[str, Path | bytes]:
    """Repository path -> file or content, the card included."""
    contents: dict[str, Path | bytes] = {
        path.as_posix(): found.folder / path for path in published_files(found.folder)
    }
    contents[CHECKSUMS] = found.folder / CHECKSUMS
    contents["README.md"] = render_card(found).encode()
    contents |= {file: plot.encode() for file, plot in plots(found).items()}
    results = eval_results_yaml(found)
    if results is not None:
        contents[".eval_results/deqzoo.yaml"] = results.encode()
    return contents


def upload(
    api: HfApi,
    repo_id: str,
    operations: list[CommitOperationAdd],
    branch: str = "main",
    private: bool = False,
    tag: str | None = None,
    kind: Literal["model", "space"] = "model",
) -> str:
    """Create the repository, commit and tag; the commit's id.

    Raises:
        UserError: the Hub refused, or could not be reached.
    """
    try:
        sdk = "gradio" if kind == "space" else None
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind, space_sdk=sdk)
        if branch != "main":
            api.create_branch(repo_id, branch=branch, exist_ok=True, repo_type=kind)
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=f"Publish with deqzoo {deqzoo.__version__}",
            revision=branch,
            repo_type=kind,
        )
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True, repo_type=kind)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no repository name; write ORG/NAME") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise UserError(
                f"the Hub refused the upload to {repo_id} ({status}): log in with `hf auth login`, "
                "or set HF_TOKEN to a token that may write there"
            ) from error
        raise UserError(f"the Hub refused the upload to {repo_id}: {_line(error)}") from error
    except Exception as error:  # connection errors differ between releases of the client
        raise UserError(
            f"the upload to {repo_id} was interrupted, nothing was committed; run the same command "
            f"again ({_line(error)})"
        ) from error
    return commit.oid


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
