"""Models and prompts by their names on the Hugging Face hub, through huggingface_hub and its cache.

    NAME[@REVISION]                     a model: Qwen/Qwen3-0.6B, Qwen/Qwen3-0.6B@main
    NAME[/CONFIG][:SPLIT][@REVISION]    a dataset: openai/gsm8k, openai/gsm8k/main:test

A file or folder of that name on this machine comes first. huggingface_hub honours HF_HOME,
HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE. Ranks of one machine share its cache and its locks: the
first one fetches a file, the others find it there. A revision is resolved to a commit once, and
all files are of that commit. No code of a repository is read.
"""

import functools
import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from common import errors
from common.errors import BadInput

_NAME = r"(?P<owner>[A-Za-z0-9][\w.-]*)/(?P<name>[A-Za-z0-9][\w.-]*)"
_REVISION = r"(?:@(?P<revision>[\w./-]+))?"
MODEL = re.compile(_NAME + _REVISION, re.ASCII)
DATASET = re.compile(
    _NAME + r"(?:/(?P<config>[\w.-]+))?(?::(?P<split>[A-Za-z_][\w.-]*))?" + _REVISION, re.ASCII
)
OTHER_FILES = re.compile(r".*\.(jsonl?|parquet|arrow|[ct]sv|txt|gz|zst|zip|bz2|xz)", re.IGNORECASE)
# What a model folder needs beside its weights, and where publishers keep the same in other forms.
SMALL_FILES = ("*.json", "tokenizer*", "chat_template*", "vocab.*", "merges.txt", "*.jinja")
WEIGHTS = ("*.safetensors",)
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
OTHER_FORMS = (*(f"*/{name}" for name in SMALL_FILES[:-1] + WEIGHTS), "consolidated*")
USUAL_CONFIGS = ("default", "main")
# A name of which one of the words of splits is a part: train_sft, gsm8k_test, validation-matched.
SPLITS = re.compile(
    r"(.*[-_.])?(train|training|test|testing|val|valid|validation|dev|eval|evaluation)([-_.].*)?"
)
# What follows a split's name in those of its shards: -00000-of-00001, _3, -00000-of-00001-9f3c0a1b.
SHARD = re.compile(r"(^|[-_.])\d{1,6}([-_.]of[-_.]\d{1,6})?([-_.][0-9a-f]{8,})?$")

found: dict[str, str] = {}
"""What this process has fetched or found in the cache: {"--model NAME": its folder}."""


def is_model(given: str) -> bool:
    """Tell whether this is a model's name on the hub, rather than a folder."""
    return not os.path.lexists(given) and MODEL.fullmatch(given) is not None


def is_dataset(given: str) -> bool:
    """Tell whether this is a dataset's name on the hub, rather than a file."""
    is_name = DATASET.fullmatch(given) is not None and not OTHER_FILES.fullmatch(given)
    return is_name and not os.path.lexists(given)


def model_problem(given: str, *, flag: str = "--model") -> str:
    """Return why this names no model; "" if it may: what the hub has is asked later."""
    return "" if is_model(given) else errors.model_problem(given, flag=flag)


def model_folder(given: str, *, flag: str, weights: bool) -> str:
    """Return the folder of a model: given, or that in the cache for a name on the hub.

    weights: whether they are fetched too. Raises BadInput for what the hub does not have.
    """
    if not is_model(given):
        return given
    patterns = (*SMALL_FILES, CHAT_TEMPLATES, *(WEIGHTS if weights else ()))
    with _repository(f"{flag} {given}", MODEL.fullmatch(given), "model") as asked:
        return _fetch(asked, f"{flag} {given}", patterns, ignore_patterns=OTHER_FORMS)


def dataset_files(given: str) -> list[str]:
    """Return the JSONL or Parquet files of a dataset's split on this machine, in order.

    The split is train unless given. Raises BadInput, also where the name fits several sets of
    files.
    """
    name, what = DATASET.fullmatch(given), f"the dataset {given}"
    with _repository(what, name, "dataset") as asked:
        from huggingface_hub import get_cached_repo_tree

        _fetch(asked, what, [])  # only the list of the commit's files, which the cache keeps
        files = [file.path for file in get_cached_repo_tree(**asked)]
    chosen = files_of_split(files, given, config=name["config"], split=name["split"])
    with _repository(what, name, "dataset") as asked:
        folder = _fetch(asked, what, [glob.escape(file) for file in chosen])
    return [str(Path(folder, file)) for file in chosen]


def short_name(given: str) -> tuple[str, str]:
    """Return (owner, the rest without the revision) of a dataset's name."""
    owner, _, rest = given.partition("@")[0].partition("/")
    return owner, rest


def name_of(folder: str) -> str:
    """Return the name by which a folder was found on the hub; else the folder's own."""
    given = {path: what.partition(" ")[2] for what, path in found.items()}
    return given.get(str(folder), Path(folder).name)


def files_of_split(
    files: Iterable[str], given: str, *, config: str | None, split: str | None
) -> list[str]:
    """Return a split's files among those of a dataset, by the custom of their names.

    A file is of the split it is named after, but for the number of a shard; if its name tells of no
    split, of the split that a folder is named after. Where no file tells of one, all are train's.
    """
    files, split, sets = sorted(files), split or "train", defaultdict(list)
    read = [PurePosixPath(file) for file in files if file.endswith((".parquet", ".jsonl"))]
    read = [file for file in read if config is None or config in file.parts[:-1]]
    untold = not any(SPLITS.fullmatch(part) for file in read for part in (*file.parts, file.stem))
    for file in read:
        stem, folders = SHARD.sub("", file.stem), file.parts[:-1]
        by_folder = not SPLITS.fullmatch(stem) and split in folders
        if split in (stem, file.stem) or by_folder or (untold and split == "train"):
            own = tuple(folder for folder in folders if folder != split)
            sets[own, stem, file.suffix].append(str(file))
    if len(sets) > 1 and config is None:
        usual = [key for key in sets if {*key[0]} & {*USUAL_CONFIGS}]
        sets = {key: sets[key] for key in usual} if len(usual) == 1 else sets
    if len(sets) == 1:
        return next(iter(sets.values()))
    if sets:
        some = ", ".join(sorted(of_set[0] for of_set in sets.values())[:8])
        fix = "name one by NAME/CONFIG or by NAME:SPLIT, or fetch the files and name one"
        raise BadInput(f"the dataset {given} has several sets of files for {split}: {some}: {fix}")
    some = ", ".join(files[:8]) or "no file at all"
    of_config = f" of {config}" if config else ""
    fix = "name another by NAME/CONFIG or NAME:SPLIT; only these two formats are read"
    raise BadInput(
        f"the dataset {given} has no JSONL or Parquet file of the split {split}{of_config}; it has"
        f" {some}: {fix}"
    )


@contextmanager
def _repository(what: str, name: re.Match, kind: str) -> Iterator[dict]:
    """Yield what huggingface_hub's functions must know of a repository: name, kind and commit.

    what: names it in errors. Raises BadInput for what huggingface_hub raises, with what the user
    can do about it.
    """
    repository, revision = f"{name['owner']}/{name['name']}", name["revision"]
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        import httpx
        from huggingface_hub import constants
        from huggingface_hub import errors as of_hub
    except ValueError as error:
        raise BadInput(f"HF_ENDPOINT {hub} is no address: {_first_line(error)}") from error
    try:
        commit = _commit(repository, kind, revision)
        yield dict(repo_id=repository, repo_type=kind, revision=commit)
    except of_hub.GatedRepoError as error:
        fix = f"accept its terms at {hub}/{repository}, and set HF_TOKEN"
        raise BadInput(f"{what} is gated: {fix}") from error
    except of_hub.RepositoryNotFoundError as error:
        fix = "check the name, or set HF_TOKEN if it is private"
        raise BadInput(f"{what} is neither on this machine nor on {hub}: {fix}") from error
    except of_hub.RevisionNotFoundError as error:
        fix = "name a branch, a tag or a commit that it has"
        raise BadInput(f"{what} has no revision {revision}: {fix}") from error
    except (
        of_hub.LocalEntryNotFoundError,
        of_hub.CachedRepoTreeNotFoundError,
        of_hub.RevisionResolutionError,
        of_hub.OfflineModeIsEnabled,
        httpx.TransportError,
    ) as error:
        why = f"{hub} cannot be reached: {_first_line(error.__cause__ or error)}"
        if constants.is_offline_mode():
            why = "HF_HUB_OFFLINE is set: fetch it once without that"
        raise BadInput(
            f"{what} is not complete in the cache {constants.HF_HUB_CACHE}, and {why}"
        ) from error
    except (OSError, httpx.HTTPError, ValueError, of_hub.XetDownloadError) as error:
        raise BadInput(f"{what} cannot be fetched: {_first_line(error)}") from error
    except (KeyError, TypeError, AttributeError, AssertionError) as error:
        fix = "check HF_ENDPOINT and proxies"
        raise BadInput(f"{what}: {hub} answers as no Hugging Face hub does: {fix}") from error


@functools.cache
def _commit(repository: str, kind: str, revision: str | None) -> str:
    """Return a revision, resolved once; without the hub, as the cache knows it."""
    import httpx
    from huggingface_hub import resolve_revision
    from huggingface_hub.errors import HfHubHTTPError

    asked = dict(repo_id=repository, repo_type=kind, revision=revision)
    try:
        return resolve_revision(**asked)
    except HfHubHTTPError as error:
        if error.response.status_code != httpx.codes.TOO_MANY_REQUESTS:
            raise
        return resolve_revision(**asked, local_files_only=True)


def _fetch(asked: dict, what: str, patterns: Iterable[str], **more) -> str:
    """Fetch the files of these patterns into the cache; return their folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if os.environ.get("LOCAL_RANK", "0") != "0":
        disable_progress_bars()  # one rank of a machine shows them
    # An empty list would mean all files.
    found[what] = folder = snapshot_download(**asked, allow_patterns=[*patterns, "\0"], **more)
    return folder


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
