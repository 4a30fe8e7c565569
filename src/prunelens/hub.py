"""What talks to the Hugging Face hub, and its failures told in one line.

Everything is asked for by commit: `snapshot` resolves a branch or tag once per process, and the
folder that it returns is named after the commit. `push_folder` goes the other way.
"""

from __future__ import annotations

import functools
import json
import logging
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

from prunelens.errors import UserError

Kind = Literal["model", "dataset"]
WAITS = (1, 2, 4, 8)  # seconds between attempts to reach the hub
PASSING = (408, 429, 500, 502, 503, 504)  # answers of a hub or a proxy that may be well again soon
log = logging.getLogger(__name__)


@functools.cache
def snapshot(
    name: str, *, field: str, kind: Kind, revision: str | None, patterns: tuple[str, ...]
) -> pathlib.Path:
    """A local folder with the files of a hub repository; the folder's name is the commit.

    Without a connection a snapshot that was fetched before is used. Where there is none, or a
    download breaks off, it is tried again for a quarter of a minute; what has come stays.

    Args:
        name: the repository's id, e.g. `google/gemma-2-2b`.
        field: the study's field that named it, for errors.
        patterns: which files, as in a shell.
    Raises: UserError where the repository is missing, gated or out of reach.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        folder = _patiently(
            lambda: huggingface_hub.snapshot_download(
                name, repo_type=kind, revision=revision, allow_patterns=list(patterns)
            )
        )
    except (HFValidationError, HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise UserError(_problem(error, name, field=field, kind=kind, revision=revision)) from None
    return pathlib.Path(folder)


def commit(name: str, *, field: str, kind: Kind, revision: str | None) -> str:
    """The full commit that a repository's revision stands for. Raises UserError as `snapshot`."""
    small = "config.json" if kind == "model" else "README.md"
    return snapshot(name, field=field, kind=kind, revision=revision, patterns=(small,)).name


class Access(NamedTuple):
    """Whether a repository's files can be had."""

    state: Literal["cached", "open", "refused", "unknown"]
    """`unknown`: the hub could not be asked."""
    problem: str
    """Where refused, why and what to do, as `snapshot` would say; where unknown, why."""


def access(name: str, *, field: str, kind: Kind, revision: str | None, ask: bool = True) -> Access:
    """Ask the hub, with the user's token, whether a repository may be read; fetches no file.

    A model whose weights are in the cache is not asked for. Arguments as `snapshot`.

    Args:
        ask: False: look at the cache only.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if kind == "model" and cached_model(name, revision=revision) is not None:
        return Access("cached", "")
    if not ask:
        return Access("unknown", "not asked")
    api = huggingface_hub.HfApi(library_name="prunelens")
    try:
        api.auth_check(name, repo_type=kind)
        if revision is not None:
            api.repo_info(name, repo_type=kind, revision=revision)
    except (
        HFValidationError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    ) as error:
        return Access("refused", _problem(error, name, field=field, kind=kind, revision=revision))
    except (HTTPError, ConnectionError) as error:
        return Access("unknown", type(error).__name__)
    return Access("open", "")


def cached_model(name: str, *, revision: str | None) -> pathlib.Path | None:
    """The folder of a model whose config and weights were all fetched before; asks no hub."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        where = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    folder = pathlib.Path(where)
    weights = {path.name for path in folder.glob("*.safetensors")}
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None
        if not shards <= weights:
            return None
    return folder if weights and (folder / "config.json").is_file() else None


def cache_folder() -> pathlib.Path:
    """Where the hub's files are kept; it need not be there yet."""
    from huggingface_hub import constants

    return pathlib.Path(constants.HF_HUB_CACHE)


def dataset_rows(
    dataset: str, *, subset: str | None, split: str, revision: str | None
) -> Iterator[dict[str, Any]]:
    """The rows of a data set (a hub id or a local folder), streamed in its own order.

    Raises: UserError where the data set, its subset or its split is missing, gated or out of reach.
    """
    import datasets
    from huggingface_hub.errors import HTTPError
    from pyarrow.lib import ArrowException

    where, field = None, "corpus.dataset"
    if not pathlib.Path(dataset).is_dir():
        where = commit(dataset, field=field, kind="dataset", revision=revision)
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises as well
    try:
        yield from datasets.load_dataset(
            dataset, name=subset, split=split, revision=where, streaming=True
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            raise UserError(_gated(dataset, field)) from None
        fix = "give a hub id or a folder of data files"
        raise UserError(_first_line(field, dataset, error, fix)) from None
    except MemoryError:  # which Arrow's is, too
        raise
    except (ArrowException, UnicodeError, EOFError, zlib.error) as error:
        fix = "mend the files, or give them as corpus.paths of source 'files'"
        raise UserError(_first_line(field, dataset, error, fix)) from None
    except ValueError as error:
        part, value = ("subset", subset) if "BuilderConfig" in str(error) else ("split", split)
        fix = "give one of those that it has"
        raise UserError(_first_line(f"corpus.{part}", value, error, fix)) from None
    except (OSError, HTTPError, RuntimeError) as error:
        fix = "check it and the connection"
        raise UserError(_first_line(field, dataset, error, fix)) from None
    finally:
        datasets.logging.set_verbosity(verbosity)


def is_hub_id(name: str) -> bool:
    """Whether a name may be that of a repository on the hub. Asks no hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def is_repository(name: str) -> bool:
    """Whether a name may be that of someone's repository on the hub: USER/REPO. Asks no hub."""
    return is_hub_id(name) and name.count("/") == 1


def check_push(repository: str) -> None:
    """Refuse early what `push_folder` would refuse after hours of work; asks no hub.

    Raises: UserError where `repository` is not USER/REPO or nobody is logged in.
    """
    import huggingface_hub

    if not is_repository(repository):
        raise UserError(
            f"--push: {repository!r} is no repository of the hub; give USER/REPO, of letters,"
            " digits, '-', '_' and '.'"
        )
    if huggingface_hub.get_token() is None:
        raise UserError("--push: you are not logged in to the hub; run `hf auth login` first")


def push_folder(
    folder: str | pathlib.Path, repository: str, *, private: bool = False, message: str = ""
) -> str:
    """Upload a folder's files to a model repository of the hub, which is made if it is not there.

    Files of the repository that the folder does not have stay. The token is the one that
    `hf auth login` stored.

    Args:
        folder: what to upload, with its README.md.
        repository: USER/REPO.
        private: for a new repository; one that is there must be private already.
        message: of the commit.
    Returns: the repository's address.
    Raises: UserError where nobody is logged in, the hub refuses or cannot be reached, or the
        repository is public and should be private.
    """
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    check_push(repository)
    api = huggingface_hub.HfApi(library_name="prunelens")
    try:
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(
                f"--private: {repository!r} is there already and public; nothing was uploaded:"
                " name another one, or make it private on its hub page"
            )
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message or "Upload by prunelens",
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(_refusal(error, repository)) from None
    return str(address)


def _patiently(fetch: Callable[[], str]) -> str:
    """Call `fetch`; where the network or the hub is at fault, again after longer and longer waits.

    The client tries a broken download again by itself, but not the question what there is.
    """
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    for seconds in WAITS:
        try:
            return fetch()
        except (HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
            if not _may_pass(error):
                raise
            log.warning("the hub: %s; trying again in %d s", type(error).__name__, seconds)
        time.sleep(seconds)
    return fetch()


def _may_pass(error: BaseException | None) -> bool:
    """Whether the same request may succeed in a while."""
    from huggingface_hub import errors

    if error is None or isinstance(error, errors.OfflineModeIsEnabled):
        return False
    if isinstance(error, errors.HfHubHTTPError):
        response = getattr(error, "response", None)
        return response is not None and response.status_code in PASSING
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _may_pass(error.__cause__)
    return True


def _refusal(error: Exception, repository: str) -> str:
    """Why an upload failed, with the fix."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return f"--push: {repository!r}: HF_HUB_OFFLINE is set; unset it to upload"
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    status = None if response is None else response.status_code
    if status == 401:
        why = "the hub does not accept your token; run `hf auth login` again"
        return f"--push: {repository!r}: {why}"
    if status in (403, 404):
        why = "you may not write there; check the name, and that your token may write"
        return f"--push: {repository!r}: {why}"
    what = "check the connection" if status is None else "mend that"
    return _first_line("--push", repository, error, f"{what} and push again", "uploaded")


def _problem(error: Exception, name: str, *, field: str, kind: Kind, revision: str | None) -> str:
    """Which of the hub's failures this is, with the fix."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return f"{field}: {name!r} is neither an existing folder nor a hub id; check the spelling"
    if isinstance(error, errors.GatedRepoError):
        return _gated(name, field)
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{field}: the hub has no public {kind} {name!r}; check the spelling,"
            " or log in with `hf auth login` if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        where = field.rpartition(".")[0]
        return (
            f"{where}.revision: {name!r} has no revision {revision!r}; name a commit, branch or tag"
        )
    return (
        f"{field}: {name!r} is not in the local cache and the hub cannot be reached"
        f" ({type(error).__name__}); connect, or give a local folder"
    )


def _gated(name: str, field: str) -> str:
    return (
        f"{field}: {name!r} is gated; accept its licence on its hub page,"
        " then log in with `hf auth login`"
    )


def _first_line(
    field: str, value: str | None, error: Exception, fix: str, done: str = "read"
) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return f"{field}: {value!r} cannot be {done} ({reason}); {fix}"
