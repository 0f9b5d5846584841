"""What a call can end with."""

from __future__ import annotations

import dataclasses

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

ERROR_DOMAIN = "headstart.v1"
_DETAILS_KEY = "grpc-status-details-bin"


@dataclasses.dataclass(frozen=True)
class FieldViolation:
    field: str
    description: str


class HeadstartError(Exception):
    """A call failed.

    code: the gRPC status code. reason: name of the server's ErrorReason ("QUEUE_FULL"), empty when gRPC itself made the
    status. field_violations: what was wrong with the request. retry_delay_s: when the server suggests to come back, or None.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        field_violations: tuple[FieldViolation, ...] = (),
        retry_delay_s: float | None = None,
    ) -> None:
        super().__init__(f"{code.name}{f' ({reason})' if reason else ''}: {message}")
        self.code = code
        self.message = message
        self.reason = reason
        self.field_violations = field_violations
        self.retry_delay_s = retry_delay_s


class HeadstartDataLoss(HeadstartError):
    """The stream was not what the wire format promises, or broke after its first chunk. Nothing of it may be used."""

    def __init__(self, message: str) -> None:
        super().__init__(grpc.StatusCode.DATA_LOSS, message)


def from_rpc_error(error: grpc.RpcError) -> HeadstartError:
    """The status of a failed call with its google.rpc details. Details that can't be parsed are left out."""
    details: dict = {}
    for any_message in _status_details(error):
        info = error_details_pb2.ErrorInfo()
        bad_request = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if any_message.Unpack(info) and info.domain == ERROR_DOMAIN:
            details["reason"] = info.reason
        elif any_message.Unpack(bad_request):
            details["field_violations"] = tuple(
                FieldViolation(violation.field, violation.description) for violation in bad_request.field_violations
            )
        elif any_message.Unpack(retry):
            details["retry_delay_s"] = max(0.0, retry.retry_delay.ToTimedelta().total_seconds())
    return HeadstartError(error.code(), error.details() or "", **details)


def _status_details(error: grpc.RpcError) -> list:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return []
