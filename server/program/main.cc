#include "CLI/CLI.hpp"
#include "client/commands/bench_command.h"
#include "client/commands/loads_command.h"
#include "client/commands/request_command.h"
#include "kernels/base/idle_threads.h"
#include "server/program/exit_code.h"
#include "server/program/inspect_command.h"
#include "server/program/model_hash_command.h"
#include "server/program/serve_command.h"
#include "server/program/terminate.h"
#include "server/version.h"

int main(int argc, char** argv) {
  headstart::LimitIdleSpinning(argv);
  headstart::EndWhereResourcesLack();
  CLI::App app("Headstart: prefill for disaggregated LLM serving", "headstart");
  app.set_version_flag("--version", headstart::kVersion);
  app.require_subcommand(1);
  int exit_code = headstart::kExitOk;
  const auto set_exit_code = [&exit_code](int code) { exit_code = code; };
  headstart::AddServeCommand(app, set_exit_code);
  headstart::AddInspectCommand(app, set_exit_code);
  headstart::AddModelHashCommand(app, set_exit_code);
  headstart::AddRequestCommand(app, set_exit_code);
  headstart::AddBenchCommand(app, set_exit_code);
  headstart::AddLoadsCommand(app, set_exit_code);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? headstart::kExitOk : headstart::kExitUsage;
  }
  return exit_code;
}
