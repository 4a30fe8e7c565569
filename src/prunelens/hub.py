"""What talks to the Hugging Face hub, and its failures told in one line.

Everything is asked for by commit: `snapshot` resolves a branch or tag once per process, and the
folder that it returns is named after the commit.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Iterator
from typing import Any, Literal

from prunelens.errors import UserError

Kind = Literal["model", "dataset"]


@functools.cache
def snapshot(
    name: str, *, field: str, kind: Kind, revision: str | None, patterns: tuple[str, ...]
) -> pathlib.Path:
    """A local folder with the files of a hub repository; the folder's name is the commit.

    Without a connection a snapshot that was fetched before is used.

    Args:
        name: the repository's id, e.g. `google/gemma-2-2b`.
        field: the study's field that named it, for errors.
        patterns: which files, as in a shell.
    Raises: UserError where the repository is missing, gated or out of reach.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        folder = huggingface_hub.snapshot_download(
            name, repo_type=kind, revision=revision, allow_patterns=list(patterns)
        )
    except HFValidationError:
        raise UserError(
            f"{field}: {name!r} is neither an existing folder nor a hub id; check the spelling"
        ) from None
    except (HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise UserError(_problem(error, name, field=field, kind=kind, revision=revision)) from None
    return pathlib.Path(folder)


def commit(name: str, *, field: str, kind: Kind, revision: str | None) -> str:
    """The full commit that a repository's revision stands for. Raises UserError as `snapshot`."""
    small = "config.json" if kind == "model" else "README.md"
    return snapshot(name, field=field, kind=kind, revision=revision, patterns=(small,)).name


def dataset_rows(
    dataset: str, *, subset: str | None, split: str, revision: str | None
) -> Iterator[dict[str, Any]]:
    """The rows of a data set (a hub id or a local folder), streamed in its own order.

    Raises: UserError where the data set, its subset or its split is missing, gated or out of reach.
    """
    import datasets
    from huggingface_hub.errors import HTTPError

    local = pathlib.Path(dataset).is_dir()
    where = (
        None
        if local
        else commit(dataset, field="corpus.dataset", kind="dataset", revision=revision)
    )
    try:
        yield from datasets.load_dataset(
            dataset, name=subset, split=split, revision=where, streaming=True
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        gated = "gated" in str(error)
        raise UserError(
            _gated(dataset, "corpus.dataset")
            if gated
            else _first_line(
                "corpus.dataset", dataset, error, "give a hub id or a folder of data files"
            )
        ) from None
    except ValueError as error:
        field, value = ("subset", subset) if "BuilderConfig" in str(error) else ("split", split)
        raise UserError(
            _first_line(f"corpus.{field}", value, error, "give one of those that it has")
        ) from None
    except (OSError, HTTPError, RuntimeError) as error:
        raise UserError(
            _first_line("corpus.dataset", dataset, error, "check it and the connection")
        ) from None


def _problem(error: Exception, name: str, *, field: str, kind: Kind, revision: str | None) -> str:
    """Which of the hub's failures this is, with the fix."""
    from huggingface_hub import errors

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


def _first_line(field: str, value: str | None, error: Exception, fix: str) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return f"{field}: {value!r} cannot be read ({reason}); {fix}"
