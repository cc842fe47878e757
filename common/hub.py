"""Models and prompts by their names on the Hugging Face hub, through huggingface_hub and its cache.

    NAME[@REVISION]                     a model: Qwen/Qwen3-0.6B, Qwen/Qwen3-0.6B@main
    NAME[/CONFIG][:SPLIT][@REVISION]    a dataset: openai/gsm8k, openai/gsm8k/main:test

A file or folder of that name on this machine comes first. huggingface_hub honours HF_HOME,
HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. Ranks of one machine share its cache and its locks: the
first one fetches a file, the others find it there. No code of a repository is read.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from common import errors
from common.errors import BadInput

_NAME = r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
_REVISION = r"(?:@(?P<revision>[\w./-]+))?"
MODEL = re.compile(_NAME + _REVISION, re.ASCII)
DATASET = re.compile(
    _NAME + r"(?:/(?P<config>[\w.-]+))?(?::(?P<split>[A-Za-z_][\w.-]*))?" + _REVISION, re.ASCII
)
FILE_SUFFIXES = (".jsonl", ".parquet", ".json", ".csv", ".tsv", ".txt", ".gz", ".zst", ".zip")
# What a model folder needs beside its weights, and where publishers keep the same in other forms.
SMALL_FILES = ("*.json", "tokenizer*", "chat_template*", "vocab.*", "merges.txt", "*.jinja")
WEIGHTS = ("*.safetensors",)
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
OTHER_FORMS = (*(f"*/{name}" for name in SMALL_FILES[:-1] + WEIGHTS), "consolidated*")
SPLITS = r"(\w*_)?(train|test|valid|validation|dev|eval)(_\w*)?"
USUAL_CONFIGS = ("default", "main")

fetched: dict[str, str] = {}
"""What this process has fetched or found in the cache: {the name as given: its folder}."""


def is_model(given: str) -> bool:
    """Tell whether this is a model's name on the hub, rather than a folder."""
    return not os.path.lexists(given) and MODEL.fullmatch(given) is not None


def is_dataset(given: str) -> bool:
    """Tell whether this is a dataset's name on the hub, rather than a file."""
    is_name = DATASET.fullmatch(given) is not None and not given.endswith(FILE_SUFFIXES)
    return is_name and not os.path.lexists(given)


def model_problem(given: str, *, flag: str = "--model") -> str:
    """Return why this names no model; "" if it may: what the hub has is asked later."""
    return "" if is_model(given) else errors.model_problem(given, flag=flag)


def model_folder(given: str, *, flag: str, check: Callable[[str], object], weights: bool) -> str:
    """Return the folder of a model: given, or the cache's for a name on the hub.

    check: raises BadInput for a configuration that cannot be used, before gigabytes are fetched.
    weights: whether they are needed. Raises BadInput, also for what the hub does not have.
    """
    if not is_model(given):
        return given
    found = MODEL.fullmatch(given)
    asked = dict(repo_id=found["name"], revision=found["revision"], ignore_patterns=OTHER_FORMS)
    patterns = (*SMALL_FILES, CHAT_TEMPLATES)
    folder = _snapshot(given, flag, **asked, allow_patterns=patterns)
    check(folder)
    if weights:
        folder = _snapshot(given, flag, **asked, allow_patterns=patterns + WEIGHTS)
    return folder


def dataset_files(given: str, *, flag: str = "--prompts") -> list[str]:
    """Return the JSONL or Parquet files of a dataset's split on this machine, in order.

    The split is train unless given. Raises BadInput, also where the name fits several sets of
    files.
    """
    found = DATASET.fullmatch(given)
    asked = dict(repo_id=found["name"], revision=found["revision"], repo_type="dataset")
    chosen = _files_of_split(
        _file_names(given, flag, **asked), given, config=found["config"], split=found["split"]
    )
    folder = _snapshot(given, flag, **asked, allow_patterns=chosen)
    return [str(Path(folder, name)) for name in chosen]


def _files_of_split(
    names: Iterable[str], given: str, *, config: str | None, split: str | None
) -> list[str]:
    """Return a split's files, by the hub's custom that folders and files are named after it.

    Where no name says a split, all files are those of train.
    """
    split, by_folder = split or "train", {}
    of_config = [
        name
        for name in sorted(names)
        if PurePosixPath(name).suffix in (".parquet", ".jsonl")
        and (config is None or config in PurePosixPath(name).parts[:-1])
    ]
    is_split = _named_after(re.escape(split))
    if split == "train" and not any(map(_named_after(SPLITS).search, of_config)):
        is_split = re.compile("")
    for name in filter(is_split.search, of_config):
        own = [part for part in PurePosixPath(name).parts[:-1] if not is_split.fullmatch(part)]
        by_folder.setdefault(("/".join(own), PurePosixPath(name).suffix), []).append(name)
    if len(by_folder) > 1:
        usual = [key for key in by_folder if set(PurePosixPath(key[0]).parts) & {*USUAL_CONFIGS}]
        if len(usual) == 1 and config is None:
            return by_folder[usual[0]]
        shown = ", ".join(sorted({files[0] for files in by_folder.values()})[:8])
        fix = "name a configuration, as NAME/CONFIG, or fetch the files and name one"
        raise BadInput(f"{given} has several sets of files for {split}: {shown}: {fix}")
    if not by_folder:
        of_config = f" of {config}" if config else ""
        shown = ", ".join(sorted(names)[:8]) or "no file at all"
        fix = "name another split, as NAME:SPLIT; only these two formats are read"
        raise BadInput(
            f"{given} has no JSONL or Parquet file of a split {split}{of_config}; it has {shown}:"
            f" {fix}"
        )
    return next(iter(by_folder.values()))


def _named_after(split: str) -> re.Pattern:
    """Return a pattern of paths that name a split: train-00000-of-00001, data_train.v2, train/0.

    split: a pattern. train_sft is another split than train.
    """
    return re.compile(rf"(?<![A-Za-z0-9])({split})(?=[-_ ]?v?[0-9]|[./]|$)", re.IGNORECASE)


def _file_names(given: str, flag: str, **asked) -> list[str]:
    """Return the names of a dataset's files; without the hub, of those in the cache."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with _refusals(given, flag, asked):
        try:
            return HfApi().list_repo_files(**asked)
        except (httpx.TransportError, OfflineModeIsEnabled):
            nothing = dict(allow_patterns=["no such file"])  # else all of it must be in the cache
    folder = Path(_snapshot(given, flag, **asked, **nothing))
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]


def _snapshot(given: str, flag: str, **asked) -> str:
    """Fetch files of a repository into the cache; return their folder. See snapshot_download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if os.environ.get("LOCAL_RANK", "0") != "0":
        disable_progress_bars()  # one rank of a machine shows them
    with _refusals(given, flag, asked):
        fetched[given] = folder = snapshot_download(**asked)
    return folder


@contextmanager
def _refusals(given: str, flag: str, asked: dict) -> Iterator[None]:
    """Raise BadInput for what huggingface_hub raises, with what the user can do about it."""
    import httpx
    from huggingface_hub import constants
    from huggingface_hub import errors as of_hub

    hub, name = constants.ENDPOINT, asked["repo_id"]
    try:
        yield
    except of_hub.GatedRepoError as error:
        fix = f"accept its terms at {hub}/{name}, and set HF_TOKEN"
        raise BadInput(f"{flag} {given} is gated: {fix}") from error
    except of_hub.RepositoryNotFoundError as error:
        fix = "check the name, or set HF_TOKEN if it is private"
        raise BadInput(f"{flag} {given} is neither on this machine nor on {hub}: {fix}") from error
    except of_hub.RevisionNotFoundError as error:
        fix = "name a branch, a tag or a commit that it has"
        raise BadInput(f"{flag} {given} has no revision {asked['revision']}: {fix}") from error
    except of_hub.LocalEntryNotFoundError as error:
        why = f"{hub} cannot be reached: {_first_line(error.__cause__ or error)}"
        if constants.is_offline_mode():
            why = "HF_HUB_OFFLINE is set: fetch it once without that"
        cache = f"is not complete in the cache {constants.HF_HUB_CACHE}"
        raise BadInput(f"{flag} {given} {cache}, and {why}") from error
    except (OSError, httpx.HTTPError, ValueError, of_hub.XetDownloadError) as error:
        raise BadInput(f"{flag} {given} cannot be fetched: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
