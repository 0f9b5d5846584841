// absl::Status to grpc::Status, with details that a client can act on.
#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace headstart {

// Code and message stay. The details (trailer grpc-status-details-bin) are a google.rpc.Status with
// ErrorInfo (domain "headstart.v1", reason), a BadRequest for INVALID_ARGUMENT that names its
// field, and a RetryInfo where the error has a delay.
grpc::Status ToGrpcStatus(const absl::Status& status);

}  // namespace headstart
