// What a call says besides its message: who it is from, its names, its deadline.
#pragma once

#include <grpcpp/server_context.h>

#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/instant.h"
#include "server/ops/trace_context.h"
#include "server/options.h"

namespace headstart {

// PERMISSION_DENIED when the server wants certain names in client certificates and this client's
// has none of them.
absl::Status CheckPeer(const grpc::ServerContextBase& call, const ServerTlsOptions& tls);

// Whose certificate the client has shown: the first of its subject alternative names that is
// allowed, or its common name where it has none. Empty where the server wants no certificates.
std::string PeerName(const grpc::ServerContextBase& call, const ServerTlsOptions& tls);

// The message's id, else the one in the metadata x-request-id, else a random one. INVALID_ARGUMENT
// when the one that counts is no good id.
absl::StatusOr<std::string> ChooseRequestId(const std::string& from_message,
                                            const grpc::ServerContextBase& call);

// The call's W3C traceparent, if it is valid.
std::optional<TraceContext> TraceParent(const grpc::ServerContextBase& call);

// The client's deadline, or the default one; no later than the longest that the server allows.
Instant EffectiveDeadline(const grpc::ServerContextBase& call, const ServerOptions& options);

}  // namespace headstart
