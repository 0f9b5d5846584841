// `headstart loads`: how busy a server is.
#pragma once

#include <functional>

#include "CLI/App.hpp"

namespace headstart {

// Adds the subcommand. When it is the chosen one its exit code goes to `set_exit_code`.
void AddLoadsCommand(CLI::App& app, std::function<void(int)> set_exit_code);

}  // namespace headstart
