// Goes a client's way through the own listener: to the health service, and through the TLS
// handshake.
#pragma once

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/net/listener.h"

namespace headstart {

// OK when a new connection was accepted and the health service answered on it, whatever it said.
// Goes past TLS, so it needs no certificate: `serve_health` gets the accepted end and must serve it
// nothing but health, in plain text.
absl::Status CheckThroughListener(Listener& listener, const Listener::Handler& serve_health,
                                  absl::Duration timeout);

// OK when a new connection gets as far as a client's handshake must: the server shows a certificate
// that is valid now, and proves that it has its key. `serve` gets the accepted end, as it gets
// those of clients. Stops before it would be the client's turn to show one.
absl::Status CheckTlsHandshake(Listener& listener, const Listener::Handler& serve,
                               absl::Duration timeout);

}  // namespace headstart
