// How a server's options are given: flags, environment, config file.
#pragma once

#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "server/options.h"

namespace headstart {

// Adds every option as a flag with help and with an environment variable: --drain-timeout is also
// HEADSTART_DRAIN_TIMEOUT.
void AddServerOptions(CLI::App* app, ServerOptions* options);

// Only those that say which model, where and how large.
void AddModelOptions(CLI::App* app, ServerOptions* options);

// Sets the options of `app` that neither command line nor environment has set from a TOML file with
// one `name = value` a line. INVALID_ARGUMENT names the file and what is wrong in it.
absl::Status ApplyConfigFile(CLI::App* app, const std::string& path);

// Twelve hex digits of the SHA-256 of all options of `app` as they were given, but for the
// listeners', which differ from server to server.
std::string HashOptions(const CLI::App& app);

// The environment variable of a flag: "drain-timeout" -> "HEADSTART_DRAIN_TIMEOUT".
std::string EnvironmentName(const std::string& flag);

}  // namespace headstart
