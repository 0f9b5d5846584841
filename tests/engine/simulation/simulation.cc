#include "tests/engine/simulation/simulation.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "tests/engine/simulation/client.h"
#include "tests/engine/simulation/engine.h"
#include "tests/engine/simulation/random.h"

namespace headstart::simulation {
namespace {

using absl::Milliseconds;

constexpr int64_t kMaxBlocks = 10;  // of a prompt

// Draws the engine and its clients.
class Drawer {
 public:
  Drawer(uint64_t seed, Mutation mutation)
      : random_(seed), faults_(mutation != Mutation::kForgetExpire), mutation_(mutation) {}

  EngineOptions DrawEngine() {
    EngineOptions options;
    SchedulerOptions& scheduler = options.scheduler;
    scheduler.geometry = {.num_layers = static_cast<int32_t>(random_.Between(1, 3)),
                          .heads = {.num_heads = 8,
                                    .num_kv_heads = static_cast<int32_t>(random_.Between(1, 4)),
                                    .head_dim = 8},
                          .chunk_pages = random_.Between(1, 3)};
    scheduler.piece_tokens = kBlockTokens * random_.Between(1, 4);
    scheduler.num_slots = static_cast<int32_t>(random_.Between(1, 3));
    scheduler.max_requests = random_.Between(3, 16);
    scheduler.max_tokens = kBlockTokens * random_.Between(10, 60);
    scheduler.default_lease = absl::Seconds(3);
    scheduler.max_lease = absl::Seconds(8);
    scheduler.stall_timeout = absl::Seconds(2);
    options.num_pages = random_.Between(kMaxBlocks, 2 * kMaxBlocks);
    const int64_t piece = PieceChunks(scheduler);
    options.host_chunks = piece + random_.Between(0, 3 * piece);
    options.runner = {.num_layers = scheduler.geometry.num_layers,
                      .layer_time = random_.Between(Milliseconds(0.1), Milliseconds(2)),
                      .failing_percent = faults_ ? random_.Between(0, 2) : 0};
    geometry_ = scheduler.geometry;
    return options;
  }

  std::vector<ClientPlan> DrawClients() {
    std::vector<ClientPlan> clients(static_cast<size_t>(random_.Between(5, 20)));
    const absl::Duration mean_gap = random_.Between(Milliseconds(1), Milliseconds(60));
    absl::Duration arrival;
    for (size_t i = 0; i < clients.size(); ++i) {
      arrival += random_.Percent(30) ? absl::ZeroDuration()
                                     : random_.Between(absl::ZeroDuration(), 2 * mean_gap);
      clients[i] = DrawClient(absl::StrCat("r", i));
      clients[i].arrival = arrival;
    }
    if (random_.Percent(30)) {  // an id comes twice
      const size_t first = random_.Between(0, std::ssize(clients) - 1);
      ClientPlan again = DrawClient(clients[first].request.request_id, /*may_detach=*/false);
      again.arrival =
          clients[first].arrival + random_.Between(absl::ZeroDuration(), Milliseconds(200));
      clients.push_back(std::move(again));
    }
    return clients;
  }

 private:
  ClientPlan DrawClient(const std::string& id, bool may_detach = true) {
    ClientPlan plan;
    PrefillRequest& request = plan.request;
    request.request_id = id;
    request.token_ids.resize(random_.Between(1, kMaxBlocks * kBlockTokens));
    if (random_.Percent(25)) request.skip_tokens = random_.Between(0, request.num_tokens());
    if (random_.Percent(20)) request.deadline = FromNow(Milliseconds(5), absl::Seconds(3));
    const int64_t kind = may_detach ? random_.Between(0, 3) : 0;
    if (kind == 0 || !may_detach) {
      DrawAttached(plan);
    } else {
      DrawDetached(plan, kind < 3);
    }
    if (faults_ && random_.Percent(10)) plan.cancel = DrawMoment();
    return plan;
  }

  absl::Time FromNow(absl::Duration low, absl::Duration high) {
    return absl::UnixEpoch() + random_.Between(low, high);
  }
  absl::Duration DrawMoment() { return random_.Between(absl::ZeroDuration(), Milliseconds(300)); }

  void DrawAttached(ClientPlan& plan) {
    ReaderPlan reader;
    reader.part = WholeKv(geometry_);
    reader.wire = DrawWire();
    if (faults_ && random_.Percent(15)) {
      reader.rest_at = random_.Between(0, 8);
      // Nobody may wait for its room: then that ends it.
      plan.request.deadline = FromNow(absl::Seconds(1), absl::Seconds(20));
    }
    if (mutation_ == Mutation::kForgetEnd) plan.request.deadline = absl::InfiniteFuture();
    plan.readers.push_back(std::move(reader));
  }

  void DrawDetached(ClientPlan& plan, bool announced) {
    DetachedKv& detached = plan.request.detached.emplace();
    detached.owner = "owner";
    if (random_.Percent(60)) detached.lease = random_.Between(Milliseconds(200), absl::Seconds(9));
    for (const KvPart& part : DrawParts()) {
      if (announced) detached.readers.push_back(part);
      plan.readers.push_back(DrawFetch(part));
    }
    // Without readers that must come, others may come, or none.
    if (!announced && random_.Percent(20)) plan.readers.resize(1);
    plan.releases_when_done = random_.Percent(70);
    if (random_.Percent(10)) plan.release = DrawMoment();
    if (random_.Percent(20)) plan.renewals = random_.Between(1, 5);
    plan.renew_every = random_.Between(Milliseconds(100), absl::Seconds(3));
    if (random_.Percent(20)) plan.stranger = DrawMoment();
  }

  absl::Duration DrawWire() { return random_.Between(Milliseconds(0.05), Milliseconds(4)); }

  ReaderPlan DrawFetch(const KvPart& part) {
    ReaderPlan reader;
    reader.part = part;
    if (!faults_ || random_.Percent(95)) reader.start = DrawMoment();
    reader.wire = DrawWire();
    reader.ack_every = random_.Between(1, 5);
    if (!faults_) return reader;
    if (random_.Percent(25)) {
      reader.break_at = random_.Between(0, 8);
      if (random_.Percent(80)) reader.pause = random_.Between(Milliseconds(1), absl::Seconds(1));
    }
    if (random_.Percent(5)) reader.rest_at = random_.Between(0, 8);
    return reader;
  }

  // Parts that together are everything.
  std::vector<KvPart> DrawParts() {
    std::vector<KvPart> parts = {WholeKv(geometry_)};
    const int32_t heads = geometry_.heads.num_kv_heads, layers = geometry_.num_layers;
    if (heads > 1 && random_.Percent(40)) {
      const auto border = static_cast<int32_t>(random_.Between(1, heads - 1));
      parts.push_back(parts[0]);
      parts[0].head_count = border;
      parts[1].head_begin = border;
      parts[1].head_count = heads - border;
    }
    if (layers > 1 && random_.Percent(30)) {
      KvPart rest = parts.back();
      const auto border = static_cast<int32_t>(random_.Between(1, layers - 1));
      parts.back().layer_count = border;
      rest.layer_begin = border;
      rest.layer_count = layers - border;
      parts.push_back(rest);
    }
    const auto stripes = static_cast<int32_t>(random_.Percent(50) ? random_.Between(2, 4) : 1);
    const KvPart striped = parts[0];
    parts[0].stripe_count = stripes;
    for (int32_t i = 1; i < stripes; ++i) {
      parts.push_back(striped);
      parts.back().stripe_index = i;
      parts.back().stripe_count = stripes;
    }
    return parts;
  }

  Random random_;
  const bool faults_;
  const Mutation mutation_;
  KvGeometry geometry_;
};

}  // namespace

Report Simulate(uint64_t seed, Mutation mutation, bool trace) {
  Drawer drawer(seed, mutation);
  SimulatedEngine engine(drawer.DrawEngine(), mutation, seed + 1, trace);
  std::vector<std::unique_ptr<Client>> clients;
  for (ClientPlan& plan : drawer.DrawClients()) {
    clients.push_back(std::make_unique<Client>(&engine, std::move(plan)));
    clients.back()->Schedule();
  }
  engine.Run();
  for (const auto& client : clients) client->CheckOver();
  return {engine.model().violation(), engine.model().seen(), engine.trace()};
}

}  // namespace headstart::simulation
