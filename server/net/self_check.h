// Asks the server's own health service through its own listener, as a client would.
#pragma once

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/net/listener.h"

namespace headstart {

// OK when a new connection was accepted and the health service answered on it, whatever it said.
// Goes past TLS, so it needs no certificate: see Listener::ConnectToSelf.
absl::Status CheckThroughListener(Listener& listener, absl::Duration timeout);

}  // namespace headstart
