// `headstart inspect`: what a model is and needs, without loading its weights.
#pragma once

#include <functional>

#include "CLI/CLI.hpp"

namespace headstart {

// Adds the subcommand. When it is the chosen one its exit code goes to `set_exit_code`.
void AddInspectCommand(CLI::App& app, std::function<void(int)> set_exit_code);

}  // namespace headstart
