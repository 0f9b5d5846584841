// Stands where Engine does: the same calls around the same scheduler, pools and shipments, in
// simulated time and on one thread. Everything that happens goes into the model's book too.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "engine/schedule/scheduler.h"
#include "kernels/base/instant.h"
#include "tests/engine/simulation/model.h"
#include "tests/engine/simulation/mutation.h"
#include "tests/engine/simulation/pretend_runner.h"
#include "tests/engine/simulation/random.h"
#include "tests/engine/simulation/timeline.h"

namespace headstart::simulation {

// Without the payloads, which have no order.
inline std::string Words(const absl::Status& status) {
  return absl::StrCat(absl::StatusCodeToString(status.code()), " ", status.message());
}

struct EngineOptions {
  SchedulerOptions scheduler;
  int64_t num_pages = 0;
  int64_t host_chunks = 0;
  PretendRunner::Options runner;
  bool calm = false;  // nothing goes wrong, and nothing but compute is scarce
};

class SimulatedEngine {
 public:
  // `trace`: what happens is written down.
  SimulatedEngine(const EngineOptions& options, Mutation mutation, uint64_t seed, bool trace);

  // Until nothing is left to happen, or a violation was found.
  void Run();

  // ---- calls, as to Engine

  // On success the book of the request is filled in. The reader is that of an attached call.
  absl::StatusOr<std::unique_ptr<ShipmentReader>> Submit(PrefillRequest request,
                                                         const std::string& fetch_id,
                                                         RequestBook* book);
  // `why` becomes one of the request's causes.
  void End(RequestBook& request, const absl::Status& why);
  absl::StatusOr<std::unique_ptr<ShipmentReader>> Fetch(RequestBook& request,
                                                        const std::string& owner,
                                                        const KvPart& part, int64_t from_chunk);
  absl::Status Renew(RequestBook& request, const std::string& owner);
  absl::Status Release(RequestBook& request, const std::string& owner);

  Timeline& timeline() { return timeline_; }
  Model& model() { return *model_; }
  const EngineOptions& options() const { return options_; }
  Mutation mutation() const { return mutation_; }
  bool lost() const { return lost_; }

  // A line of the trace.
  template <typename... Parts>
  void Tell(const Parts&... parts) {
    if (trace_) WriteTrace(absl::StrCat(parts...));
  }
  const std::vector<std::string>& trace() const { return lines_; }

 private:
  void AfterEvent();
  void WriteTrace(const std::string& line);
  class BetweenLayers;
  // The scheduler's next step; `running`: the one around it.
  std::optional<Step> Next(const Step* running);
  void Mutate(Step& step, const Step* running);
  void RunStep(Step step);
  void Finish(Step step, StepResult result);
  void LoseBackend();
  // As Engine makes of what the client says.
  void NamePages(PrefillRequest& request) const;
  void FillBook(const PrefillRequest& request, RequestBook& book) const;
  void Expire();
  void PassAnHour();
  // KV that is fetched or renewed is kept for another lease.
  void Extend(RequestBook& request);

  const EngineOptions options_;
  const Mutation mutation_;
  const bool trace_;
  std::vector<std::string> lines_;
  Random random_;
  PagePool pages_;
  HostPages host_;
  Timeline timeline_;  // its events hold chunks
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<PretendRunner> runner_;
  Instant next_expiry_ = Instant::InfiniteFuture();
  bool lost_ = false;
  std::vector<PageRefs> kept_;  // planted bugs
  std::vector<int32_t> wrong_pages_;
};

}  // namespace headstart::simulation
