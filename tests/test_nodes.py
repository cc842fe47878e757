"""Machines with addresses of their own, as network namespaces: what listens there, and two nodes.

Where this machine does not allow such namespaces, these tests are skipped, with its reason. A link
that is cut stands for a cable that is pulled and for a machine that is gone. Not covered: NCCL, and
a network file system (both nodes see the file system of this machine).
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

ALONE = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--fork", "--kill-child"]
# Two namespaces, a and b, and a cable between them.
TWO_NODES = """
mount -t tmpfs none /run
ip netns add a; ip netns add b
ip link add va netns a type veth peer name vb netns b
ip -n a addr add 10.77.0.1/24 dev va; ip -n b addr add 10.77.0.2/24 dev vb
for node in a b; do ip -n $node link set v$node up; ip -n $node link set lo up; done
"""
# One namespace, in which this machine's name is an address that others could reach.
ONE_NODE = """
ip link set lo up; ip link add va type veth peer name vb
ip addr add 10.77.0.1/24 dev va; ip link set va up; ip link set vb up
printf '127.0.0.1 localhost\\n10.77.0.1 %s\\n' $(hostname) > hosts
mount --bind hosts /etc/hosts
"""
TORCHRUN = f"{sys.executable} -m torch.distributed.run"
LOOP = f"{ROOT / 'loop_sync.py'} --eval-samples 8 --prompts-per-step 4 --samples-per-prompt 4"
LOOP += " --steps 5000 --name long"


class Namespace:
    """A shell script in namespaces of its own; whatever it has started ends with it."""

    def __init__(self, folder: Path, script: str):
        self.output = open(folder / "output", "w+", encoding="utf-8")
        env = {name: value for name, value in os.environ.items() if name != "GLOO_SOCKET_IFNAME"}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        streams = dict(stdout=self.output, stderr=subprocess.STDOUT)
        command = [*ALONE, "sh", "-ec", script]
        self.process = subprocess.Popen(command, cwd=folder, env=env, **streams)
        self.metrics = folder / "runs" / "long" / "metrics.jsonl"

    def wait_for_rows(self, rows: int) -> None:
        deadline = time.time() + 240
        while not self.metrics.exists() or self.metrics.read_bytes().count(b"\n") < rows:
            assert self.process.poll() is None and time.time() < deadline, self.text()
            time.sleep(0.2)

    def text(self) -> str:
        self.output.seek(0)
        return self.output.read()

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def begin(tmp_path):
    begun = []

    def begin(setup: str, script: str) -> Namespace:
        tried = subprocess.run([*ALONE, "sh", "-ec", setup], cwd=tmp_path, capture_output=True)
        if tried.returncode:
            pytest.skip(f"no network namespaces here: {tried.stderr.decode().strip()}")
        begun.append(Namespace(tmp_path, setup + script))
        return begun[-1]

    yield begin
    for namespace in begun:
        family = namespace.family() if namespace.process.poll() is None else []
        for process in [*family, namespace.process]:
            process.kill()
        namespace.process.wait()


def listening(process: psutil.Process) -> set[str]:
    """The addresses that a process listens on, in whatever namespace: as /proc writes them."""
    folder, sockets = Path("/proc", str(process.pid)), set()
    for fd in (folder / "fd").iterdir():
        sockets.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
    rows = [
        row.split()
        for name in ("tcp", "tcp6")
        for row in (folder / "net" / name).open(encoding="ascii")
    ]
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}


def is_running(process: psutil.Process) -> bool:
    """Tell whether it is there; a zombie has ended, and its parent has not noticed."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.complete
def test_ranks_and_engines_listen_on_the_loopback_whatever_the_machine_s_name_is(begin):
    """torchrun's own store, which listens on every interface, is not ours."""
    node = begin(ONE_NODE, f"exec {TORCHRUN} --standalone --nproc-per-node 2 {LOOP}")
    node.wait_for_rows(1)
    (job,) = [p for p in node.family() if "torch.distributed.run" in p.cmdline()]
    family = job.children(recursive=True)
    listens = {address for process in family for address in listening(process)}
    assert len(family) >= 4 and listens == {"0100007F"}, node.text()  # 127.0.0.1


@pytest.mark.complete
def test_two_nodes_train_until_the_cable_is_pulled(begin, tmp_path):
    """Ranks and engines end. The second node's torchrun, whose store is gone, takes TCP's time."""

    def start(node: str, address: str) -> str:
        where = f"--nnodes 2 --nproc-per-node 1 --local-addr {address} --rdzv-backend c10d"
        where += f" --rdzv-endpoint 10.77.0.1:29500 --rdzv-conf is_host={int(node == 'a')}"
        interface = f"env GLOO_SOCKET_IFNAME=v{node}"
        return f"ip netns exec {node} {interface} {TORCHRUN} {where} {LOOP} &\n"

    cut = "until [ -e cut ]; do sleep 0.2; done; ip -n a link set va down; wait"
    nodes = begin(TWO_NODES, start("a", "10.77.0.1") + start("b", "10.77.0.2") + cut)
    nodes.wait_for_rows(3)
    ranks = [p for p in nodes.family() if ROOT.joinpath("loop_sync.py") in map(Path, p.cmdline())]
    ranks = [p for p in ranks if "torch.distributed.run" not in p.cmdline()]
    assert len(ranks) == 2
    (tmp_path / "cut").touch()
    deadline = time.time() + 200
    while left := [rank for rank in ranks if is_running(rank)]:
        if time.time() > deadline:
            for rank in left:
                rank.send_signal(signal.SIGABRT)  # Python's faulthandler prints where it hangs
            time.sleep(2)
            pytest.fail(nodes.text())
        time.sleep(0.5)
    for rank, other in enumerate(["10.77.0.2", "10.77.0.1"]):
        gone = f"error: rank {rank} cannot reach the rank at {other}: its machine, or the link"
        assert gone in nodes.text()
