// What must be true of scheduler, pools and shipments after every event: a second book of them,
// kept from the outside.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/error.h"
#include "engine/schedule/scheduler.h"
#include "kernels/base/instant.h"

namespace headstart::simulation {

enum class Invariant : uint8_t {
  kDevice,     // pages and slots in use = held by requests that run; the prefix cache is as it was
  kHost,       // host chunks held = reserved + in the runner's hand + kept + on the wire
  kOneEnd,     // a request ends once, for a reason that there is, and is counted until then
  kPieces,     // the pieces of a prompt: in order, none twice, none left out
  kParts,      // a reader that ends well saw exactly its part, in order
  kContent,    // KV is what the prompt's own tokens, options and salt say, wherever it came from
  kShared,     // a page is written by its only holder, before anybody can find it
  kBudget,     // no step beyond its tokens, nobody in two steps
  kExpired,    // what is past its deadline or lease is gone
  kBusy,       // when something can run, something runs
  kOrder,      // nobody is overtaken but who can't run, and as far as that is allowed
  kProgress,   // nobody waits beyond the stall limit without anything moving
  kEstimate,   // who is not overtaken has waited no longer than was predicted
  kAnswers,    // calls are answered as the contract says
  kGivenBack,  // at the end everything is back
};
const char* InvariantName(Invariant invariant);

struct Violation {
  Invariant invariant;
  std::string what;
};

// How often what happened: whether a simulation went where it should go.
struct Sightings {
  std::map<ErrorReason, int64_t> ends;      // of requests
  std::map<ErrorReason, int64_t> refusals;  // of those who came
  int64_t computed = 0;
  int64_t computed_tokens = 0;
  int64_t whole_parts = 0;
  int64_t resumed_streams = 0;
  int64_t urgent_steps = 0;
  int64_t batches = 0;         // steps of several pieces
  int64_t copies = 0;          // pieces that compute nothing
  int64_t cached_tokens = 0;   // of prompts that were computed
  int64_t shared_pages = 0;    // found while another one held them
  int64_t late_pages = 0;      // found by a prompt that had begun already
  int64_t waits_for_page = 0;  // left out of a step: another one computes its next page
  int64_t overtakings = 0;     // of requests that lack memory
  // In calm lives, of requests that were let in although the machine's speed was known.
  int64_t deadlines_kept = 0;
  int64_t deadlines_missed = 0;
  std::vector<double> ttft;  // actual / (predicted and for those that came later)
};

// A request as it looks from outside of the scheduler.
struct RequestBook {
  // What was asked.
  std::string id;
  uint64_t key = 0;
  std::vector<int32_t> token_ids;
  std::vector<PageHash> names;
  PrefixCaching prefix;
  bool is_sparse = false;
  int32_t priority = 0;
  Instant accepted;
  Instant waits_since;  // accepted, or its last piece ended
  Instant latest_start;
  int64_t skip_tokens = 0;
  absl::Duration lease = absl::ZeroDuration();  // zero: attached
  bool reserves = false;                        // all its host memory when it comes
  std::optional<absl::Duration> predicted_ttft;
  std::shared_ptr<Shipment> shipment;
  std::unique_ptr<ShipmentReader> outcome;  // of nothing, as the call has it

  // What happened.
  int64_t position = 0;      // as far as it was given to the runner to ship
  int64_t ready = 0;         // as far as its KV is there
  int64_t num_computed = 0;  // tokens
  int64_t num_found = 0;
  int64_t pass_begin = 0, pass_end = 0;  // of the piece in a step: tokens that are computed
  bool in_step = false;
  Instant stepped_at;  // of the last step that it is or was in
  bool started = false;
  bool computed = false;
  bool slot_is_stale = true;
  int32_t slot = -1;
  PageRefs pages;              // of the model's own pool
  std::set<uint64_t> ahead;    // it and those that went before it when it came
  absl::Duration others_time;  // since then, of other ones

  std::optional<absl::Status> end;
  bool told = false;  // that it is computed
  Instant expiry = Instant::InfiniteFuture();
  std::set<ErrorReason> causes;  // why it may end, besides time
  int64_t readers_away = 0;      // that it needs
  Instant reader_back = Instant::InfinitePast();

  // What its KV depends on, page by page; and before the first one.
  uint64_t root_content = 0;
  std::vector<uint64_t> contents;

  // Its host memory.
  int64_t reserved = 0;  // for all that was not given to a step
  int64_t in_hand = 0;   // of the runner
  std::vector<std::weak_ptr<const HostChunk>> published;
  std::map<const HostChunk*, int64_t> on_wire;  // by how many readers
  int64_t held = 0;                             // at the last look
  Instant moved = Instant::InfinitePast();      // when that changed, or it ran

  bool detached() const { return lease > absl::ZeroDuration(); }
  bool live() const { return !end.has_value(); }
  bool on_device() const { return pages.size() > 0; }
  int64_t num_tokens() const { return static_cast<int64_t>(token_ids.size()); }
  bool waits_for_compute() const { return live() && !computed && !in_step; }
};

class Model {
 public:
  // `calm`: a life without faults, in which nothing but compute is scarce.
  Model(const SchedulerOptions& options, bool calm, PagePool* pages, HostPages* host,
        Scheduler* scheduler)
      : options_(options),
        calm_(calm),
        pages_(*pages),
        host_(*host),
        scheduler_(*scheduler),
        own_pages_(pages->num_pages()),
        names_(static_cast<size_t>(pages->num_pages())) {}

  // ---- what happens

  // What Add must say of a request: the book is not in yet.
  void CheckEstimate(RequestBook& request, const Estimate& estimate, Instant now) const;
  // `request` outlives the model.
  void Accepted(RequestBook* request);
  // The scheduler was asked for a step; null: there is none. `running`: the step around it; null:
  // an urgent one was not asked for.
  void Asked(const Step* step, const Step* running, Instant now);
  void Finished(const Step& step, const StepResult& result, Instant now);

  // ---- what must be true

  // After every event.
  void Check(Instant now);
  // Where there is no step.
  void CheckIdle(Instant now);
  // The request's piece may write the page.
  void CheckMayWrite(const RequestBook& request, int32_t page);
  // When nothing will happen any more.
  void CheckGivenBack();

  // The first one counts.
  void Violate(Invariant invariant, std::string what) const;
  const std::optional<Violation>& violation() const { return violation_; }

  Sightings& seen() { return seen_; }

  RequestBook* Find(uint64_t key) const;
  bool InFlight(const std::string& id) const;
  // Chunks of a prompt, of all layers.
  int64_t CountChunks(const RequestBook& request) const;
  void GiveCauseToAll(ErrorReason cause);

 private:
  // A piece that is to run: tokens [begin, end) are shipped, of these [compute_begin, end)
  // computed.
  struct Turn {
    RequestBook* request = nullptr;
    int64_t begin = 0, compute_begin = 0, end = 0;
    int64_t rows() const { return end - compute_begin; }
  };
  // What those before it leave to a request.
  struct Leave {
    bool to_all = true, to_short = true;
    bool To(bool is_short) const { return is_short ? to_short : to_all; }
    // Somebody lacks memory.
    void Restrict(const RequestBook& request, Instant now) {
      to_all = false;
      if (now >= request.latest_start) to_short = false;
    }
  };
  // A step that is being made.
  struct Making {
    bool urgent = false;
    int64_t free = 0;        // chunks of host memory
    int64_t host_limit = 0;  // those that are not reserved
    int64_t rows = 0;
    Leave device, room;
  };
  // In the order of going first.
  using Standing = std::tuple<int64_t, Instant, uint64_t>;

  // ---- who runs (model_steps.cc)
  Standing StandingOf(const RequestBook& request, Instant now) const;
  std::vector<RequestBook*> InOrder(Instant now) const;
  // Those that are to run when `free` chunks of host memory are, by the policy that the scheduler
  // promises. Gives the requests that it looks at their place on the device. `running`: as in
  // Asked.
  std::vector<Turn> ToRun(const Step* running, int64_t free, Instant now);
  Turn NextTurn(const RequestBook& request, int64_t ready) const;
  bool CanJoin(const RequestBook& request, int64_t ready, const Making& step) const;
  // Of host memory that is not reserved.
  int64_t RoomFor(const Turn& turn) const;
  bool LacksRoom(const RequestBook& request, int64_t ready, Making& step, Instant now) const;
  // Gives it a place if it may have one.
  bool IsOnDevice(RequestBook& request, Making& step, Instant now);
  std::optional<Turn> TurnOf(RequestBook& request, Making& step, Instant now);
  bool IsShort(const RequestBook& request, int64_t ready) const;
  // Whether a step computes its next page at this moment, of which tokens before `ready` are there.
  bool WaitsForPage(const RequestBook& request, int64_t ready) const;
  std::vector<TokenRange> ChunksOf(const Turn& turn) const;
  void CheckStep(const Step& step, const Step* running) const;
  // Whatever the order is: when nothing but compute is scarce, nobody waits for a step of those
  // that came much later.
  void CheckNobodyForgotten(const std::vector<Turn>& turns, bool urgent) const;
  void CheckPiece(const Turn& turn, const Piece& piece) const;
  void Begin(const Turn& turn, const Piece& piece);
  void End(RequestBook& request, bool ok, Instant now);
  // The step's time, for those who wait and did not know of its requests.
  void CountOthersTime(const Step& step, absl::Duration took);

  // ---- pages (model_pages.cc)
  // Tokens of the prompt that can be found; whole pages, and never all of it.
  int64_t Findable(const RequestBook& request) const;
  int64_t RunTokens(const RequestBook& request) const;
  int64_t CountFound(const RequestBook& request, int64_t from) const;
  void TakeFound(RequestBook& request, bool begins);
  bool TakeDevice(RequestBook& request);
  // Of tokens [begin, end) of it, whole pages that others are to find.
  absl::Span<const PageHash> KeptNames(const RequestBook& request, int64_t begin,
                                       int64_t end) const;
  void Publish(const RequestBook& request);
  static void LeaveDevice(RequestBook& request);
  void DescribeContents(RequestBook& request) const;

  // ---- what must be true (model_checks.cc)
  void LookAtEnd(RequestBook& request, Instant now);
  void CheckReason(const RequestBook& request, Instant now);
  void CheckResult(const RequestBook& request, const PrefillResult& result);
  bool MayBeStalled(const RequestBook& request, Instant now) const;
  void CheckHost(RequestBook& request, Instant now);
  void CheckLoad();
  void CheckDevice();
  void ForgetGone();
  void NoteProgress(Instant now);

  const SchedulerOptions options_;
  const bool calm_;
  PagePool& pages_;
  HostPages& host_;
  Scheduler& scheduler_;
  PagePool own_pages_;                          // does what the scheduler's should do
  std::vector<std::optional<PageHash>> names_;  // by page, since it was taken
  std::vector<RequestBook*> requests_;          // that are in, or hold something; in their order
  int64_t num_accepted_ = 0;
  int64_t last_free_ = -1;
  size_t last_live_ = 0;
  Instant progress_ = Instant::InfinitePast();      // something was last seen to move
  Instant all_computed_ = Instant::InfinitePast();  // nobody was last seen to wait for compute
  SchedulerLoad counts_;                            // of what happened since the start
  mutable std::optional<Violation> violation_;
  mutable Sightings seen_;
};

}  // namespace headstart::simulation
