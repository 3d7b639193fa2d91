"""Checkpoints and data sets of the Hugging Face hub, by their ids.

    snapshot("Qwen/Qwen2-VL-2B-Instruct", "model", ("*.json", "*.safetensors"))

What the hub's cache holds already is not downloaded again; with HF_HUB_OFFLINE=1 nothing is. A
revision may follow the id: "owner/name@revision". Nothing that is downloaded is ever run.
"""

import re
from pathlib import Path

from huggingface_hub import errors, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# A download that is cut short: of the HTTP package that this huggingface_hub uses, and of hf_xet.
CUT = (getattr(errors, "HTTPError", OSError), RuntimeError)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")


def is_hub_id(name: str) -> bool:
    """Whether name has the form of a hub id, owner/name or owner/name@revision, and no file or
    folder is called so."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).exists()


def snapshot(name: str, kind: str, patterns: tuple[str, ...]) -> Path:
    """The folder of the files of a hub repository that match, downloaded where they are not in the
    hub's cache. kind: model or dataset. ValueError says what is wrong and what to do about it."""
    repo, _, revision = name.partition("@")
    told = f"{kind} {name}: no such file or folder, and"
    try:
        return Path(snapshot_download(repo, repo_type=kind, revision=revision or None,
                                      allow_patterns=list(patterns)))  # fmt: skip
    except GatedRepoError as error:
        raise ValueError(f"{told} the hub gives it only to those who accepted its terms: do that "
                         f"on huggingface.co/{repo}, then `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{told} {repo} of the hub has no revision {revision}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"{told} the hub has no {kind} {repo} (or it is private: "
                         "`hf auth login`)") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, *CUT) as error:
        raise ValueError(f"{told} {repo} is not in the hub's cache and the hub cannot be asked: "
                         f"{(str(error) or type(error).__name__).splitlines()[0]}") from error
