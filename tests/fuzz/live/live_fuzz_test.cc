// Bursts of what no client should send, over several connections at once, at a server in this
// process. After each of them nothing is left of it, and a good request gets what it got before.
//   HEADSTART_FUZZ_BURSTS=5000 live_fuzz_test         more bursts than usual
//   HEADSTART_FUZZ_SEED=17 HEADSTART_FUZZ_BURSTS=1    burst 17 alone; its threads and the server's
//   take their own turns
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "tests/fuzz/live/fetch_sequence.h"
#include "tests/fuzz/live/hostile_http2.h"
#include "tests/fuzz/live/hostile_message.h"
#include "tests/server/fetching.h"
#include "tests/server/server_fixture.h"

namespace headstart::testing {
namespace {

constexpr int64_t kBursts = 80;
constexpr int64_t kSeed = 1;

int64_t FromEnvironment(const char* name, int64_t otherwise) {
  int64_t number = 0;
  const char* text = std::getenv(name);
  return text != nullptr && absl::SimpleAtoi(text, &number) ? number : otherwise;
}

class LiveFuzzTest : public ServerTest {
 protected:
  LiveFuzzTest() {
    model_.num_layers = 4;
    options_.piece_tokens = 256;
    options_.host_kv_bytes = 4 << 20;
    options_.max_queue_requests = 3;
    options_.first_message_timeout = absl::Milliseconds(300);
    options_.write_stall_timeout = absl::Milliseconds(500);
    options_.default_lease = absl::Milliseconds(100);
    options_.max_lease = absl::Milliseconds(200);
    options_.connections.handshake_timeout = absl::Milliseconds(500);
    options_.connections.max_message_bytes = 64 << 10;
    options_.connections.receive_memory_bytes = 16 << 20;
    options_.connections.max_streams_per_connection = 16;
  }

  // What a good request gets: its KV and its first token.
  std::string Answer() const {
    const CallResult result = Run(Prompt(300));
    EXPECT_TRUE(result.status.ok())
        << result.status.error_code() << " " << result.status.error_message();
    if (!result.status.ok()) return "";
    return absl::StrCat(ImageOf(result).bytes(), "token ",
                        CompletedOf(result.responses.back()).first_token().id());
  }

  // Descriptors and threads that a burst must give back: none of them grows.
  int64_t Held() const {
    return static_cast<int64_t>(Metric("process_open_fds") + Metric("process_threads"));
  }

  void Burst(uint64_t seed) {
    std::vector<std::thread> clients;
    for (uint64_t i = 0; i < 3; ++i) {
      clients.emplace_back([this, number = seed * 8 + i] { Connections(Random(number)); });
    }
    for (uint64_t i = 3; i < 6; ++i) {
      clients.emplace_back(
          [this, number = seed * 8 + i] { FetchSequence(number, stub_.get()).Run(); });
    }
    for (std::thread& client : clients) client.join();
  }

  // The fuzzer reached what lies behind the first check of each kind.
  void ExpectWentEverywhere() {
    for (const auto& [code, reason] : std::vector<std::pair<std::string, std::string>>{
             {"OK", "NONE"},
             {"CANCELLED", "CLIENT_CANCELLED"},
             {"INVALID_ARGUMENT", "INVALID_FIELD"},
             {"INVALID_ARGUMENT", "MALFORMED_REQUEST"},
             {"DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"},
             {"ABORTED", "KV_RELEASED"},
             {"RESOURCE_EXHAUSTED", "QUEUE_FULL"},
             {"FAILED_PRECONDITION", "HOST_MEMORY_FULL"}}) {
      EXPECT_GT(Requests(code, reason), 0) << code << " " << reason;
    }
    for (const char* code : {"OK", "NOT_FOUND", "OUT_OF_RANGE", "INVALID_ARGUMENT", "CANCELLED"}) {
      EXPECT_GT(
          Metric(absl::StrCat("headstart_kv_fetches_total{code=\"", code, "\",model=\"tiny\"}")), 0)
          << code;
    }
    EXPECT_GT(Metric("headstart_kv_leases_expired_total{model=\"tiny\"}"), 0);
  }

  // Of all who fetch, on one connection: a channel that goes while it connects may leave its
  // connection open for a while, in gRPC 1.51.
  std::unique_ptr<v1::PrefillService::Stub> stub_;

 private:
  // Several connections that take turns, in one of three moods.
  void Connections(Random random) {
    constexpr int64_t kMischief[] = {0, 4, 25};
    std::vector<std::unique_ptr<HostileConnection>> connections;
    for (int64_t i = random.Between(1, 3); i > 0; --i) {
      connections.push_back(
          std::make_unique<HostileConnection>(&random, server_->port(), OneOf(random, kMischief)));
    }
    for (int64_t steps = random.Between(5, 120); steps > 0; --steps) {
      HostileConnection& one = *connections[random.Between(0, std::ssize(connections) - 1)];
      if (random.Percent(15)) {
        one.Open(DrawCall(random));
      } else {
        one.Step();
      }
    }
    for (const auto& connection : connections) {
      if (random.Percent(70)) connection->Finish();
    }
  }

  HostileCall DrawCall(Random& random) {
    const auto* service =
        v1::PrefillRequest::descriptor()->file()->FindServiceByName("PrefillService");
    const auto* method = service->method(
        static_cast<int>(random.Percent(50) ? 0 : random.Between(0, service->method_count() - 1)));
    HostileCall call{absl::StrCat("/", service->full_name(), "/", method->name()), {}};
    constexpr const char* kOthers[] = {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/headstart.v1.PrefillService/None",
        "/",
        "",
        "*"};
    if (random.Percent(10)) call.path = OneOf(random, kOthers);
    for (int64_t i = random.Percent(80) ? 1 : random.Between(0, 4); i > 0; --i) {
      call.messages.push_back(DrawMessage(random, *method->input_type()));
    }
    return call;
  }

  // A prompt that could be served has a third of the fields' share of trouble.
  std::string DrawMessage(Random& random, const google::protobuf::Descriptor& type) {
    constexpr int64_t kPercent[] = {0, 3, 10, 60};
    const std::unique_ptr<google::protobuf::Message> message(
        google::protobuf::MessageFactory::generated_factory()->GetPrototype(&type)->New());
    if (&type == v1::PrefillRequest::descriptor()) {
      message->CopyFrom(Prompt(random.Between(1, 900)));
    }
    SpoilFields(random, OneOf(random, kPercent), message.get());
    return SpoilBytes(random, OneOf(random, kPercent) / 2, message->SerializeAsString());
  }
};

TEST_F(LiveFuzzTest, NothingIsLeftOfABurstAndGoodRequestsAreServed) {
  Start();
  stub_ = NewStub();
  const std::string good = Answer();
  const auto first = static_cast<uint64_t>(FromEnvironment("HEADSTART_FUZZ_SEED", kSeed));
  const auto bursts = static_cast<uint64_t>(FromEnvironment("HEADSTART_FUZZ_BURSTS", kBursts));
  int64_t held = 0;
  for (uint64_t seed = first; seed < first + bursts && !HasFailure(); ++seed) {
    std::fprintf(stderr, "burst %llu\n", static_cast<unsigned long long>(seed));
    Burst(seed);
    ASSERT_TRUE(BecomesIdle(absl::Seconds(20))) << WhatIsLeft();
    ASSERT_TRUE(ComesTrue([this] { return server_->Snapshot().connections <= 1; }));
    ASSERT_TRUE(Answer() == good) << "another answer";
    if (seed < first + 20) held = std::max(held, Held());
    if (seed % 10 == 0) {
      EXPECT_LE(Held(), held + 10);
    }
  }
  EXPECT_EQ(Get("/healthz").status, 200);
  if (bursts >= kBursts) ExpectWentEverywhere();
}

}  // namespace
}  // namespace headstart::testing
