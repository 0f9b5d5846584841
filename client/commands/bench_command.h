// `headstart bench`: puts load on a running server, one prompt length and preset after the other.
#pragma once

#include <functional>

#include "CLI/App.hpp"

namespace headstart {

// Adds the subcommand. When it is the chosen one its exit code goes to `set_exit_code`.
void AddBenchCommand(CLI::App& app, std::function<void(int)> set_exit_code);

}  // namespace headstart
