// Sends prompts of a load, and notes what came of them.
#pragma once

#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/commands/load.h"
#include "client/kv_destination.h"
#include "client/prefill_client.h"
#include "headstart/v1/prefill.pb.h"

namespace headstart {

// Memory for KV that stays from prompt to prompt, as a decode node has it. Thread-safe.
class KvMemory {
 public:
  // Buffers of `bytes` each, touched, for so many prompts at a time.
  absl::Status Reserve(int count, const KvShape& shape);
  // The smallest buffer that is free and large enough, or a new one.
  absl::StatusOr<KvBuffer> Take(const KvShape& shape);
  void GiveBack(KvBuffer buffer);

 private:
  absl::Mutex mutex_;
  std::vector<KvBuffer> free_ ABSL_GUARDED_BY(mutex_);
};

inline constexpr int kMostPromptsAtATime = 2048;

struct SenderOptions {
  PrefillClientOptions client;
  absl::Duration deadline;   // of a prompt, from when it was planned; zero: the client's timeout
  bool into_memory = false;  // place the KV; else it is checked and dropped
  // Waits until the prompt is computed, then takes its KV: the sample's times are the fetch's
  // alone.
  bool fetch_alone = false;
};

// Thread-safe.
class PromptSender {
 public:
  // Connects for so many prompts at a time, at most kMostPromptsAtATime, and asks the server what
  // it is.
  static absl::StatusOr<std::unique_ptr<PromptSender>> Create(SenderOptions options,
                                                              int most_at_a_time);

  const v1::GetModelInfoResponse& model() const { return model_; }
  const v1::GetServerInfoResponse& server() const { return server_; }

  // Takes memory for the KV of prompts of a length, before anything is measured.
  absl::Status Reserve(int count, int64_t num_tokens);

  // Fills the sample, whose `planned` is set. Calls with equal `worker` share a connection.
  void Send(const v1::PrefillRequest& request, int worker, LoadSample* sample);

 private:
  explicit PromptSender(SenderOptions options) : options_(std::move(options)) {}

  absl::Status PrefillAndTake(const v1::PrefillRequest& request, const PrefillClient& client,
                              LoadSample* sample);
  absl::Status FetchAlone(v1::PrefillRequest request, const PrefillClient& client,
                          LoadSample* sample);

  const SenderOptions options_;
  std::vector<std::unique_ptr<PrefillClient>> clients_;
  v1::GetModelInfoResponse model_;
  v1::GetServerInfoResponse server_;
  KvMemory memory_;
};

}  // namespace headstart
