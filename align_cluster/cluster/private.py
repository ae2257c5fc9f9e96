"""Starts a private Ray on this machine: its token, the addresses that it listens on, and a machine that is busy."""

import os
import secrets
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray

from align_cluster.cluster.checks import token_file
from align_cluster.errors import UserError
from align_cluster.interrupts import interrupted
from align_cluster.machine import cores, memory

if TYPE_CHECKING:
    from align_cluster.cluster.preload import Preload

STARTS = 3  # a busy machine may need several, and each gets more time
PATIENCE_S = 30.0  # that Ray gives its processes to start; the second try has twice as long, the third four times
SAME_SIGNAL_S = 0.2  # within which a signal to all processes of a group has come to this one too
REACH_S = 5.0  # what another port of this machine may take to answer
HANDSHAKE_S = 10.0  # what a Ray may take to answer as one on a busy machine
RAYLET_DIED = 2  # exit code, as of every error that a sentence explains
END_S = 5.0  # what a failed start may take to end its processes, before they are killed


def start(within: Callable[[], AbstractContextManager] = nullcontext, **settings: Any) -> None:
    """Start a Ray whose processes listen on the loopback interface only. `within` makes a context that it starts in.

    Raises UserError where it does not start `STARTS` times, with the load of the machine.
    """
    make_token()
    settings = {"num_cpus": cores(), "include_dashboard": False} | settings
    for tries in range(1, STARTS + 1):
        others = set(_children())
        try:
            with within(), loopback_only(), patient(PATIENCE_S * 2 ** (tries - 1)):
                ray.init(address="local", **settings)
            return
        except Exception as error:  # a bare one where its processes are not up in time
            end([child for child in _children() if child not in others])
            reason, load = str(error).strip().splitlines()[0], os.getloadavg()[0]
            if tries == STARTS or not _late(error):
                again = f" in {tries} tries" if tries > 1 else ""
                raise UserError(
                    f"cluster.address: a Ray on this machine did not start{again} ({reason}), with a load of {load:.1f}"
                    f" on {cores()} cores; `align-cluster doctor` shows more"
                ) from error
            print(
                f"Ray did not start in time: the load is {load:.1f} on {cores()} cores; starting it again",
                file=sys.stderr,
            )


@contextmanager
def several(count: int, preload: "Preload | None" = None) -> Iterator[None]:
    """Start and join a Ray of `count` nodes on this machine, which share its cores and a third of its memory evenly.

    Raises UserError where there are fewer cores than nodes, or where it does not start.
    """
    from ray.cluster_utils import Cluster

    each = cores() // count
    if not each:
        raise UserError(f"--nodes {count}: this machine has {cores()} cores; ask for fewer nodes, or give --address")
    make_token()
    own = {"num_cpus": each, "object_store_memory": memory() // (3 * count)}
    others, started = set(_children()), None
    try:
        with preload.used_by_ray() if preload else nullcontext(), loopback_only(), patient(2 * PATIENCE_S):
            started = Cluster(initialize_head=True, head_node_args=own | {"include_dashboard": False})
            for _ in range(count - 1):
                started.add_node(**own)
            ray.init(address=started.address, log_to_driver=False, logging_level="error")
        yield
    finally:
        ray.shutdown()
        if started:
            started.shutdown()
        end([child for child in _children() if child not in others])


def _late(error: Exception) -> bool:
    """Tell whether another start may help: Ray raises bare exceptions where its processes are not up in time."""
    return type(error) in (Exception, RuntimeError) and any(word in str(error) for word in ("timed out", "Failed to"))


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def end(processes: Iterable[psutil.Process]) -> None:
    """End these processes: ask them first, and kill those that do not follow."""
    asked = list(processes)
    for process in asked:
        _quietly(process.terminate)
    _, left = psutil.wait_procs(asked, END_S)
    for process in left:
        _quietly(process.kill)


def _quietly(call: Any) -> None:
    try:
        call()
    except psutil.NoSuchProcess:
        return


@contextmanager
def watched() -> Iterator[None]:
    """End this process with one sentence where the raylet of its private Ray dies while what is inside runs.

    The main thread then hangs in Ray, which would end this process some ten seconds later, with pages of its log.
    """
    raylet, over = ray._private.worker._global_node.all_processes["raylet"][0].process, threading.Event()

    def watch() -> None:
        code = raylet.wait()
        time.sleep(SAME_SIGNAL_S)
        if over.is_set() or interrupted():
            return
        print(
            f"error: Ray's raylet on this machine has died ({f'signal {-code}' if code < 0 else f'exit code {code}'}), "
            "and the run with it; the system's log tells whether memory ran out. Start again with --resume auto",
            file=sys.stderr,
            flush=True,
        )
        os._exit(RAYLET_DIED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Let a Ray that starts in this context wait so long for each of its servers, while they live.

    Ray reads a variable for the GCS; for the raylet its 30 s stand in its code.
    """
    from ray._private import services

    real, name = services.get_node, "RAY_gcs_server_port_wait_time_s"
    before, until = os.environ.get(name), time.monotonic() + seconds

    def get_node(*arguments: Any) -> Any:
        while True:
            try:
                return real(*arguments)
            except RuntimeError:  # it is not registered yet
                if time.monotonic() > until or not any(child.name() == "raylet" for child in _children()):
                    raise
            time.sleep(0.2)

    os.environ.setdefault(name, str(int(seconds)))
    services.get_node = get_node
    try:
        yield
    finally:
        services.get_node = real
        if before is None:
            del os.environ[name]


@contextmanager
def loopback_only() -> Iterator[None]:
    """Let a Ray that starts in this context have 127.0.0.1 as its address, as it has by itself on macOS and Windows.

    All of its servers then listen there only. Otherwise they listen on all interfaces.
    """
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def is_private(address: str) -> bool:
    """Tell whether the Ray at `address` listens on the loopback interface only.

    Ray puts this machine's other address in the place of 127.0.0.1, where such a Ray is not found. Raises OSError where
    no Ray listens at an address of host and port: Ray would try for minutes.
    """
    from ray._private import services

    if address == "auto":
        address = services.get_ray_address_from_environment("auto", None)
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isdigit():
        return False
    socket.create_connection((host, int(port)), REACH_S).close()
    _handshake(address)
    if host not in ("127.0.0.1", "localhost"):
        return False
    try:
        socket.create_connection((services.get_node_ip_address(), int(port)), REACH_S).close()
    except OSError:
        return True
    return False


def _handshake(address: str) -> None:
    """Raise OSError where what listens at an address is no Ray, which speaks gRPC: Ray itself would try for minutes."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("0", "false"):  # which needs the certificates that Ray has
        return
    import grpc

    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(HANDSHAKE_S)
        except grpc.FutureTimeoutError:
            raise OSError("what listens there is no Ray") from None


def make_token() -> None:
    """Make Ray's token file, unless it is there, so that only this user can read it: Ray would let everyone.

    Raises UserError where others can read it and this user cannot change that.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    file = token_file()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if file.parent == Path.home() / ".ray":
            _tighten(file.parent, 0o700)
        if not file.exists():
            _create(file, secrets.token_hex(32))
        _tighten(file, 0o600)
        if not file.read_text(encoding="utf-8").strip():
            raise UserError(f"{file}: Ray's token is empty; remove the file, and the next run makes one")
    except OSError as error:
        raise UserError(
            f"{file}: Ray's token must be readable for you alone ({error.strerror}); make it so with chmod 600, or "
            "name another file by RAY_AUTH_TOKEN_PATH"
        ) from error


def _create(file: Path, text: str) -> None:
    """Write a new file whole and at once, because another Ray may start now and read it; an existing one stays."""
    descriptor, name = tempfile.mkstemp(dir=file.parent)  # which makes it 0600
    try:
        with open(descriptor, "w", encoding="ascii") as opened:
            opened.write(text)
        with suppress(FileExistsError):
            os.link(name, file)
    finally:
        os.unlink(name)


def _tighten(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) & ~mode:
        path.chmod(mode)
