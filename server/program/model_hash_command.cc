#include "server/program/model_hash_command.h"

#include <iostream>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "engine/model/model_hash.h"
#include "kernels/base/machine.h"
#include "kernels/base/status_macros.h"
#include "server/program/exit_code.h"

namespace headstart {
namespace {

struct ModelHashFlags {
  std::string model_dir;
  bool follow_links = false;
};

absl::StatusOr<std::string> HashFolder(const ModelHashFlags& flags) {
  const Links links = flags.follow_links ? Links::kAnywhere : Links::kInside;
  HEADSTART_ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(flags.model_dir, links));
  HEADSTART_ASSIGN_OR_RETURN(const auto files, WeightFiles::Open(flags.model_dir, links));
  return HashModel(config, *files, UsableCpus());
}

int RunModelHash(const ModelHashFlags& flags) {
  const absl::StatusOr<std::string> hash = HashFolder(flags);
  if (!hash.ok()) {
    std::cerr << "headstart model-hash: " << hash.status().message() << "\n";
    return ExitCodeOf(hash.status());
  }
  std::cout << *hash << "\n";
  return kExitOk;
}

}  // namespace

void AddModelHashCommand(CLI::App& app, std::function<void(int)> set_exit_code) {
  auto flags = std::make_shared<ModelHashFlags>();
  CLI::App* command =
      app.add_subcommand("model-hash", "Print the hash under which a model will be served");
  command->add_option("dir", flags->model_dir, "Folder of a Hugging Face model")->required();
  command->add_flag("--follow-links", flags->follow_links,
                    "Follow links in the folder to files outside of it");
  command->final_callback(
      [flags, set_exit_code = std::move(set_exit_code)] { set_exit_code(RunModelHash(*flags)); });
}

}  // namespace headstart
