// What all calls of a server share.
#pragma once

#include <atomic>
#include <string>

#include "server/lifecycle.h"
#include "server/net/connection_ledger.h"
#include "server/ops/metrics.h"
#include "server/ops/recent_prompts.h"
#include "server/ops/tracer.h"
#include "server/options.h"
#include "server/rpc/served_model.h"
#include "server/rpc/timer.h"

namespace headstart {

// Everything here outlives every call.
struct ServiceContext {
  const ServerOptions* options = nullptr;
  std::string model_name;
  Lifecycle* lifecycle = nullptr;
  Timer* timer = nullptr;
  Metrics* metrics = nullptr;
  RecentPrompts* recent_prompts = nullptr;
  Tracer* tracer = nullptr;
  ConnectionLedger* ledger = nullptr;
  // Null until the model is loaded; set before the server serves.
  std::atomic<const ServedModel*> model{nullptr};
  // Set before the server cancels what is left at the end of a drain.
  std::atomic<bool> cancelling_all{false};
};

}  // namespace headstart
