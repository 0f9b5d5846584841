// `headstart request`: sends one prompt and says what came of it.
#pragma once

#include "CLI/App.hpp"

namespace headstart {

// Adds the subcommand. When it is called its exit code goes to *exit_code.
void AddRequestCommand(CLI::App& app, int* exit_code);

}  // namespace headstart
