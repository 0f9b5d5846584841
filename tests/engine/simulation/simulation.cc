#include "tests/engine/simulation/simulation.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/schedule/prefix_hits.h"
#include "kernels/base/instant.h"
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
      : random_(seed),
        calm_(seed % 5 == 0),
        faults_(mutation != Mutation::kForgetExpire && !calm_),
        mutation_(mutation) {}

  EngineOptions DrawEngine() {
    EngineOptions options;
    SchedulerOptions& scheduler = options.scheduler;
    scheduler.geometry = {.num_layers = static_cast<int32_t>(random_.Between(1, 3)),
                          .heads = {.num_heads = 8,
                                    .num_kv_heads = static_cast<int32_t>(random_.Between(1, 4)),
                                    .head_dim = 8},
                          .chunk_pages = random_.Between(1, 3)};
    scheduler.piece_tokens = kBlockTokens * random_.Between(1, 4);
    piece_tokens_ = scheduler.piece_tokens;
    scheduler.batch_tokens =
        kBlockTokens * random_.Between(1, scheduler.piece_tokens / kBlockTokens);
    scheduler.num_slots = static_cast<int32_t>(random_.Between(1, 6));
    scheduler.max_requests = random_.Between(3, 16);
    scheduler.max_tokens = kBlockTokens * random_.Between(10, 60);
    scheduler.ageing = random_.Between(Milliseconds(20), absl::Seconds(2));
    scheduler.default_lease = absl::Seconds(3);
    scheduler.max_lease = absl::Seconds(8);
    scheduler.stall_timeout = absl::Seconds(2);
    options.num_pages = random_.Between(kMaxBlocks, 4 * kMaxBlocks);
    const int64_t piece = PieceChunks(scheduler);
    options.host_chunks = piece + random_.Between(0, 3 * piece);
    options.runner = {.num_layers = scheduler.geometry.num_layers,
                      .layer_time = random_.Between(Milliseconds(0.1), Milliseconds(2)),
                      .failing_permille = faults_ ? random_.Between(0, 15) : 0};
    options.calm = calm_;
    if (calm_) {
      scheduler.num_slots = 32;
      scheduler.max_requests = 100;
      scheduler.max_tokens = 1 << 20;
      options.num_pages = 40 * kMaxBlocks;
      options.host_chunks = 40 * kMaxBlocks * scheduler.geometry.num_layers;
    }
    geometry_ = scheduler.geometry;
    num_starts_ = random_.Between(1, 3);
    num_salts_ = random_.Between(1, 2);
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
    DrawTokens(request);
    DrawPrefix(request);
    if (random_.Percent(25)) request.skip_tokens = random_.Between(0, request.num_tokens() - 1);
    if (random_.Percent(20)) {
      request.deadline =
          FromNow(Milliseconds(5), random_.Percent(50) ? Milliseconds(300) : absl::Seconds(3));
    }
    if (random_.Percent(30)) request.priority = static_cast<int32_t>(random_.Between(-2, 2));
    const int64_t kind = may_detach && !calm_ ? random_.Between(0, 3) : 0;
    if (kind == 0) {
      DrawAttached(plan);
    } else {
      DrawDetached(plan, kind < 3);
    }
    if (faults_ && random_.Percent(10)) plan.cancel = DrawMoment();
    return plan;
  }

  // Few starts, so that prompts share pages.
  void DrawTokens(PrefillRequest& request) {
    const int64_t most = (random_.Percent(40) ? 3 : kMaxBlocks) * kBlockTokens;
    request.token_ids.resize(random_.Between(1, most));
    const auto start = static_cast<int32_t>(random_.Between(0, num_starts_ - 1));
    const int64_t shared = random_.Percent(70) ? kBlockTokens * random_.Between(1, kMaxBlocks) : 0;
    const auto own = static_cast<int32_t>(random_.Between(10, 1 << 20));
    for (int64_t i = 0; i < request.num_tokens(); ++i) {
      request.token_ids[i] = (i < shared ? start : own) * 64 + static_cast<int32_t>(i % 61);
    }
  }

  void DrawPrefix(PrefillRequest& request) {
    const int64_t kind = random_.Between(0, 9);
    const std::string salt = absl::StrCat(random_.Between(1, num_salts_));
    PrefixCaching& prefix = request.prefix;
    request.attention.enabled = kind >= 5;
    if (kind != 0 && kind != 5) {  // else it shares nothing
      prefix.cache_root = absl::StrCat(salt, kind > 6 ? " sparse" : " dense");
    }
    prefix.keeps_pages = kind != 6;
    prefix.any_page = kind <= 4 || kind == 6;
    if (prefix.keeps_pages && random_.Percent(20)) DrawHeld(request);
  }

  void DrawHeld(PrefillRequest& request) {
    const int64_t named = NamedTokens(request, piece_tokens_) / kBlockTokens;
    std::vector<PageHash> names =
        HashPages("model", request.prefix.cache_root.value_or(""), request.token_ids, named);
    names.resize(random_.Between(0, named));
    names.push_back({});
    for (const PageHash& name : names) {
      request.prefix.held_pages.append(name.bytes.begin(), name.bytes.end());
    }
  }

  Instant FromNow(absl::Duration low, absl::Duration high) {
    return Instant() + random_.Between(low, high);
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
    if (mutation_ == Mutation::kForgetEnd) plan.request.deadline = Instant::InfiniteFuture();
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
  const bool calm_;    // nothing is scarce but compute
  const bool faults_;  // clients and device do wrong
  const Mutation mutation_;
  KvGeometry geometry_;
  int64_t piece_tokens_ = 0;
  int64_t num_starts_ = 1;
  int64_t num_salts_ = 1;
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
