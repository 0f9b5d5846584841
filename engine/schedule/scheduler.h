// Who comes in, what runs next, when a request ends. No thread, no clock, no device, no waiting:
// time is an argument, so a simulation runs this very class.
//
// Order: a request of higher level goes before one of lower level (its priority, and one more for
// every ageing interval that it has waited for its next piece), then the one that must begin
// earlier to be done in time (Rank). Pieces are cut by position alone, so a prompt's KV does not
// depend on what else runs.
//
// A step holds the next piece of the first request that can run, and of those behind it as many as
// fit into batch_tokens with it. Who can't run: whose next page another one computes at this moment
// (it will be found), who lacks device memory, who lacks room in host memory for the KV of its next
// piece. Nobody who lacks memory that others hold is overtaken by requests that would take of it,
// but for short ones as long as it has time to spare: those whose rest fits into batch_tokens.
//
// While a step runs, short ones that come before all of it run between its layers (NextUrgent).
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/request.h"
#include "engine/schedule/active_request.h"
#include "engine/schedule/cost_model.h"
#include "engine/schedule/forecast.h"
#include "engine/schedule/interruptions.h"
#include "engine/schedule/page_pool.h"
#include "engine/schedule/prefix_hits.h"
#include "engine/schedule/rank.h"
#include "engine/schedule/step.h"
#include "engine/ship/host_pages.h"
#include "engine/ship/kv_part.h"
#include "engine/ship/shipment.h"
#include "kernels/base/instant.h"

namespace headstart {

struct SchedulerOptions {
  KvGeometry geometry;
  int64_t piece_tokens = 8192;  // most tokens of a piece; a multiple of kBlockTokens
  // Pieces run together up to that many tokens; prompts that fit run between the layers of others.
  // A multiple of kBlockTokens.
  int64_t batch_tokens = 2048;
  int32_t num_slots = 64;  // requests that are between their first and their last piece
  // Both count from accepted to ended: requests that wait, compute, ship and are kept.
  int64_t max_requests = 64;
  int64_t max_tokens = 1 << 20;               // a longer prompt is taken when nothing else is in
  absl::Duration ageing = absl::Seconds(10);  // of waiting, that counts as one step of priority
  absl::Duration default_lease = absl::Seconds(60);
  absl::Duration max_lease = absl::Minutes(10);
  // A request whose KV in host memory nobody takes for this long, while a request (itself, too)
  // waits for room there, is given up.
  absl::Duration stall_timeout = absl::Seconds(30);
};

// Chunks of the KV of a whole piece: the least that host memory must hold.
int64_t PieceChunks(const SchedulerOptions& options);

struct SchedulerLoad {
  int64_t queued_requests = 0;  // accepted, compute has not begun
  int64_t queued_tokens = 0;
  int64_t inflight_requests = 0;  // accepted and not ended, all others included
  int64_t inflight_tokens = 0;
  int64_t waiting_for_room = 0;  // for host memory, with their next piece
  int64_t leases = 0;            // computed and kept
  int64_t lease_tokens = 0;      // prompt tokens of these
  // Since the start. Requests that came in and that ended: equal when nothing is in flight.
  int64_t acquired = 0;
  int64_t released = 0;
  int64_t leases_expired = 0;
  int64_t prompt_tokens = 0;  // of prompts that were computed
  int64_t cached_tokens = 0;  // of these, what came from the prefix cache
  int64_t steps = 0;          // that are finished, urgent ones included
  int64_t pieces = 0;
  int64_t urgent_steps = 0;
};

// What would become of a request. Times only where the machine's speed is known already.
struct Estimate {
  // `queue`: all of the time in which others run, those that will come later included; `known`: of
  // that what those take who are in.
  std::optional<absl::Duration> queue, compute, known;
  int64_t cached_tokens = 0;
  int64_t requests_ahead = 0;
  int64_t tokens_ahead = 0;
  absl::Status refusal;  // what Add would say

  std::optional<absl::Duration> ttft() const {
    return queue.has_value() ? std::optional(*queue + *compute) : std::nullopt;
  }
};

// What Add answers.
struct Admitted {
  uint64_t key = 0;
  Estimate estimate;
  absl::Duration lease = absl::ZeroDuration();  // as granted; of detached KV
  std::shared_ptr<Shipment> shipment;
};

// Not thread-safe, but for the counts of the pools.
class Scheduler {
 public:
  // `pages` and `host` outlive the scheduler; `host` has PieceChunks at least. Closed until Open.
  Scheduler(const SchedulerOptions& options, PagePool* pages, HostPages* host, absl::Status closed);

  void Open() { closed_ = absl::OkStatus(); }
  // From now on every Add is refused with `why`; who is in stays in.
  void Close(absl::Status why) { closed_ = std::move(why); }
  const absl::Status& closed() const { return closed_; }

  // ---- who comes in (scheduler_admission.cc)

  // Takes a request that is valid for the model and fits into `pages`. `fetch_id`: of detached KV,
  // never used before. An earlier attempt with the same id and key ends first. ALREADY_EXISTS: the
  // id is in flight otherwise. RESOURCE_EXHAUSTED: the queue is full, or host memory for KV that
  // nobody announced to fetch; says when to come back. DEADLINE_EXCEEDED: past, or out of reach by
  // what is known of the machine, its own or that of one that is in already; but where nobody is in
  // and nothing was learned lately it is tried. INVALID_ARGUMENT: readers. Or whatever Close was
  // given.
  absl::StatusOr<Admitted> Add(PrefillRequest request, const std::string& fetch_id, Instant now);

  // What Add would say, but for detached KV; changes nothing.
  Estimate Foresee(const PrefillRequest& request, Instant now) const;

  // ---- what runs (scheduler_steps.cc)

  // The next step, until Finish the only one but for urgent ones; none when nothing can run.
  std::optional<Step> Next(Instant now);
  // A step to run between two layers of `running`, that Next made; none when nothing that waits
  // comes before all of it.
  std::optional<Step> NextUrgent(const Step& running, Instant now);
  void Finish(const Step& step, StepResult result, Instant now);

  // ---- when it ends

  // Ends a request with `why`, whatever it does; one that ended already is left alone.
  void End(uint64_t key, const absl::Status& why);
  // Ends all.
  void EndAll(const absl::Status& why);

  // Ends what is due at `now`. Returns when to be called again, unless Add, Next or Finish are
  // called before.
  Instant Expire(Instant now);

  // ---- detached KV. NOT_FOUND (reason UNKNOWN_FETCH_ID), PERMISSION_DENIED: not `owner`'s.
  absl::StatusOr<std::shared_ptr<Shipment>> Find(const std::string& fetch_id,
                                                 const std::string& owner) const;
  // Another lease from now on, unless the KV is gone already. Returns the lease.
  absl::StatusOr<absl::Duration> Renew(const std::string& fetch_id, const std::string& owner,
                                       Instant now);
  absl::Status Release(const std::string& fetch_id, const std::string& owner);

  // ---- how it stands

  const SchedulerLoad& load() const { return load_; }
  const CostModel& costs() const { return costs_; }
  // To compute all that is in; nothing before the machine's speed is known.
  std::optional<absl::Duration> PredictDrain(Instant now) const;
  // The first `limit` requests that have not ended, in the order in which they came.
  std::vector<RequestView> Requests(size_t limit) const;

 private:
  using Entry = ActiveRequest;
  using Entries = std::map<uint64_t, std::unique_ptr<Entry>>;

  // One way of a request through the layers: tokens [begin, end) are shipped as far as they are
  // wanted, of these [compute_begin, end) computed. It ends at a multiple of piece_tokens, or with
  // the prompt.
  struct Pass {
    int64_t begin = 0, compute_begin = 0, end = 0;
    int64_t num_computed() const { return end - compute_begin; }
  };

  // A step that runs, or none.
  struct RunningStep {
    bool runs = false;
    Instant began = Instant::InfinitePast();  // later by what urgent ones took of its time
    absl::Duration cost;                      // as predicted; 0: unknown, or none runs

    absl::Duration Rest(Instant now) const;
  };

  // Who may take memory although one before it that lacks it does not get it.
  enum class Overtaking : uint8_t { kAnybody, kShort, kNobody };

  // ---- who comes in
  // OK when no request is in flight with this id any more.
  absl::Status EndEarlierAttempt(const PrefillRequest& request);
  absl::Status CheckQueue(int64_t num_tokens) const;
  absl::Status CheckDeadline(int64_t num_tokens, Instant deadline, const Estimate& estimate,
                             bool displaces, Instant now) const;
  absl::Duration RetryDelay(int64_t num_tokens) const;
  // Without the refusal; `displaces`: as in Forecast.
  Estimate Predict(const PrefillRequest& request, Instant now, bool* displaces) const;
  // Adds what is left of a request, but for the step that runs: its next piece, and if waiting gave
  // that a higher level the others by themselves.
  void AddWork(const Entry& entry, Instant now, std::vector<QueuedWork>& work) const;
  // Whether a newcomer, of which `found` tokens are there, would run between two layers of the step
  // that runs: not when that is nearly done, comes before it, or somebody computes its next page.
  bool WouldBeUrgent(const PrefillRequest& request, const Rank& rank, int64_t found,
                     Instant now) const;
  // Where it goes on behind the step that runs, if it is in that.
  int64_t PositionBehindStep(const Entry& entry) const;
  // Of the pieces from `position` on, of which tokens before `ready` are there.
  enum class Steps : uint8_t { kOwn, kShared };  // kShared: with others, up to batch_tokens
  std::optional<absl::Duration> CostFrom(const PrefillRequest& request, int64_t position,
                                         int64_t ready, Steps steps) const;
  // Until an urgent step may begin.
  absl::Duration LayerWait() const;
  // Of the request's KV, in the type in which it is asked for.
  KvGeometry ShippedGeometry(const PrefillRequest& request) const;
  // Of the request's KV, in chunks of all layers.
  int64_t CountChunks(const PrefillRequest& request) const;
  absl::Status Detach(Entry& entry);
  absl::Status Reserve(Entry& entry);

  // ---- what runs
  Rank RankOf(const Entry& entry, Instant now) const;
  // Those that wait for compute, in their order.
  std::vector<std::pair<Rank, Entry*>> Waiting(Instant now) const;
  RunningStep Begin(const Step& step, Instant now) const;
  // `before`: only of short ones that come before that.
  std::optional<Step> MakeStep(const std::optional<Rank>& before, Instant now);
  // Of one that has no pages yet.
  void LookForPrefix(Entry& entry);
  bool GiveDevice(Entry& entry);
  Pass NextPass(const Entry& entry, int64_t ready) const;
  // Goes over what was found and is not wanted by the client.
  void SkipEmptyPasses(Entry& entry);
  bool IsShort(const Entry& entry, int64_t ready) const;
  // Whether its next page is just being computed by another one.
  bool WillBeFound(const Entry& entry, int64_t ready) const;
  std::vector<TokenRange> ChunksOf(const Entry& entry, const Pass& pass) const;
  // Chunks of host memory that the pass needs.
  int64_t RoomFor(const Entry& entry, const Pass& pass) const;
  void WaitForRoom(Entry& entry, Instant now);
  void EndRoomWait(Entry& entry, Instant now);
  // There are as many.
  std::vector<HostChunk> TakeRoom(Entry& entry, int64_t count);
  static void NotePass(const Pass& pass, Instant now, std::vector<PieceRun>& runs);
  Piece MakePiece(Entry& entry, const Pass& pass, Instant now);
  void Advance(Entry& entry, const Pass& pass, const Piece& piece, PieceResult& result,
               Instant now);
  // `last`: of the piece that ended the prompt.
  void Complete(Entry& entry, PrefillResult last, Instant now);
  void LearnFrom(const Step& step, const StepResult& result, Instant now);
  void LearnFrom(const Entry& entry);

  // ---- when it ends
  void FreeDevice(Entry& entry);
  // Why the request ends at its expiry.
  absl::Status WhyExpired(const Entry& entry) const;
  // The first of the requests that wait for host memory came to that then; InfiniteFuture: none
  // waits.
  Instant RoomWantedSince() const;
  // Whether it holds host memory, and too long nobody has taken any of it though it was wanted.
  bool IsStalled(Entry& entry, Instant wanted_since, Instant now) const;
  void Remove(Entries::iterator found);
  absl::StatusOr<uint64_t> KeyOf(const std::string& fetch_id, const std::string& owner) const;

  const SchedulerOptions options_;
  PagePool& pages_;
  HostPages& host_;
  const PrefixHits prefixes_;
  absl::Status closed_;
  CostModel costs_;
  Interruptions interruptions_;
  Instant learned_at_ = Instant::InfinitePast();  // from a step
  SchedulerLoad load_;
  int64_t reserved_chunks_ = 0;  // of all requests
  uint64_t last_key_ = 0;
  Entries entries_;  // by key: in the order in which they came
  std::unordered_map<std::string, uint64_t> by_request_id_;  // of those that have not ended
  std::unordered_map<std::string, uint64_t> by_fetch_id_;
  std::vector<int32_t> free_slots_;
  absl::flat_hash_set<PageHash> in_computation_;  // names of pages of the steps that run

  RunningStep step_, urgent_step_;
};

}  // namespace headstart
