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
SILENCE_S = 60.0  # after which it is gone; it answers between two steps, which may take longer than one call


def drain(address: str, timeout_s: float, is_over: Callable[[], bool] = lambda: False, token: str = "") -> int:
    """Calls with the cluster's token. How many requests were left after `timeout_s`, or when it `is_over`.

    Of a node that is gone: how many it had when it was heard last; 0 where it never was, for then it has none.
    """
    deadline, heard_s, num_left, drains = time.monotonic() + timeout_s, time.monotonic(), 0, False
    metadata = ((AUTHORIZATION, f"Bearer {token}"),) if token else None
    with grpc.insecure_channel(address) as channel:
        control = node_pb2_grpc.NodeControlStub(channel)  # type: ignore[no-untyped-call]
        while True:
            try:
                if drains:
                    load = control.GetLoad(node_pb2.GetLoadRequest(), timeout=CALL_S, metadata=metadata)
                else:
                    load = control.Drain(node_pb2.DrainRequest(), timeout=CALL_S, metadata=metadata)
                heard_s, num_left, drains = time.monotonic(), load.num_running + load.num_waiting, load.draining
            except grpc.RpcError as error:
                is_late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                if not is_late or time.monotonic() > heard_s + SILENCE_S:
                    logger.warning("event=drain_failed address=%s error=%s", address, error)
                    return num_left
            if (drains and not num_left) or time.monotonic() > deadline or is_over():
                return num_left
            time.sleep(POLL_S)
