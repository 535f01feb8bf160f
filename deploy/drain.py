"""Empties a node before it is removed: it takes nothing more, and what it has is run to its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import grpc

from batonpb import node_pb2, node_pb2_grpc
from node.gate import AUTHORIZATION

logger = logging.getLogger(__name__)

POLL_S = 0.1
CALL_S = 5.0


def drain(address: str, timeout_s: float, is_over: Callable[[], bool] = lambda: False, token: str = "") -> int:
    """Calls with the cluster's token. How many requests were left after `timeout_s`, or when it `is_over`.

    0 too where the node does not answer, for then it has none.
    """
    deadline, metadata = time.monotonic() + timeout_s, ((AUTHORIZATION, f"Bearer {token}"),) if token else None
    with grpc.insecure_channel(address) as channel:
        control = node_pb2_grpc.NodeControlStub(channel)  # type: ignore[no-untyped-call]
        try:
            load = control.Drain(node_pb2.DrainRequest(), timeout=CALL_S, metadata=metadata)
            while (num_left := load.num_running + load.num_waiting) and time.monotonic() < deadline and not is_over():
                time.sleep(POLL_S)
                load = control.GetLoad(node_pb2.GetLoadRequest(), timeout=CALL_S, metadata=metadata)
        except grpc.RpcError as error:
            logger.warning("event=drain_failed address=%s error=%s", address, error)
            return 0
    return int(num_left)
