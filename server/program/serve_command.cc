#include "server/program/serve_command.h"

#include <unistd.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/error.h"
#include "kernels/base/instant.h"
#include "kernels/base/machine.h"
#include "kernels/base/status_macros.h"
#include "server/ops/logging.h"
#include "server/program/exit_code.h"
#include "server/program/flags.h"
#include "server/program/load_progress.h"
#include "server/program/signals.h"
#include "server/version.h"

namespace headstart {
namespace {

// How much longer than the drain timeout the end may take.
constexpr absl::Duration kHangLimit = absl::Seconds(5);
// Of gRPC, listeners, timers and the log, before any client comes.
constexpr int32_t kServerThreads = 32;

struct ServeFlags {
  ServerOptions options;
  std::string config_file;
  bool print_config = false;
};

// The model before the device: what is wrong with it is said without touching one.
absl::StatusOr<std::unique_ptr<Engine>> LoadEngine(const ServerOptions& options) {
  const EngineOptions engine_options = ToEngineOptions(options);
  HEADSTART_RETURN_IF_ERROR(
      ReadModelConfig(engine_options.model_dir, engine_options.links).status());
  absl::StatusOr<std::unique_ptr<Backend>> backend = MakeBackend(options.backend);
  if (!backend.ok()) return AsUsageError(backend.status());
  HEADSTART_ASSIGN_OR_RETURN(ResolvedModel model, ResolveModel(engine_options, **backend));
  Log(LogLevel::kInfo, "memory plan",
      {{"device", (*backend)->device()},
       {"weight_bytes", model.plan.weight_bytes},
       {"kv_pool_bytes", model.plan.kv_pool_bytes},
       {"workspace_bytes", model.plan.workspace_bytes},
       {"scratch_bytes", model.plan.scratch_bytes},
       {"total_bytes", model.plan.total_bytes()},
       {"free_bytes", (*backend)->FreeBytes().value_or(-1)},
       {"host_kv_bytes", model.options.host_kv_bytes},
       {"host_free_bytes", FindFreeMemory().value_or(FreeMemory{-1, ""}).bytes}});
  return Engine::Create(std::move(model), *std::move(backend),
                        MakeLoadProgress(options.log_format));
}

std::string DraftOf(const std::string& path) { return path + ".tmp"; }

absl::Status CantWritePortFile(const std::string& path) {
  return absl::InvalidArgumentError(absl::StrCat("--port-file ", path, ": can't be written"));
}

// Before there are ports: whether there could be such a file.
absl::Status TryPortFile(const std::string& path) {
  if (path.empty()) return absl::OkStatus();
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored) || !std::ofstream(DraftOf(path))) {
    return CantWritePortFile(path);
  }
  std::remove(DraftOf(path).c_str());
  return absl::OkStatus();
}

// Complete or not at all: scripts wait for the file and read it.
absl::Status WritePortFile(const std::string& path, const Server& server) {
  if (path.empty()) return absl::OkStatus();
  const std::string draft = DraftOf(path);
  std::ofstream file(draft);
  file << nlohmann::json({{"port", server.port()}, {"admin_port", server.admin_port()}}).dump()
       << "\n";
  file.close();
  if (file.fail() || std::rename(draft.c_str(), path.c_str()) != 0) {
    return CantWritePortFile(path);
  }
  return absl::OkStatus();
}

[[noreturn]] void ExitNow(int code) {
  std::fflush(stderr);
  _exit(code);
}

int FailToStart(const absl::Status& status) {
  Log(LogLevel::kError, "can't start", {{"message", status.message()}});
  return kExitListen;
}

// The effective values in the form of a config file.
void PrintConfig(const CLI::App& command) {
  std::cout << command.config_to_str(/*default_also=*/true, /*write_description=*/true) << "\n";
}

int Serve(CLI::App* command, ServeFlags* flags) {
  absl::Status status;
  if (!flags->config_file.empty()) status = ApplyConfigFile(command, flags->config_file);
  if (status.ok()) status = ValidateOptions(flags->options);
  if (!status.ok()) {
    std::cerr << "headstart serve: " << status.message() << "\n";
    return kExitUsage;
  }
  if (flags->print_config) {
    PrintConfig(*command);
    return kExitOk;
  }
  flags->options.hash = HashOptions(*command);
  return RunServer(flags->options, [options = flags->options] { return LoadEngine(options); });
}

}  // namespace

void AddServeCommand(CLI::App& app, std::function<void(int)> set_exit_code) {
  auto flags = std::make_shared<ServeFlags>();
  CLI::App* command = app.add_subcommand("serve", "Serve a model over gRPC");
  AddServerOptions(command, &flags->options);
  command->add_option("--config", flags->config_file, "TOML file with options: name = value")
      ->envname(EnvironmentName("config"))
      ->configurable(false);
  command->add_flag("--print-config", flags->print_config, "Print the effective config and exit")
      ->configurable(false);
  command->final_callback([command, flags, set_exit_code = std::move(set_exit_code)] {
    set_exit_code(Serve(command, flags.get()));
  });
}

int RunServer(const ServerOptions& options, Server::EngineFactory make_engine) {
  InitLogging(options.log_format, options.log_level);
  if (const absl::Status status = TryPortFile(options.port_file); !status.ok()) {
    return FailToStart(status);
  }
  if (const absl::Status status = CheckThreads(kServerThreads); !status.ok()) {
    FailToStart(status);
    return kExitRuntime;
  }
  Mutex mutex;
  Server* running = nullptr;  // guarded by `mutex`
  bool signalled = false;     // likewise
  SignalWatcher watcher([&](int signal) {
    MutexLock lock(&mutex);
    if (std::exchange(signalled, true)) ExitNow(kExitSignalBase + signal);
    if (running != nullptr) running->Drain();
  });
  Timer watchdog;
  absl::StatusOr<std::unique_ptr<Server>> started = Server::Start(options, std::move(make_engine));
  if (!started.ok()) return FailToStart(started.status());
  std::unique_ptr<Server> server = *std::move(started);
  if (absl::Status status = WritePortFile(options.port_file, *server); !status.ok()) {
    ExitNow(FailToStart(status));  // nobody waits for the model any more
  }
  {
    MutexLock lock(&mutex);
    running = server.get();
    if (signalled) server->Drain();
  }
  Log(LogLevel::kInfo, "listening",
      {{"version", kVersion}, {"port", server->port()}, {"admin_port", server->admin_port()}});

  server->WaitForEnd();
  watchdog.Schedule(Instant::Now() + options.drain_timeout + kHangLimit, [] {
    Log(LogLevel::kError, "the end hangs: giving up");
    ExitNow(kExitRuntime);
  });
  const absl::Status status = server->Shutdown();
  Log(LogLevel::kInfo, "stopped", {{"message", status.message()}});
  if (server->loading()) ExitNow(ExitCodeOf(status));  // nobody waits for the model any more
  {
    MutexLock lock(&mutex);
    running = nullptr;
  }
  server.reset();
  return ExitCodeOf(status);
}

}  // namespace headstart
