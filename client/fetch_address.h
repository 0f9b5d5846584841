// Where detached KV is fetched from.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/client_options.h"

namespace headstart {

// The gRPC target of the server that answered with Accepted.fetch_address. `peer` is the address
// that the call reached, as gRPC names it ("ipv4:10.0.0.7:8443"); empty where nobody knows it.
//   empty fetch_address   the peer, or the client's own target
//   else                  that address, when its host is the target's, the peer's or an allowed one
// DATA_LOSS when it is no host:port, PERMISSION_DENIED when its host is not allowed.
absl::StatusOr<std::string> FetchTarget(const PrefillClientOptions& options,
                                        const std::string& fetch_address, const std::string& peer);

// The name that a certificate must carry when a server is reached as `fetch_target`: the client's
// tls.server_name, or for an IP address, which certificates of pods can't know, the host of the
// client's target. Empty: as gRPC does it.
std::string FetchServerName(const PrefillClientOptions& options, absl::string_view fetch_target);

}  // namespace headstart
