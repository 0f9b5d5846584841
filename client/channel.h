// The gRPC channel of a client: credentials, limits, keepalive, load balancing.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "client/prefill_client.h"
#include "grpcpp/channel.h"

namespace headstart {

// INVALID_ARGUMENT: no target, or a TLS file that can't be read. Does not connect yet.
absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const PrefillClientOptions& options);

}  // namespace headstart
