"""Machine-readable details of a failed call, in gRPC's trailing metadata, in addition to its code and message."""

from __future__ import annotations

import math

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from router.errors import InvalidRequest, RouterError, TryLater

RETRY_AFTER = "retry-after-ms"  # with TryLater errors
DETAILS = "grpc-status-details-bin"  # a google.rpc.Status, where gRPC's libraries look for it

Metadata = tuple[tuple[str, str | bytes], ...]


def metadata_of(error: RouterError, code: grpc.StatusCode) -> Metadata:
    """The trailing metadata of the call that `error` ends."""
    if isinstance(error, TryLater):
        retry_ms = math.ceil(error.retry_after_s * 1000)
        delay = Duration()
        delay.FromMilliseconds(retry_ms)
        retry = error_details_pb2.RetryInfo(retry_delay=delay)
        return (RETRY_AFTER, str(retry_ms)), _details(error, code, retry)
    if isinstance(error, InvalidRequest):
        problem = str(error).removeprefix(f"{error.field}: ")
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=problem)
        return (_details(error, code, error_details_pb2.BadRequest(field_violations=[violation])),)
    return ()


def _details(error: RouterError, code: grpc.StatusCode, detail: Message) -> tuple[str, bytes]:
    # The message must equal the call's own: gRPC's libraries refuse details whose message differs.
    status = status_pb2.Status(code=code.value[0], message=str(error))
    status.details.add().Pack(detail)
    return DETAILS, status.SerializeToString()
