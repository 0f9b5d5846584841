// What the server serves once it has loaded it.
#pragma once

#include <string>

#include "engine/engine.h"
#include "server/options.h"
#include "server/rpc/attention_request.h"

namespace headstart {

// Engine and options outlive every request.
struct ServedModel {
  Engine* engine = nullptr;
  std::string name;
  const ServerOptions* options = nullptr;
  ResolvedAttention default_attention;
};

}  // namespace headstart
