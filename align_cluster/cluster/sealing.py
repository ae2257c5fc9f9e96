"""Brings variables that are secret, such as a token, to a run's driver and its workers without writing them down.

Ray writes the variables of a job, and the arguments of actors, into its store and its logs. So secrets travel sealed,
as a text that only the cluster's own token opens, and whoever has that token may run code on the cluster anyway. Where
a cluster has no token, nothing is sent, and each node's own environment counts.
"""

import base64
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from align_cluster.errors import UserError

if TYPE_CHECKING:
    from cryptography.fernet import Fernet

    from align_cluster.config.run import RunConfig
    from align_cluster.rewards.http import Token

SEALED = "ALIGN_CLUSTER_SEALED"  # the variable in which `submit` hands sealed secrets to a job
HUB = "HF_TOKEN"  # goes to all workers where the driver has it: they read gated models
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the driver of a job
ANSWER_S = 60.0  # seconds for all nodes to look into their environment, since each starts a process first
SALT = b"align_cluster: secrets of a run"


def has_token() -> bool:
    """Tell whether the cluster that this process talks to asks for a token, with which secrets are sealed."""
    return os.environ.get("RAY_AUTH_MODE") == "token"


def seal(values: Mapping[str, str]) -> str:
    """Return variables and their values as a text that only `opened` can read, on a machine with the same Ray token."""
    return _cipher(_ray_token()).encrypt(json.dumps(dict(values)).encode()).decode() if values else ""


def opened(sealed: str) -> dict[str, str]:
    """Return the variables in a sealed text; "" has none. UserError where it was sealed with another token."""
    if not sealed:
        return {}
    from cryptography.fernet import InvalidToken

    try:
        return json.loads(_cipher(_ray_token()).decrypt(sealed.encode()))
    except InvalidToken:
        raise UserError(
            f"the variables of this run were sealed with another Ray token than {platform.node()} has; give the same "
            "one to all nodes and to whoever submits runs"
        ) from None


def take(sealed: str) -> None:
    """Put sealed variables into the environment of this process, where what it loads looks for them."""
    os.environ.update(opened(sealed))


def check(config: "RunConfig") -> None:
    """Take what `submit` has sent, and read every token that the run names, in its driver.

    UserError says that the driver's environment lacks one.
    """
    take(os.environ.get(SEALED, ""))
    job = IN_A_JOB in os.environ
    for where, token in _tokens(config):
        try:
            token.read(f"the run's driver, {'a Ray job' if job else 'this process'} on {platform.node()}")
        except UserError as error:
            hint = f"; `submit --env {token.env}` sends yours" if job and token.env else ""
            raise UserError(f"{where.rpartition('.')[0]}.{error}{hint}") from None


def check_workers(config: "RunConfig") -> None:
    """Look for the run's variables on all nodes of a cluster to which `for_workers` sends none.

    UserError names the nodes that lack one.
    """
    names = variables(config)
    if not names or has_token() or not _joined(config.cluster.address):
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    task = ray.remote(num_cpus=0)(_missing)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    answers = ray.get([task.options(scheduling_strategy=place).remote(names) for place in places], timeout=ANSWER_S)
    for name in names:
        lacking = [node["NodeManagerAddress"] for node, missing in zip(nodes, answers, strict=True) if name in missing]
        if lacking:
            raise UserError(
                f"{name} is set for the run's driver, and not for Ray's workers on {', '.join(lacking)}: this cluster "
                "asks for no token (RAY_AUTH_MODE) to seal it with on its way; set it there before `ray start`"
            )


def for_workers(config: "RunConfig") -> str:
    """Return, sealed, what a run's workers need of the driver's environment."""
    return seal_for(config.cluster.address, [*variables(config), *opened(os.environ.get(SEALED, ""))])


def seal_for(address: str | None, names: Iterable[str]) -> str:
    """Return variables of this process, sealed, and HF_TOKEN with them, for workers on the cluster at `address`.

    It is "" where they have them anyway, as the workers of a private Ray do, and where nothing can be sealed.
    """
    if not _joined(address) or not has_token():
        return ""
    return seal({name: os.environ[name] for name in (*names, HUB) if name in os.environ})


def variables(config: "RunConfig") -> list[str]:
    """Return the names of the variables that hold the run's tokens."""
    return list(dict.fromkeys(token.env for _, token in _tokens(config) if token.env))


def _tokens(config: "RunConfig") -> Iterable[tuple[str, "Token"]]:
    from align_cluster.rewards.http import Token

    return [(where, block) for where, block in config.blocks() if isinstance(block, Token)]


def _joined(address: str | None) -> bool:
    return bool(address or os.environ.get("RAY_ADDRESS"))


def _missing(names: list[str]) -> list[str]:
    return [name for name in names if not os.environ.get(name)]


def _ray_token() -> str:
    from ray._raylet import AuthenticationTokenLoader

    return AuthenticationTokenLoader.instance().get_raw_token(ignore_auth_mode=True)


@lru_cache(maxsize=4)
def _cipher(token: str) -> "Fernet":
    from cryptography.fernet import Fernet

    key = hashlib.scrypt(token.encode(), salt=SALT, n=2**14, r=8, p=1, dklen=32)  # slow: a token may be a weak one
    return Fernet(base64.urlsafe_b64encode(key))
