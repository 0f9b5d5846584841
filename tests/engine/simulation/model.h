// What must be true of scheduler, pools and shipments after every event: a second book of them,
// kept from the outside.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/error.h"
#include "engine/schedule/scheduler.h"

namespace headstart::simulation {

enum class Invariant : uint8_t {
  kDevice,     // pages and slots in use = held by requests that run; none free and held, or twice
  kHost,       // host chunks held = reserved + in the runner's hand + kept + on the wire
  kOneEnd,     // a request ends once, for a reason that there is, and is counted until then
  kPieces,     // the pieces of a prompt: in order, none twice, none left out
  kParts,      // a reader that ends well saw exactly its part, in order, and no other's memory
  kExpired,    // what is past its deadline or lease is gone
  kBusy,       // when something can run, something runs
  kOrder,      // first in, first out; overtaken is only who waits for the device or its own readers
  kProgress,   // nobody waits beyond the stall limit without anything moving
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
  int64_t whole_parts = 0;
  int64_t resumed_streams = 0;
};

// A request as it looks from outside of the scheduler.
struct RequestBook {
  // What was asked.
  std::string id;
  uint64_t key = 0;
  int64_t num_tokens = 0;
  int64_t skip_tokens = 0;
  absl::Duration lease = absl::ZeroDuration();  // zero: attached
  bool reserves = false;                        // all its host memory when it comes
  std::shared_ptr<Shipment> shipment;
  std::unique_ptr<ShipmentReader> outcome;  // of nothing, as the call has it

  // What happened.
  int64_t next_position = 0;
  bool in_step = false;
  bool computed = false;
  bool on_device = false;  // has its place there, though a step may not have told which
  int32_t slot = -1;
  std::vector<int32_t> pages;
  std::optional<absl::Status> end;
  absl::Time expiry = absl::InfiniteFuture();
  std::set<ErrorReason> causes;  // why it may end, besides time
  int64_t readers_away = 0;      // that it needs
  absl::Time reader_back = absl::InfinitePast();

  // Its host memory.
  int64_t reserved = 0;  // for all that was not given to a step
  int64_t in_hand = 0;   // of the runner
  std::vector<std::weak_ptr<const HostChunk>> published;
  std::map<const HostChunk*, int64_t> on_wire;  // by how many readers
  int64_t held = 0;                             // at the last look
  absl::Time moved = absl::InfinitePast();      // when that changed, or it ran

  bool detached() const { return lease > absl::ZeroDuration(); }
  bool live() const { return !end.has_value(); }
  bool waits_for_compute() const { return live() && !computed && !in_step; }
};

class Model {
 public:
  Model(const SchedulerOptions& options, PagePool* pages, HostPages* host, Scheduler* scheduler)
      : options_(options), pages_(*pages), host_(*host), scheduler_(*scheduler) {}

  // ---- what happens

  // `request` outlives the model.
  void Accepted(RequestBook* request);
  // As Accepted, but the book says that it came before the last one: a planted bug.
  void AcceptedTooLate(RequestBook* request);
  void Stepped(const Step& step, absl::Time now);
  void Finished(const Step& step, const StepResult& result, absl::Time now);

  // ---- what must be true

  // After every event.
  void Check(absl::Time now);
  // Where there is no step.
  void CheckIdle(absl::Time now);
  // When nothing will happen any more.
  void CheckGivenBack();

  // The first one counts.
  void Violate(Invariant invariant, std::string what);
  const std::optional<Violation>& violation() const { return violation_; }

  Sightings& seen() { return seen_; }

  RequestBook* Find(uint64_t key) const;
  bool InFlight(const std::string& id) const;
  // Chunks of a prompt's tokens [begin, end), of all layers, each piece on its own.
  int64_t CountChunks(const RequestBook& request, int64_t begin, int64_t end) const;
  void GiveCauseToAll(ErrorReason cause);

 private:
  // Who is to run when `free` chunks of host memory are, by the policy that the scheduler promises.
  // Gives the requests that it looks at their place on the device.
  const RequestBook* NextToRun(int64_t free);
  static void LeaveDevice(RequestBook& request);
  int64_t NextChunks(const RequestBook& request) const;
  void CheckPiece(const RequestBook& request, const Piece& piece);
  void LookAtEnd(RequestBook& request, absl::Time now);
  void CheckReason(const RequestBook& request, absl::Time now);
  bool MayBeStalled(const RequestBook& request, absl::Time now) const;
  void CheckHost(RequestBook& request, absl::Time now);
  void CheckLoad();
  void CheckDevice();
  void ForgetGone();
  void NoteProgress(absl::Time now);

  const SchedulerOptions options_;
  PagePool& pages_;
  HostPages& host_;
  Scheduler& scheduler_;
  std::vector<RequestBook*> requests_;  // that are in, or hold something; in their order
  int64_t num_accepted_ = 0;
  int64_t last_free_ = -1;
  size_t last_live_ = 0;
  absl::Time progress_ = absl::InfinitePast();      // something was last seen to move
  absl::Time all_computed_ = absl::InfinitePast();  // nobody was last seen to wait for compute
  std::optional<Violation> violation_;
  Sightings seen_;
};

}  // namespace headstart::simulation
