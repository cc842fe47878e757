"""How ranks meet, how long one waits for another, and which rank the error then names.

    torchrun's store       outlives the ranks that torchrun restarts; remembers the run's folder
    this start's store     a part of it that no earlier rank has written to; groups are made from it
    the groups             of distributed.init_distributed, and Megatron's from the default world

Two limits end a wait. TCP notices within LOST_LINK_S that another rank's machine or link is gone.
A rank that is alive and does not answer is given up after longest_wait_s, more time than any rank
needs if it works.
"""

import contextlib
import ipaddress
import json
import math
import os
import re
import socket
import stat
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

UNLIMITED_WORK_S = 1800.0  # for work that no flag limits; the default of torch and Megatron
LONGEST_S = 365 * 24 * 3600.0  # replaces an infinite limit, which torch cannot represent
LOST_LINK_S = 90


class _Start:
    """What this process knows about its job; filled by join_store and init_distributed."""

    store: dist.Store | None = None
    of_the_job: dist.Store | None = None
    rank, world_size = 0, 1
    wait_s = UNLIMITED_WORK_S
    exchanges = 0  # how many exchanges of all ranks this rank has joined
    goes_on = False


# --- how long a rank may wait -----------------------------------------------------------------


def longest_wait_s(settings, reward, *, rollout_ranks: int, turns: int = 1) -> float:
    """Return how long a collective waits: longer than any working rank needs before it joins.

    settings: a loop's. reward: its reward function. rollout_ranks: how many ranks generate.
    turns: how often a sample goes to the engine.

    The longest wait is for the exchange of samples, for the slowest engine and its judge. Before it
    - the engine loads and finishes the last weight update, each within --answer-timeout-s;
    - it computes shared prompts, then the answers, each within --answer-timeout-s;
    - the judge takes a few answers at a time, each within --judge-timeout-s.
    Dynamic sampling repeats the last two. In the asynchronous loop one group may be replaced again
    and again, until the step's replacements are used up. UNLIMITED_WORK_S is added for work that no
    flag limits: training, files, the start of an engine. A rank whose engine hangs thus reports it
    before another rank gives up waiting.
    """
    rollout, rewards = settings.rollout, settings.reward
    in_flight = getattr(settings, "in_flight", None)
    engines = max(rollout_ranks // rollout.engine_tp, 1)
    places = min(rewards.judges, getattr(reward, "at_a_time", rewards.judges))

    def generate_and_judge_s(prompts: int, samples: int) -> float:
        judge_rounds = math.ceil(math.ceil(prompts / engines) * samples / places)
        return 2 * turns * rollout.answer_timeout_s + judge_rounds * rewards.judge_timeout_s

    prompts, rounds = rollout.prompts_per_step, rewards.dynamic_sampling
    if in_flight is not None:
        rounds *= math.ceil(prompts / engines)
        prompts = prompts * (in_flight.max_staleness + 1) + in_flight.oversample
    sets = max(len(rollout.prompts), len(rollout.eval_prompts), 1)
    held_out_s = generate_and_judge_s(sets * rollout.eval_samples, rollout.eval_samples_per_prompt)
    step_s = (1 + rounds) * generate_and_judge_s(prompts, rollout.samples_per_prompt)
    wait_s = 2 * rollout.answer_timeout_s + max(step_s, held_out_s) + UNLIMITED_WORK_S
    return min(wait_s, LONGEST_S)


def timeout() -> timedelta:
    """Return how long collectives of this run wait; pass it to every new group."""
    return timedelta(seconds=_Start.wait_s)


def set_wait(wait_s: float) -> None:
    """Set how long the store waits, and the collectives of groups that are made from now on.

    megatron-core makes some groups without a limit. They take torch's default, which is set too.
    """
    _Start.wait_s = wait_s
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout()
    if _Start.store is not None:
        _Start.store.set_timeout(timeout())


def watch_links() -> None:
    """Have Linux end each TCP connection of this process whose other end vanished silently.

    Gloo's sockets only read while they wait, so they would never notice. Call this after the groups
    are made.
    """
    options = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": (LOST_LINK_S - 30) // 10}
    options["TCP_USER_TIMEOUT"] = LOST_LINK_S * 1000  # also for data sent but not acknowledged
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # not TCP, not connected, or closed since
            if not stat.S_ISSOCK(os.stat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as link:
                link.getpeername()
                link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in options.items():
                    link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


# --- who is waited for ------------------------------------------------------------------------


def joins_exchange(group: dist.ProcessGroup) -> None:
    """Count, in the store, that this rank has reached the next exchange of all ranks.

    An exchange of a smaller group is not counted.
    """
    if _Start.store is not None and group.size() == _Start.world_size:
        _Start.exchanges += 1
        try:
            _Start.store.set(f"exchanges/{_Start.rank}", str(_Start.exchanges))
        except RuntimeError:  # torchrun and its store are gone; the ranks still save a checkpoint
            _Start.store = None


def ranks_behind() -> list[int]:
    """Return the ranks that this rank has waited for in vain.

    These are the ranks that have not reached its exchange. If all have, the wait was in one of
    megatron-core's collectives: then they are the ranks that have not waited in vain themselves.
    """
    if _Start.store is None:
        return []
    store, ranks = _Start.store, range(_Start.world_size)
    store.set_timeout(timedelta(seconds=10))
    with contextlib.suppress(RuntimeError):  # the store may be behind the lost link
        store.set(f"waits in vain/{_Start.rank}", "1")
        keys = [f"exchanges/{rank}" for rank in ranks]
        reached = [int(store.get(key)) if store.check([key]) else 0 for key in keys]
        if behind := [rank for rank in ranks if reached[rank] < _Start.exchanges]:
            return behind
        time.sleep(5)  # for the other waiting ranks to write their entries
        here = [rank for rank in ranks if reached[rank] == _Start.exchanges]
        return [rank for rank in here if not store.check([f"waits in vain/{rank}"])]
    return []


def explain(error: RuntimeError) -> str:
    """Return what a collective's error means, in one sentence; "" if it is another error."""
    text, mine = str(error), f"rank {_Start.rank}"
    if "by peer" in text:
        return f"{mine} lost its connection to another rank; torchrun names that rank below"
    links = ("Connection timed out", "No route to host", "Network is unreachable")
    if any(words in text for words in links):
        address = re.search(r"\[([0-9a-f.:]+)\]:\d", text)
        where = f"the rank at {address[1]}" if address else "another rank"
        return f"{mine} cannot reach {where}: its machine, or the link to it, is gone"
    if "Timed out" not in text and "wait timeout" not in text:  # gloo's; a store's
        return ""
    behind = ranks_behind()
    if not behind:
        return f"{mine} has waited {_Start.wait_s:g} s for another rank; the traceback says where"
    who = f"rank {behind[0]}" if len(behind) == 1 else f"the ranks {', '.join(map(str, behind))}"
    what = f"{mine} has waited {_Start.wait_s:g} s for {who} at or after exchange"
    return f"{what} {_Start.exchanges}; a rank that does not arrive hangs or was stopped"


# --- how ranks find each other ----------------------------------------------------------------


def join_store() -> tuple[dist.Store, int, int]:
    """Return (a store that only the ranks of this start write to, this rank, the world size).

    Collective; later calls return the same. torchrun keeps one store for all starts of a job, which
    still holds the addresses of ranks that have ended. TORCHELASTIC_RESTART_COUNT does not identify
    a start, because each node counts its own. So rank 0 draws a name for the start. Every other
    rank accepts a name only after rank 0 has answered this very process under it.
    """
    if _Start.store is None:
        store, _Start.rank, _Start.world_size = _job_store()
        _Start.of_the_job = dist.PrefixStore("nanoslime", store)
        name = _name_of_start(_Start.of_the_job, _Start.rank, _Start.world_size)
        _Start.store = dist.PrefixStore(name, _Start.of_the_job)
    return _Start.store, _Start.rank, _Start.world_size


def _job_store() -> tuple[dist.Store, int, int]:
    """Return torchrun's store, this rank and the world size."""
    if is_one_machine():
        listen_on_loopback()
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if os.environ["WORLD_SIZE"] == "1" and not of_torchrun:
        return dist.HashStore(), 0, 1  # no other rank, so no port is opened
    return next(rendezvous("env://"))


def _name_of_start(store: dist.Store, rank: int, world_size: int) -> str:
    """Return the name of this start. Collective; see join_store."""
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("start", mine)
        for other in range(1, world_size):
            store.set(f"{mine}/{store.get(f'{mine}/{other}').decode()}", "welcome")
        return mine
    name = ""
    while not name or not store.check([f"{name}/{mine}"]):
        if (newest := store.get("start").decode()) != name:
            name = newest  # perhaps of an earlier start, whose rank 0 no longer answers
            store.set(f"{name}/{rank}", mine)
        time.sleep(0.01)
    return name


def after_restart(settings):
    """Return a loop's settings, changed so that a run which torchrun has restarted continues.

    If the run folder has a checkpoint, the run resumes as with --resume. Otherwise the folder is
    renamed and the run starts again under its name. Collective with torchrun --max-restarts;
    otherwise the settings are returned unchanged.
    """
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return settings
    store, rank, _ = join_store()
    if rank == 0:
        store.set("goes on", json.dumps(_before_restart()))
    name, resume = json.loads(store.get("goes on"))
    if not name:
        return settings
    _Start.goes_on = resume
    return replace(settings, run=replace(settings.run, name=name, resume=resume))


def _before_restart() -> tuple[str, bool]:
    """Return (the name of the run that earlier ranks started, whether it has a checkpoint).

    Without a checkpoint the run's folder is renamed. The name is "" if no run was started.
    """
    if not _Start.of_the_job.check(["run"]):
        return "", False
    name = _Start.of_the_job.get("run").decode()
    folder = Path("runs") / name
    if any(re.fullmatch(r"step-\d+", path.name) for path in (folder / "checkpoints").glob("*")):
        return name, True
    if folder.exists():
        set_aside(folder)
    return name, False


def set_aside(folder: Path) -> Path:
    """Rename a run's folder to NAME-restarted-1, or the next number that is free; return that."""
    aside = (Path(f"{folder}-restarted-{i}") for i in count(1))
    return folder.rename(next(path for path in aside if not path.exists()))


def exchange(key: str, mine: str) -> list[str]:
    """Return the texts of all ranks, in rank order, before there are groups. Collective.

    key: another one for each exchange of a start.
    """
    store, rank, world_size = join_store()
    store.set(f"{key}/{rank}", mine)
    return [store.get(f"{key}/{other}").decode() for other in range(world_size)]


def goes_on() -> bool:
    """Return whether torchrun has restarted this rank in a run that has a checkpoint."""
    return _Start.goes_on


def remember_run(name: str) -> None:
    """Store the run's name for ranks that torchrun may start in place of these. Rank 0 only."""
    if _Start.of_the_job is not None:
        _Start.of_the_job.set("run", name)


# --- the addresses that ranks listen on -------------------------------------------------------


def is_one_machine() -> bool:
    """Return whether all ranks are known to be on this machine."""
    world_size = os.environ.get("WORLD_SIZE")
    return world_size == "1" or os.environ.get("LOCAL_WORLD_SIZE") == world_size is not None


def listen_on_loopback() -> None:
    """Make gloo and torch's TCPStore listen on 127.0.0.1 only. NCCL is unchanged.

    By default gloo listens on the address of the machine's name, and a TCPStore on every interface.
    A GLOO_SOCKET_IFNAME that is already set is kept.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME") or "lo"
    # Not `import torch.distributed.rendezvous`: that name is a function in the package.
    module = sys.modules["torch.distributed.rendezvous"]
    stock = module.TCPStore
    if hasattr(stock, "listens_on_loopback"):
        return  # a restarted rank has joined its job's store before, and so has a spare of it

    def store(host_name, port, *args, is_master=False, **kwargs):
        if is_master and host_name in ("127.0.0.1", "localhost"):
            listener = socket.create_server(("127.0.0.1", port))
            kwargs["master_listen_fd"] = listener.detach()
        return stock(host_name, port, *args, is_master=is_master, **kwargs)

    store.listens_on_loopback = True
    module.TCPStore = store


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Yield a free TCP port of 127.0.0.1 on which a child process may listen meanwhile.

    A port that is only looked up may be another program's before the child listens on it. This one
    stays bound: the system gives it to nobody who asks for any port, and a listener that sets
    SO_REUSEADDR, as TCPStore does, may still bind it by number.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def interface_problem() -> str:
    """Return why gloo could not listen on an address that other ranks reach; "" if it can.

    Gloo takes the first address of the machine's name that belongs to the machine. On Debian that
    is 127.0.1.1, and for an unknown name it is 127.0.0.1.
    """
    here, all_ranks = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("WORLD_SIZE")
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME"):
        known = [name for _, name in socket.if_nameindex()]
        if unknown := set(chosen.split(",")) - set(known):
            found = f"GLOO_SOCKET_IFNAME={chosen}: {sorted(unknown)[0]!r} is no network interface"
            return f"{found} of this machine, which has {', '.join(known)}: use one of these"
        return ""
    if here is None or here == all_ranks:
        return ""
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        for _, _, _, _, address in socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM):
            if not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
                return ""
    about = f"this machine's name, {name}, has no address that other machines can reach"
    return f"{about}: set GLOO_SOCKET_IFNAME to its interface, as in GLOO_SOCKET_IFNAME=eth0"
