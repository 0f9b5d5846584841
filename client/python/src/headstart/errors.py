"""What a call can end with."""

from __future__ import annotations

import dataclasses

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

ERROR_DOMAIN = "headstart.v1"
_DETAILS_KEY = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclasses.dataclass(frozen=True)
class FieldViolation:
    field: str
    description: str


class HeadstartError(Exception):
    """A call failed. Can be pickled.

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

    def __reduce__(self):
        return _restore, (type(self), self.args, self.__dict__)


class HeadstartDataLoss(HeadstartError):
    """The stream was not what the wire format promises, or broke after its first chunk. Nothing of it may be used."""

    def __init__(self, message: str, **details) -> None:
        super().__init__(grpc.StatusCode.DATA_LOSS, message, **details)


def make_error(code: grpc.StatusCode, message: str, details=()) -> HeadstartError:
    """Of a status with its google.rpc details (Any messages). Details that make no sense are left out."""
    values: dict = {}
    for detail in details:
        values.update(_read_detail(detail))
    if code == grpc.StatusCode.DATA_LOSS:
        return HeadstartDataLoss(message, **values)
    return HeadstartError(code, message, **values)


def from_status(serialized: bytes) -> HeadstartError:
    """Of a serialised google.rpc.Status that is not OK."""
    status = status_pb2.Status.FromString(serialized)
    return make_error(_CODES.get(status.code, grpc.StatusCode.UNKNOWN), status.message, status.details)


def from_rpc_error(error: grpc.RpcError) -> HeadstartError:
    """Of a failed call."""
    return make_error(error.code(), error.details() or "", _status_details(error))


def _read_detail(detail) -> dict:
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    try:
        if detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            return {"reason": info.reason}
        if detail.Unpack(bad_request):
            violations = bad_request.field_violations
            return {"field_violations": tuple(FieldViolation(v.field, v.description) for v in violations)}
        if detail.Unpack(retry):
            return {"retry_delay_s": max(0.0, retry.retry_delay.seconds + retry.retry_delay.nanos * 1e-9)}
    except DecodeError:
        pass
    return {}


def _status_details(error: grpc.RpcError) -> list:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return []


def _restore(cls: type, args: tuple, state: dict) -> HeadstartError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error
