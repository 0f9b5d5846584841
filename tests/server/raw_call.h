// Calls with bytes in place of messages.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/server/server_fixture.h"

namespace headstart::testing {

// Sends these messages to a method of any kind of call, closes the client's side, and reads to the
// end. Responses are counted, not parsed.
CallResult RawCallOf(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                     const std::vector<std::string>& messages);

// The same for a method of headstart.v1.PrefillService.
CallResult RawCall(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                   const std::vector<std::string>& messages);

}  // namespace headstart::testing
