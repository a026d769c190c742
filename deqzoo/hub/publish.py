"""Uploading a checkpoint and its card to the Hub in one commit, instead of what was there."""

from __future__ import annotations

import io
import itertools
import re
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import enable_progress_bars, get_session, validate_repo_id

import deqzoo
from deqzoo.errors import UserError, one_line
from deqzoo.hub.cards import plots, render_card
from deqzoo.hub.catalogue import Entry, entry
from deqzoo.hub.integrity import CHECKSUMS, UNSEALED, check_checksums, published_files
from deqzoo.hub.metadata import eval_results_yaml
from deqzoo.sealed import require_inside
from deqzoo.zoo import resolve_bundled

#: Between two bytes of an answer; committing many large files takes the Hub a while.
TIME_LIMIT_SECONDS = 120.0
_TRIES = 5
_TOKEN = re.compile(r"hf_\w+|(?<=Bearer )\S+")
#: Files that are a checkpoint's own, whether or not the checksums in the repository name them.
_OWN = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|evaluation/.+|notes\.md|"
    rf"{UNSEALED.pattern}"
)


@dataclass(frozen=True)
class Report:
    """What an upload did or would do.

    Attributes:
        files: path in the repository -> bytes.
        tag: what the commit is tagged with; None on other branches than main.
        commit: its id; None for a dry run.
        removed: files of an earlier upload that the commit removed.
    """

    repository: str
    revision: str
    files: dict[str, int]
    tag: str | None
    commit: str | None
    removed: tuple[str, ...] = ()

    def __str__(self) -> str:
        size = sum(self.files.values()) / 2**20
        what = f"{len(self.files)} files, {size:.1f} MiB"
        if self.commit is None:
            file_lines = "".join(f"\n  {name}  {size:,} bytes" for name, size in self.files.items())
            return f"would upload {what} to {self.repository} ({self.revision}){file_lines}"
        removal = f", removed {', '.join(self.removed)}" if self.removed else ""
        tag = f", tag {self.tag}" if self.tag else ""
        return f"{self.repository}: {what}{removal}, commit {self.commit}{tag}"


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
    unless every file arrived, since all of them are one commit. The same commit removes what an
    earlier upload left and this one lacks; files of other origin stay.

    An upload to main gets the tag `vVERSION` of the package, a later one with other files
    `vVERSION-2` and so on: a tag names the same files for ever. Other branches get none.

    Args:
        name: zoo name or local folder.
        repo_id: repository on the Hub, ORG/NAME; created if it does not exist.
        private: whether a new repository is private.
        dry_run: only collect and check the files.
        revision: branch to upload to, created from main if it does not exist; main by default.
        token: access token; the stored one or HF_TOKEN if None.

    Raises:
        UserError: no repository name, files that differ from their checksums, or a refusal of the
            Hub.
    """
    check_repository_name(repo_id)
    require_inside(resolve_bundled(name), deep=True)
    checkpoint = entry(name)
    faults = check_checksums(checkpoint.folder)
    if faults:
        raise UserError(f"{checkpoint.name} is not as sealed: {'; '.join(faults)}")
    contents = _contents(checkpoint, repo_id)
    files = {
        path: len(source) if isinstance(source, bytes) else source.stat().st_size
        for path, source in contents.items()
    }
    branch = revision or "main"
    tag = f"v{deqzoo.__version__}" if branch == "main" else None
    if dry_run:
        return Report(repo_id, branch, files, tag, None)
    operations = [
        CommitOperationAdd(path, io.BytesIO(source) if isinstance(source, bytes) else str(source))
        for path, source in contents.items()
    ]
    api = HfApi(token=token)
    commit, removed_files, tag = upload(api, repo_id, operations, _OWN, branch, private, tag)
    return Report(repo_id, branch, files, tag, commit, tuple(removed_files))


def check_repository_name(repo_id: str) -> None:
    """Refuse what cannot be a repository on the Hub.

    Raises:
        UserError: not of the form ORG/NAME.
    """
    try:
        validate_repo_id(repo_id)
        valid = "/" in repo_id
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(f"{repo_id!r} is no repository name; write ORG/NAME")


def _contents(checkpoint: Entry, repo_id: str) -> dict[str, Path | bytes]:
    """Repository path -> file or content, the card included, which names the repository."""
    contents: dict[str, Path | bytes] = {
        path.as_posix(): checkpoint.folder / path for path in published_files(checkpoint.folder)
    }
    contents[CHECKSUMS] = checkpoint.folder / CHECKSUMS
    contents["README.md"] = render_card(checkpoint, repo_id).encode()
    contents |= {file: plot.encode() for file, plot in plots(checkpoint).items()}
    results = eval_results_yaml(checkpoint, repo_id)
    if results is not None:
        contents[".eval_results/deqzoo.yaml"] = results.encode()
    return contents


def upload(
    api: HfApi,
    repo_id: str,
    operations: list[CommitOperationAdd],
    own: re.Pattern[str],
    branch: str = "main",
    private: bool = False,
    tag: str | None = None,
    kind: Literal["model", "space"] = "model",
) -> tuple[str, list[str], str | None]:
    """Create the repository, commit and tag; the commit's id, the files that it removed, the tag.

    Args:
        operations: the files to be there afterwards.
        own: paths that are removed where they are not among the files; so are those which the
            repository's checksums name. Everything else stays.
        tag: for the commit; its next edition where the tag names another one.

    Raises:
        UserError: the Hub refused, could not be reached, or has another upload in between.
    """
    secrets = [secret for secret in (api.token, get_token()) if isinstance(secret, str)]
    if any(secret.split() != [secret] or not secret.isprintable() for secret in secrets):
        raise UserError("the access token holds blanks or line breaks; copy it anew")
    if sys.stderr.isatty():
        enable_progress_bars()
    get_session().timeout = TIME_LIMIT_SECONDS  # the client itself would wait for ever
    commit = None
    try:
        sdk = "gradio" if kind == "space" else None
        api.create_repo(repo_id, private=private, exist_ok=True, repo_type=kind, space_sdk=sdk)
        if branch != "main":
            api.create_branch(repo_id, branch=branch, exist_ok=True, repo_type=kind)
        parent = api.repo_info(repo_id, revision=branch, repo_type=kind).sha
        assert parent is not None
        removed_files = _old_files(
            api, repo_id, {o.path_in_repo for o in operations}, own, parent, kind
        )
        deletions = map(CommitOperationDelete, removed_files)
        commit = _commit(api, repo_id, [*operations, *deletions], branch, parent, kind)
        if tag is not None:
            tag = _tag(api, repo_id, tag, commit, kind)
    except UserError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        action = "upload to" if commit is None else f"tag {tag} (the files are uploaded) of"
        if status in (401, 403):
            raise UserError(
                f"the Hub refused the {action} {repo_id} ({status}): log in with `hf auth login`, "
                "or set HF_TOKEN to a token that may write there"
            ) from None
        raise UserError(
            f"the Hub refused the {action} {repo_id}: {_line(error, secrets)}"
        ) from None
    except Exception as error:  # connection errors differ between releases of the client
        outcome = "nothing was committed" if commit is None else f"without the tag {tag}"
        raise UserError(
            f"the upload to {repo_id} was interrupted, {outcome}; run the same command again "
            f"({_line(error, secrets)})"
        ) from None
    return commit, removed_files, tag


def _commit(
    api: HfApi, repo_id: str, operations: list[Any], branch: str, parent: str, kind: str
) -> str:
    """Commit on top of `parent`, and nothing else; the commit's id.

    Where the answer is lost, the branch is searched for the mark that the commit carries.

    Raises:
        UserError: another commit came first, or it cannot be found out whether this one arrived.
    """
    mark = uuid.uuid4().hex
    try:
        return api.create_commit(
            repo_id,
            operations,
            commit_message=f"Publish with deqzoo {deqzoo.__version__}",
            commit_description=f"Upload {mark}",
            revision=branch,
            repo_type=kind,
            parent_commit=parent,
        ).oid
    except Exception:
        try:
            commits = api.list_repo_commits(repo_id, revision=branch, repo_type=kind)
        except Exception:
            raise UserError(
                f"the Hub's answer was lost, and it cannot be asked whether {repo_id} has the new "
                "files; run the same command again, which changes nothing if it has"
            ) from None
        new_commits = list(itertools.takewhile(lambda commit: commit.commit_id != parent, commits))
        for commit in new_commits:
            if mark in f"{commit.title}\n{commit.message}":
                return commit.commit_id
        if new_commits:
            raise UserError(
                f"somebody else changed {repo_id} ({branch}) during this upload, of which nothing "
                "was committed; look at what is there, and run the same command again to replace it"
            ) from None
        raise


def _old_files(
    api: HfApi, repo_id: str, files: set[str], own: re.Pattern[str], revision: str, kind: str
) -> list[str]:
    """Files of earlier uploads in the repository that this one no longer has."""
    present_files = api.list_repo_files(repo_id, revision=revision, repo_type=kind)
    sealed_files: set[str] = set()
    if CHECKSUMS in present_files:
        path = api.hf_hub_download(repo_id, CHECKSUMS, revision=revision, repo_type=kind)
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
        sealed_files = {line.partition("  ")[2] for line in lines}
    return [p for p in present_files if p not in files and (p in sealed_files or own.fullmatch(p))]


def _tag(api: HfApi, repo_id: str, version: str, commit: str, kind: str) -> str:
    """Tag a commit with a version, or with its next edition (VERSION-2, ...); the tag."""
    for _ in range(_TRIES):
        tags = {t.name: t.target_commit for t in api.list_repo_refs(repo_id, repo_type=kind).tags}
        editions = (version if n == 1 else f"{version}-{n}" for n in itertools.count(1))
        tag = next(name for name in editions if tags.get(name, commit) == commit)
        if tag in tags:
            break
        try:
            api.create_tag(repo_id, tag=tag, revision=commit, repo_type=kind)
            break
        except HfHubHTTPError as error:  # another upload took this edition
            if error.response is None or error.response.status_code != 409:
                raise
    else:
        raise RuntimeError(f"{_TRIES} editions in a row were taken by others")
    return tag


def _line(error: BaseException, secrets: list[str]) -> str:
    """An error in one line, without any token."""
    text = one_line(error)
    for secret in secrets:
        text = text.replace(secret, "***")
    return _TOKEN.sub("***", text)[:200]
