// Exit codes of the `headstart` program.
#pragma once

#include "absl/status/status.h"

namespace headstart {

inline constexpr int kExitOk = 0;
inline constexpr int kExitUsage = 2;         // a flag, the environment, or the config file
inline constexpr int kExitModel = 3;         // a model that can't be run
inline constexpr int kExitListen = 4;        // a port, an address, a certificate
inline constexpr int kExitRuntime = 5;       // everything later
inline constexpr int kExitBackend = 6;       // the backend was lost: a GPU that gave up its context
inline constexpr int kExitSignalBase = 128;  // plus the number of the second signal

// For what loading a model or serving it ended with.
int ExitCodeOf(const absl::Status& status);

}  // namespace headstart
