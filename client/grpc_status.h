// gRPC statuses as absl::Status, with the google.rpc details that came with them.
#pragma once

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/support/status.h"

namespace headstart {

// Same code and message. Each detail becomes a payload under its type URL
// ("type.googleapis.com/google.rpc.ErrorInfo").
absl::Status ToAbslStatus(const grpc::Status& status);

// The other way round: each payload becomes a detail.
google::rpc::Status ToRpcStatus(const absl::Status& status);

// The ErrorInfo of Headstart's own domain. A status without it was not made by the server's code:
// gRPC made it.
std::optional<google::rpc::ErrorInfo> ErrorInfoOf(const absl::Status& status);

// ErrorInfo.reason ("QUEUE_FULL"), or empty.
std::string ErrorReasonOf(const absl::Status& status);

// What RetryInfo says, never negative.
std::optional<absl::Duration> RetryDelayOf(const absl::Status& status);

// One line for people: code, reason, message, wrong fields. Control characters are escaped.
std::string DescribeStatus(const absl::Status& status);

}  // namespace headstart
