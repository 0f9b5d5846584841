// Whoever asks for a prefill: one call, the readers of its KV, and what goes wrong with them.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/ship/kv_part.h"
#include "engine/ship/shipment.h"
#include "tests/engine/simulation/engine.h"

namespace headstart::simulation {

// One reader of a part and what happens to it.
struct ReaderPlan {
  KvPart part;
  std::optional<absl::Duration> start;  // of a fetch, after the request came; none: never
  absl::Duration wire;                  // that a chunk takes to be sent
  int64_t ack_every = 1;                // chunks
  std::optional<int64_t> break_at;      // the stream breaks with that chunk on the wire
  std::optional<absl::Duration> pause;  // until it comes again; none: never
  std::optional<int64_t> rest_at;       // takes no more chunks from there on, and does not break
};

struct ClientPlan {
  absl::Duration arrival;
  PrefillRequest request;
  std::vector<ReaderPlan> readers;  // of an attached call: one
  std::optional<absl::Duration> cancel;
  std::optional<absl::Duration> release;
  bool releases_when_done = false;
  int64_t renewals = 0;
  absl::Duration renew_every;
  std::optional<absl::Duration> stranger;  // somebody with another certificate tries
};

// A stream of chunks that goes on until it ended, or its reader stays away.
class Fetcher {
 public:
  // `needed`: others wait for what it acknowledges. `done`: it ended well.
  Fetcher(SimulatedEngine* engine, RequestBook* book, const ReaderPlan& plan, bool needed,
          std::function<void()> done);

  // Reads a stream that stands already.
  void Follow(std::unique_ptr<ShipmentReader> reader);
  // Opens a stream when its time is there.
  void ComeLater();
  // When nothing will happen any more: whoever reads was told the end.
  void CheckOver();

 private:
  // Opens a stream where the last one broke.
  void Fetch();
  // Takes chunks as long as there are any and the wire is free.
  void Pump();
  void Send(ShipmentReader::Chunk chunk);
  void Sent(const KvChunk& chunk);
  void Arrived();
  void Acknowledge(int64_t num_chunks);
  void Break();
  void Ended(const ShipmentReader::Ended& ended);
  void GoAway();
  void ComeBack();

  SimulatedEngine& engine_;
  RequestBook& book_;
  const ReaderPlan plan_;
  const bool needed_;
  const std::function<void()> done_;
  std::vector<std::pair<int32_t, TokenRange>> expected_;  // chunks of the part: layer, tokens
  int64_t kv_bytes_ = 0;                                  // of these
  std::unique_ptr<ShipmentReader> reader_;
  bool away_ = false;
  bool broke_ = false;
  bool sending_ = false;
  int64_t num_streams_ = 0;
  int64_t received_ = 0;
};

class Client {
 public:
  Client(SimulatedEngine* engine, ClientPlan plan) : engine_(*engine), plan_(std::move(plan)) {}

  // Comes when its time is there.
  void Schedule();
  // When nothing will happen any more.
  void CheckOver();

 private:
  void Submit();
  void CheckRefusal(const absl::Status& refused);
  void ScheduleReaders(std::unique_ptr<ShipmentReader> attached);
  void ScheduleFaults();
  void OneReaderDone();
  void Cancel();
  void Release();
  void Renew();
  void TryAsStranger();
  // A call about detached KV was answered as it must be.
  void CheckAnswer(const char* call, const absl::Status& answer, bool is_owner);
  void After(std::optional<absl::Duration> delay, void (Client::*event)());

  SimulatedEngine& engine_;
  ClientPlan plan_;
  RequestBook book_;
  std::string owner_;
  std::vector<std::unique_ptr<Fetcher>> fetchers_;
  size_t num_done_ = 0;
};

}  // namespace headstart::simulation
