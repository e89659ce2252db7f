"""One quick question to the Hugging Face Hub before anything is fetched from it."""

from __future__ import annotations

import os
from typing import Literal

from huggingface_hub import DatasetInfo, HfApi, ModelInfo
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from llmlab.base.errors import InputError

TIMEOUT_SECONDS = 10


def ask(repo: str, kind: Literal["model", "dataset"], *, revision: str | None = None) -> ModelInfo | DatasetInfo | None:
    """What the Hub says of a repository, or None when the Hub cannot be reached (then only its local cache is left).

    The Hub's own clients retry for half a minute when there is no network; this asks once.

    Raises:
        InputError: the Hub was reached and has no such repository or revision, or does not give access to it.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return None
    api = HfApi()
    info = api.model_info if kind == "model" else api.dataset_info
    try:
        return info(repo, revision=revision, timeout=TIMEOUT_SECONDS)
    except RevisionNotFoundError:
        raise InputError(f"the {kind} {repo!r} on the Hub has no revision {revision!r}.") from None
    except GatedRepoError:
        raise InputError(
            f"the {kind} {repo!r} is gated: accept its terms on the Hub and log in with `hf auth login`."
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(f"the Hugging Face Hub has no {kind} {repo!r} that you may read: check the name.") from None
    except (HfHubHTTPError, OSError):
        return None
    except Exception as error:  # the HTTP library's connection errors derive from its own base class
        if type(error).__module__.split(".")[0] in {"httpx", "httpx2", "httpcore", "httpcore2", "requests"}:
            return None
        raise
