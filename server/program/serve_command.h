// `headstart serve`.
#pragma once

#include <functional>

#include "CLI/CLI.hpp"
#include "server/server.h"

namespace headstart {

// Adds the subcommand. When it is the chosen one its exit code goes to `set_exit_code`.
void AddServeCommand(CLI::App& app, std::function<void(int)> set_exit_code);

// Serves until SIGTERM, SIGINT or a failure; returns the exit code. The first signal drains, the
// second ends the process at once. When a drain hangs, for instance in a backend that does not
// return, the process is ended a little after the drain timeout. `options` are valid. Called before
// other threads.
int RunServer(const ServerOptions& options, Server::EngineFactory make_engine);

}  // namespace headstart
