// The listener's credentials.
#pragma once

#include <grpcpp/security/server_credentials.h>

#include <memory>

#include "absl/status/statusor.h"
#include "server/options.h"

namespace headstart {

// Plain text, TLS or mTLS as the options say. Certificates are read again when their files change.
// INVALID_ARGUMENT names the file that can't be read, is no PEM, or does not fit the other.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeCredentials(
    const ServerTlsOptions& options);

}  // namespace headstart
