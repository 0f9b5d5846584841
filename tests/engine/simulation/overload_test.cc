// More requests than the machine can serve, in simulated time: those who are let in are as much
// work as it can do, and end in time. Open loop: nobody waits for an answer before he asks.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/instant.h"
#include "tests/engine/simulation/client.h"
#include "tests/engine/simulation/engine.h"
#include "tests/engine/simulation/random.h"

namespace headstart::simulation {
namespace {

constexpr absl::Duration kLayerTime = absl::Milliseconds(1);
constexpr int32_t kLayers = 3;

EngineOptions Machine() {
  EngineOptions options;
  options.scheduler.geometry = {.num_layers = kLayers,
                                .heads = {.num_heads = 8, .num_kv_heads = 1, .head_dim = 8},
                                .chunk_pages = 2};
  options.scheduler.piece_tokens = 4 * kBlockTokens;
  options.scheduler.batch_tokens = 2 * kBlockTokens;
  options.scheduler.max_requests = 1000;
  options.scheduler.max_tokens = 1 << 20;
  options.num_pages = 2000;
  options.host_chunks = 2000 * kLayers;
  options.runner = {.num_layers = kLayers, .layer_time = kLayerTime};
  options.calm = true;
  return options;
}

struct Traffic {
  int64_t requests = 0;
  absl::Duration mean_gap;  // zero: all at once
  absl::Duration deadline = absl::InfiniteDuration();
  int64_t most_blocks = 1;  // of a prompt
};

ClientPlan Request(const Traffic& traffic, int64_t number, absl::Duration arrival, Random& random) {
  ClientPlan plan;
  plan.arrival = arrival;
  plan.request.request_id = absl::StrCat("r", number);
  plan.request.token_ids.assign(
      static_cast<size_t>(random.Between(1, traffic.most_blocks) * kBlockTokens), 7);
  plan.request.deadline = Instant() + traffic.deadline;
  ReaderPlan reader;
  reader.part = WholeKv(Machine().scheduler.geometry);
  reader.wire = absl::Microseconds(10);
  plan.readers.push_back(std::move(reader));
  return plan;
}

struct Served {
  int64_t requests = 0;
  double tokens_per_second = 0;  // of those who got an answer in time
};

Served Serve(const Traffic& traffic) {
  SimulatedEngine engine(Machine(), Mutation::kNone, 1, /*trace=*/false);
  Random random(2);
  std::vector<std::unique_ptr<Client>> clients;
  absl::Duration arrival;
  for (int64_t i = 0; i < traffic.requests; ++i) {
    arrival += random.Between(absl::ZeroDuration(), 2 * traffic.mean_gap);
    clients.push_back(std::make_unique<Client>(&engine, Request(traffic, i, arrival, random)));
    clients.back()->Schedule();
  }
  engine.Run();
  EXPECT_FALSE(engine.model().violation().has_value()) << engine.model().violation()->what;
  const absl::Duration took = engine.timeline().now() - Instant();
  return {engine.model().seen().computed,
          static_cast<double>(engine.model().seen().computed_tokens) / absl::ToDoubleSeconds(took)};
}

// Longest prompt in blocks, and how many times what the machine can do comes.
class OverloadTest : public ::testing::TestWithParam<std::tuple<int64_t, double>> {};

TEST_P(OverloadTest, ServesAsMuchAsTheMachineCan) {
  const auto [most_blocks, times] = GetParam();
  Traffic traffic;
  traffic.requests = 300;
  traffic.most_blocks = most_blocks;
  const Served all = Serve(traffic);
  ASSERT_EQ(all.requests, traffic.requests);

  const double mean_tokens = static_cast<double>(most_blocks + 1) / 2 * kBlockTokens;
  traffic.mean_gap = absl::Seconds(mean_tokens / all.tokens_per_second / times);
  traffic.requests = static_cast<int64_t>(400 * times);
  traffic.deadline = 10 * kLayers * kLayerTime * static_cast<double>(1 + most_blocks);
  const Served overload = Serve(traffic);
  EXPECT_GT(overload.tokens_per_second, 0.85 * all.tokens_per_second)
      << "share " << overload.tokens_per_second / all.tokens_per_second << overload.requests;
}

INSTANTIATE_TEST_SUITE_P(Loads, OverloadTest,
                         ::testing::Combine(::testing::Values(1, 4, 10),
                                            ::testing::Values(3.0, 4.5, 6.0)));

}  // namespace
}  // namespace headstart::simulation
