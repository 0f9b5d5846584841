// A decode node: asks a server for the KV of a prompt and goes on from it with the model on this
// machine.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/prefill_client.h"
#include "engine/run/decode_session.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

struct DecodeNodeOptions {
  PrefillClientOptions client;
  v1::PrefillRequest request;
  std::string model_dir;
  Links links = Links::kInside;
  BackendOptions backend;
  int64_t max_new_tokens = 128;  // the first token included
  bool ignore_eos = false;
  LoadProgress on_load;  // of the model on this machine; may be empty
};

struct DecodeNodeResult {
  PrefillOutcome prefill;
  std::vector<int32_t> tokens;  // without the end-of-sequence token
  std::string stop;             // "eos", "max_tokens" or "context"
  double load_seconds = 0;      // model, while the prefill ran
  double import_seconds = 0;    // KV into the decode cache
  double decode_seconds = 0;    // all steps
};

// Sends the prompt, loads the model while it is computed, checks that both sides have the same one,
// and decodes greedily. `on_token` gets every token as it is known. `receive` may carry on_accepted
// and on_progress.
//   INVALID_ARGUMENT      the model can't be run, or a token id is not in its vocabulary
//   FAILED_PRECONDITION   the server has another model, or KV of another type
//   or an error of PrefillClient::Prefill
absl::StatusOr<DecodeNodeResult> RunDecodeNode(const DecodeNodeOptions& options,
                                               const std::function<void(int32_t)>& on_token,
                                               KvReceiverOptions receive = {});

}  // namespace headstart
