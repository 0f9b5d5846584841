// `headstart bench`: puts load on a running server, one prompt length and preset after the other.
#pragma once

#include "CLI/App.hpp"

namespace headstart {

// Adds the subcommand. When it is called its exit code goes to *exit_code.
void AddBenchCommand(CLI::App& app, int* exit_code);

}  // namespace headstart
