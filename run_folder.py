"""The run folder is one for all ranks: on several machines, one file system."""

import shutil
import socket
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from problems import BadInput
from run import all_gather_bytes, broadcast_bytes

SHARED_S = 60.0  # a network file system may show a new file late


def check_shared(folder: Path, group: dist.ProcessGroup, *, is_new: bool) -> None:
    """Refuse a folder that some ranks do not see: raise BadInput on all. Collective.

    Each of them would write its part of a checkpoint to another place. A new folder is removed.
    """
    file, token, is_writer = folder / ".shared", uuid.uuid4().hex.encode(), group.rank() == 0
    if is_writer:
        try:
            file.write_bytes(token)
        except OSError as error:
            about = f"the run folder {folder} cannot be written ({error.strerror})"
            raise BadInput(f"{about}: run where you may write, or choose --name") from error
    token, deadline = broadcast_bytes(token, group), time.time() + SHARED_S
    while not (seen := _holds(file, token)) and time.time() < deadline:
        time.sleep(0.2)
    mine = b"" if seen else f"on {socket.gethostname()} in {Path.cwd()}".encode()
    where = [text.decode() for text in all_gather_bytes(mine, group)]
    blind = [f"rank {rank} {text}" for rank, text in enumerate(where) if text]
    if is_writer:
        file.unlink()
        if blind and is_new:
            shutil.rmtree(folder)
    if blind:
        ranks = f"{len(blind)} of {len(where)} ranks do not see what rank 0 has written to"
        fix = "start all ranks in one folder, on a file system that all machines share"
        raise BadInput(f"{ranks} {folder}; the first is {blind[0]}: {fix}")


def _holds(file: Path, content: bytes) -> bool:
    try:
        return file.read_bytes() == content
    except OSError:  # a network file system has more errors than that it is not there
        return False
