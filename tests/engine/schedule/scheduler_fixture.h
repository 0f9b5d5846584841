// A scheduler with pools of its own and a clock that stands still unless it is moved.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "engine/error.h"
#include "engine/schedule/scheduler.h"
#include "kernels/base/instant.h"
#include "tests/engine/schedule/publish.h"
#include "tests/testing/status_matchers.h"

namespace headstart {

// Two layers of two KV heads; a chunk is a page, a piece four of them: 8 chunks of all layers.
inline SchedulerOptions SmallOptions() {
  return {
      .geometry = {.num_layers = 2, .heads = {.num_heads = 4, .num_kv_heads = 2, .head_dim = 8}},
      .piece_tokens = 512,
      .batch_tokens = 256};
}
inline constexpr int64_t kPiece = 512;
inline constexpr int64_t kPieceChunks = 8;

struct SmallPools {
  int64_t pages = 100;
  int64_t host_chunks = 100;
};

class SchedulerTest : public ::testing::Test {
 protected:
  explicit SchedulerTest(const SchedulerOptions& options = SmallOptions(), SmallPools pools = {}) {
    Make(options, pools);
  }

  // Another open scheduler instead.
  void Make(const SchedulerOptions& options, SmallPools pools = {}) {
    scheduler_.reset();
    pages_ = std::make_unique<PagePool>(pools.pages);
    host_ = std::make_unique<HostPages>(nullptr, options.geometry.chunk_bytes(), pools.host_chunks);
    scheduler_ = std::make_unique<Scheduler>(options, pages_.get(), host_.get(),
                                             absl::UnavailableError("not open yet"));
    scheduler_->Open();
  }

  static PrefillRequest Request(const std::string& id, int64_t num_tokens) {
    PrefillRequest request;
    request.request_id = id;
    request.token_ids.resize(num_tokens);
    return request;
  }

  static PrefillRequest Prioritised(PrefillRequest request, int32_t priority) {
    request.priority = priority;
    return request;
  }

  // Keeps its KV; announces `readers`.
  static PrefillRequest Detached(const std::string& id, int64_t num_tokens,
                                 std::vector<KvPart> readers = {}) {
    PrefillRequest request = Request(id, num_tokens);
    request.detached.emplace().readers = std::move(readers);
    return request;
  }

  // The fetch id of a detached one is its request id.
  absl::StatusOr<Admitted> Add(PrefillRequest request) {
    const std::string fetch_id = request.detached.has_value() ? request.request_id : "";
    return scheduler_->Add(std::move(request), fetch_id, now_);
  }
  Admitted MustAdd(PrefillRequest request) {
    absl::StatusOr<Admitted> admitted = Add(std::move(request));
    EXPECT_OK(admitted);
    return admitted.ok() ? *admitted : Admitted();
  }

  // The keys of the requests that are in the step.
  static std::vector<uint64_t> KeysOf(const std::optional<Step>& step) {
    std::vector<uint64_t> keys;
    if (!step.has_value()) return keys;
    for (const Piece& piece : step->pieces) keys.push_back(piece.request);
    return keys;
  }
  // The first of them; 0 without a step.
  static uint64_t KeyOf(const std::optional<Step>& step) {
    return step.has_value() ? step->pieces[0].request : 0;
  }

  // Publishes the KV of the step and finishes it; it took `seconds`.
  void Finish(Step& step, double seconds = 0.01) {
    StepResult results;
    for (Piece& piece : step.pieces) {
      PublishAll(piece);
      PieceResult& result = results.emplace_back();
      result.result.compute_seconds = seconds;
      if (piece.keep_state) result.state = std::make_shared<const SlotState>(1);
    }
    scheduler_->Finish(step, std::move(results), now_);
  }
  void Fail(const Step& step, absl::Status why) {
    scheduler_->Finish(step, StepResult(step.pieces.size(), {std::move(why), {}, {}}), now_);
  }
  // Runs steps until none can. Returns the keys of all pieces in their order.
  std::vector<uint64_t> RunAll() {
    std::vector<uint64_t> keys;
    while (std::optional<Step> step = scheduler_->Next(now_)) {
      for (const uint64_t key : KeysOf(step)) keys.push_back(key);
      Finish(*step);
    }
    return keys;
  }

  // Takes up to `count` chunks of the whole KV off the reader and lets them go.
  static int64_t Take(ShipmentReader& reader, int64_t count) {
    int64_t taken = 0;
    while (taken < count) {
      const ShipmentReader::Event event = reader.Next();
      if (std::holds_alternative<ShipmentReader::Started>(event)) continue;
      if (!std::holds_alternative<ShipmentReader::Chunk>(event)) break;
      ++taken;
    }
    return taken;
  }
  static std::unique_ptr<ShipmentReader> Reader(const Admitted& admitted) {
    return *admitted.shipment->Open(WholeKv(SmallOptions().geometry), 0);
  }
  // Why the request ended.
  static absl::Status EndOf(const Admitted& admitted) {
    auto reader = admitted.shipment->Open(std::nullopt, 0);
    return reader.ok() ? absl::UnknownError("not ended") : reader.status();
  }

  void Pass(absl::Duration time) { now_ += time; }

  // Everything went back.
  void ExpectNothingLeft() const {
    const SchedulerLoad& load = scheduler_->load();
    EXPECT_EQ(load.inflight_requests, 0);
    EXPECT_EQ(load.inflight_tokens, 0);
    EXPECT_EQ(load.queued_requests, 0);
    EXPECT_EQ(load.queued_tokens, 0);
    EXPECT_EQ(load.waiting_for_room, 0);
    EXPECT_EQ(load.leases, 0);
    EXPECT_EQ(load.lease_tokens, 0);
    EXPECT_EQ(load.waiting_for_room, 0);
    EXPECT_EQ(load.acquired, load.released);
    EXPECT_EQ(pages_->free_pages(), pages_->num_pages());
    EXPECT_EQ(host_->free_chunks(), host_->num_chunks());
  }

  Instant now_ = Instant();
  std::unique_ptr<PagePool> pages_;
  std::unique_ptr<HostPages> host_;
  std::unique_ptr<Scheduler> scheduler_;
};

}  // namespace headstart
