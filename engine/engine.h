// One model on one machine, for many requests: takes prompts, computes one after the other, and
// keeps their KV until it is fetched.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/model/weights.h"
#include "engine/request.h"
#include "engine/resolve.h"
#include "engine/run/runner.h"
#include "engine/schedule/page_pool.h"
#include "engine/schedule/scheduler.h"
#include "engine/ship/host_pages.h"
#include "engine/ship/shipment.h"
#include "engine/wake_signal.h"
#include "kernels/backend.h"
#include "kernels/base/instant.h"
#include "kernels/base/mutex.h"

namespace headstart {

struct Submission {
  uint64_t key = 0;
  headstart::Estimate estimate;
  std::string fetch_id;                         // of detached KV: 16 random bytes
  absl::Duration lease = absl::ZeroDuration();  // of detached KV, as granted
  // Of attached KV the whole, of detached KV nothing but start and outcome.
  std::unique_ptr<ShipmentReader> reader;
};

// Thread-safe. Readers must go before the engine.
class Engine {
 public:
  // Loads the model, takes all memory and starts to work; takes no request until Open.
  // INVALID_ARGUMENT: the weights can't be used (names file or tensor). RESOURCE_EXHAUSTED says how
  // many bytes are missing.
  static absl::StatusOr<std::unique_ptr<Engine>> Create(ResolvedModel model,
                                                        std::unique_ptr<Backend> backend,
                                                        const LoadProgress& progress);
  // The same around parts that are there already. Of `backend` only the life is its affair; null
  // where nobody asks for it.
  Engine(ResolvedModel model, const SchedulerOptions& scheduling, std::string model_hash,
         std::unique_ptr<Backend> backend, std::unique_ptr<PagePool> pages,
         std::unique_ptr<HostPages> host, std::unique_ptr<Runner> runner);
  // Ends all requests; waits for the layer that runs, and for KV that the network holds still.
  ~Engine();

  // ---- requests

  // What can be said without running: prompt length, token ids, attention and sampling options,
  // skip_tokens, kv_dtype. INVALID_ARGUMENT or FAILED_PRECONDITION, the field's name first in the
  // message.
  absl::Status Validate(const PrefillRequest& request) const;

  // Gives the pages of a valid request their names, and raises skip_tokens over the pages that the
  // client says it holds. Before Submit and Estimate.
  void NamePages(PrefillRequest& request) const;

  // What Submit would say of a valid request, and when it would be done.
  headstart::Estimate Estimate(const PrefillRequest& request) const;

  // Takes a valid request, see Scheduler::Add for the errors. It lasts until End.
  absl::StatusOr<Submission> Submit(PrefillRequest request);

  // The request is over for whoever submitted it: it is ended with `why` whatever it does. Ended
  // ones are left alone.
  void End(uint64_t key, const absl::Status& why);

  // ---- detached KV; errors as in Scheduler::Find and Shipment::Open

  absl::StatusOr<std::unique_ptr<ShipmentReader>> Fetch(const std::string& fetch_id,
                                                        const std::string& owner,
                                                        const KvPart& part, int64_t from_chunk);
  // Another lease from now on; returns it.
  absl::StatusOr<absl::Duration> Renew(const std::string& fetch_id, const std::string& owner);
  absl::Status Release(const std::string& fetch_id, const std::string& owner);

  // ---- life

  // Takes requests from now on.
  void Open();
  // Refuses requests with `why` from now on; those that are in may finish.
  void Close(absl::Status why);
  // OK when open, else why not.
  absl::Status CheckOpen() const;
  // False when something was in flight still at `deadline`.
  bool WaitUntilIdle(Instant deadline) const;
  // `on_lost` is told, on the compute thread, that the backend is lost: all requests were ended and
  // none will be taken. Before Open.
  void OnLost(std::function<void(const absl::Status&)> on_lost);

  SchedulerLoad load() const;
  // To compute all that is in, and what was computed a second lately; nothing before that is known.
  std::optional<absl::Duration> PredictDrain() const;
  std::optional<double> TokensPerSecond() const;
  // What the first `limit` requests that have not ended are doing, in the order in which they came.
  std::vector<RequestView> Requests(size_t limit) const;
  // A step is being run.
  bool computing() const { return computing_.load(std::memory_order_relaxed); }
  // Layers finished since the start, all requests together: progress for health checks.
  int64_t layers_done() const { return runner_->layers_done(); }

  // ---- what it is

  const EngineOptions& options() const { return model_.options; }  // resolved: no zeros left
  const ModelConfig& config() const { return model_.config; }
  const std::string& model_hash() const { return model_hash_; }
  const Backend& backend() const { return *backend_; }
  // Of the KV as it is computed.
  const KvGeometry& geometry() const { return model_.geometry; }
  // In which KV may be asked for, that in which it is computed first.
  std::vector<DType> kv_dtypes() const;
  const PagePool& page_pool() const { return *pages_; }
  const HostPages& host_pages() const { return *host_; }

 private:
  absl::Status CheckKvDtype(const PrefillRequest& request) const;
  static Instant Now();

  class BetweenLayers;

  absl::StatusOr<Submission> Take(PrefillRequest request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Compute();
  // Waits for a step; none when the engine ends.
  std::optional<Step> WaitForStep();
  void Finish(Step step, StepResult result);
  // Ends what is due, as long as the engine lives.
  void WatchExpiry();
  void NoteIdle() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  // Order matters: what lies in the backend's memory goes before the backend.
  const ResolvedModel model_;
  const int64_t piece_tokens_;
  const std::string model_hash_;
  const std::unique_ptr<Backend> backend_;
  const std::unique_ptr<PagePool> pages_;
  const std::unique_ptr<HostPages> host_;
  const std::unique_ptr<Runner> runner_;
  std::function<void(const absl::Status&)> on_lost_;

  mutable Mutex mutex_;
  mutable CondVar idle_;
  Scheduler scheduler_ ABSL_GUARDED_BY(mutex_);
  std::atomic<bool> computing_{false};
  std::atomic<bool> stopping_{false};
  WakeSignal work_;    // something came that may let a step run
  WakeSignal expiry_;  // a request came that may expire before the others
  std::thread compute_thread_;
  std::thread expiry_thread_;
};

}  // namespace headstart
