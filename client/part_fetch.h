// Fetches detached KV on several streams at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "client/cancel_token.h"
#include "client/client_options.h"
#include "client/connections.h"
#include "client/kv_assembly.h"
#include "headstart/v1/prefill.pb.h"
#include "kernels/base/instant.h"

namespace headstart {

// What all streams of one fetch share.
struct FetchCall {
  std::string fetch_id;
  std::string target;  // see FetchTarget
  Instant deadline;
  RetryOptions retry;
  CancelToken* cancel;   // outlives the fetch
  KvAssembly* assembly;  // outlives the fetch
};

// Every stripe comes on a connection and a thread of its own.
class PartFetch {
 public:
  PartFetch() = default;
  ~PartFetch();
  PartFetch(const PartFetch&) = delete;
  PartFetch& operator=(const PartFetch&) = delete;

  // Called once at most.
  void Start(const FetchCall& call, const std::vector<v1::KvPart>& stripes,
             Connections& connections);

  bool started() const { return !threads_.empty(); }

  // Waits for all streams. The first error, which has cancelled call.cancel; OK when not started.
  absl::Status Join();

  // Streams that broke and went on, so far.
  int resumes() const { return resumes_; }

 private:
  void Run(const v1::KvPart& stripe, const std::shared_ptr<grpc::Channel>& channel);

  FetchCall call_;
  std::vector<std::thread> threads_;
  std::atomic<int> resumes_{0};
  absl::Mutex mutex_;
  absl::Status first_error_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace headstart
