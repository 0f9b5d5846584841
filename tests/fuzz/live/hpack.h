// Header blocks of HTTP/2 (RFC 7541), right and wrong.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "tests/fuzz/live/hostile_message.h"

namespace headstart::testing {

using HeaderList = std::vector<std::pair<std::string, std::string>>;

// The headers of a call of gRPC; each of them with this probability changed, left out or repeated,
// and others beside them.
HeaderList HostileHeaders(Random& random, int64_t mischief, const std::string& path);

// Encoded in any of the ways that there are; with mischief in ways that there are not.
std::string HpackBlock(Random& random, int64_t mischief, const HeaderList& headers);

}  // namespace headstart::testing
