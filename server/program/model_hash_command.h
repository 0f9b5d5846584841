// `headstart model-hash`: the hash under which a model will be served, without serving it.
#pragma once

#include <functional>

#include "CLI/CLI.hpp"

namespace headstart {

// Adds the subcommand; `set_exit_code` gets its exit code.
void AddModelHashCommand(CLI::App& app, std::function<void(int)> set_exit_code);

}  // namespace headstart
