"""Push a finished model to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ofmu_ray.errors import StorageError, UserError
from ofmu_ray.storage.hub import no_connection

OPTION = "export.push_to_hub"


def check_push(name: str, *, public: bool) -> None:
    """Check, before anything starts, that a push will be allowed.

    Raises:
        UserError: not a name for the hub, no token or a wrong one, no answer, or a public repository without `public`.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    shown = f"{OPTION} = {name!r}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{shown}: must be OWNER/NAME or NAME as on the hub ({error})") from None
    if constants.is_offline_mode():
        raise UserError(f"{shown}: HF_HUB_OFFLINE is set; unset it, or drop the option")
    if get_token() is None:
        raise UserError(f"{shown}: there is no token for the hub; run `hf auth login` or set HF_TOKEN")
    reason = no_connection()
    if reason is not None:
        raise UserError(f"{shown}: the hub does not answer ({reason})")
    api = HfApi()
    try:
        owner = api.whoami()["name"]
        info = api.repo_info(name if "/" in name else f"{owner}/{name}")
    except RepositoryNotFoundError:
        return
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise UserError(f"{shown}: the hub refuses the token; run `hf auth login` or correct HF_TOKEN") from None
        raise UserError(f"{shown}: {_reason(error)}") from None
    except Exception as error:  # httpx's, by kind of network trouble
        raise UserError(f"{shown}: the hub does not answer ({_reason(error)})") from None
    if not info.private and not public:
        raise UserError(
            f"{shown}: this repository is public, and everybody could load the model: choose another name, or set "
            "--export.hub_public true"
        )


def push(folder: Path, name: str, *, public: bool) -> str:
    """Upload a model's folder as one model repository, private unless `public`; returns its URL. May be repeated.

    Raises:
        StorageError: the hub did not take everything.
    """
    from huggingface_hub import HfApi

    api: Any = HfApi()
    try:
        url = api.create_repo(name, private=not public, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Model by OFMU-Ray")
    except Exception as error:  # httpx's and the hub client's, which share no base
        raise StorageError(
            f"{OPTION} = {name!r}: the hub did not take the model ({_reason(error)}); it is in {folder}, and the same "
            "command pushes it again"
        ) from error
    return str(url)


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
