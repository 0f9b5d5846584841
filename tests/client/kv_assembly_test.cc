#include "client/kv_assembly.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "client/kv_receiver.h"
#include "client/prefill_client.h"
#include "tests/client/kv_stream.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::KvStream;
using testing::KvStreamSpec;
using testing::ReceiveInTurns;
using testing::StatusIs;

TEST(TokenSetTest, TakesWhatDoesNotOverlap) {
  TokenSet tokens;
  EXPECT_TRUE(tokens.Insert(8, 16));
  EXPECT_TRUE(tokens.Insert(24, 32));
  EXPECT_TRUE(tokens.Insert(0, 4));
  EXPECT_TRUE(tokens.Insert(16, 24));
  EXPECT_TRUE(tokens.Insert(4, 8));
  EXPECT_FALSE(tokens.Insert(0, 32));
  EXPECT_FALSE(tokens.Insert(31, 40));
  EXPECT_TRUE(tokens.Insert(32, 40));
}

// Against a set of single tokens.
TEST(TokenSetTest, AgreesWithASetOfTokens) {
  std::mt19937 random(1);
  for (int round = 0; round < 50; ++round) {
    TokenSet tokens;
    std::set<int64_t> single;
    for (int i = 0; i < 200; ++i) {
      const auto begin = static_cast<int64_t>(random() % 200);
      const auto end = begin + 1 + static_cast<int64_t>(random() % 8);
      const auto first = single.lower_bound(begin);
      const bool is_new = first == single.end() || *first >= end;
      ASSERT_EQ(tokens.Insert(begin, end), is_new) << begin << " to " << end;
      if (!is_new) continue;
      for (int64_t t = begin; t < end; ++t) single.insert(t);
    }
  }
}

class KvAssemblyTest : public ::testing::Test {
 protected:
  KvAssemblyTest() {
    options_.on_manifest = [this](const v1::KvManifest&, const KvShape& shape) {
      ++num_manifests_;
      received_.assign(shape.total_bytes(), std::byte{0});
      return ContiguousKv(shape, absl::MakeSpan(received_));
    };
  }

  std::vector<KvStream> Streams(int stripes, const v1::KvPart& part = {}) const {
    std::vector<KvStream> streams;
    for (const v1::KvPart& stripe : StripesOf(part, stripes))
      streams.push_back(MakeFetchStream(spec_, kv_, stripe));
    return streams;
  }

  KvStreamSpec spec_{.num_tokens = 61};
  const std::vector<std::byte> kv_ = MakeKv(spec_);
  KvReceiverOptions options_;
  std::vector<std::byte> received_;
  int num_manifests_ = 0;
};

TEST_F(KvAssemblyTest, BringsStripesTogether) {
  for (const int stripes : {1, 2, 3, 8, 64}) {
    KvAssembly assembly(options_);
    ASSERT_OK(ReceiveInTurns(Streams(stripes), &assembly)) << stripes;
    EXPECT_EQ(received_, kv_);
    EXPECT_EQ(assembly.completed().kv_bytes(), kv_.size());
    EXPECT_EQ(assembly.completed().num_chunks(), 24);
    EXPECT_EQ(assembly.completed().first_token().id(), 42);
  }
  EXPECT_EQ(num_manifests_, 5) << "memory is asked for once";
}

TEST_F(KvAssemblyTest, TellsALayerWhenAllStreamsHaveBroughtTheirsOfIt) {
  std::vector<int64_t> layers;
  int64_t last_bytes = 0;
  options_.on_layer = [&](int64_t layer) {
    layers.push_back(layer);
    const size_t layer_bytes = kv_.size() / 3;
    EXPECT_TRUE(
        std::equal(kv_.begin(), kv_.begin() + (layer + 1) * layer_bytes, received_.begin()));
    return absl::OkStatus();
  };
  options_.on_progress = [&](int64_t done, int64_t total) {
    EXPECT_GT(done, last_bytes);
    EXPECT_EQ(total, static_cast<int64_t>(kv_.size()));
    last_bytes = done;
  };
  KvAssembly assembly(options_);
  ASSERT_OK(ReceiveInTurns(Streams(3), &assembly));
  EXPECT_THAT(layers, ElementsAre(0, 1, 2));
  EXPECT_EQ(last_bytes, static_cast<int64_t>(kv_.size()));
}

// Each page is marked when its chunk is in place, not before, and none but those that come.
TEST_F(KvAssemblyTest, MarksPagesThatHaveArrived) {
  std::vector<uint8_t> arrived;
  const auto marked = [&] { return std::count(arrived.begin(), arrived.end(), 1); };
  options_.on_manifest = [&](const v1::KvManifest&, const KvShape& shape) {
    received_.assign(shape.total_bytes(), std::byte{0});
    arrived.assign(shape.num_pages(), 0);
    absl::StatusOr<KvDestination> destination = ContiguousKv(shape, absl::MakeSpan(received_));
    destination->arrived = absl::MakeSpan(arrived);
    return destination;
  };
  options_.on_progress = [&](int64_t done, int64_t total) {
    EXPECT_EQ(marked() == static_cast<int64_t>(arrived.size()), done == total);
    EXPECT_GT(marked(), 0);
  };
  KvAssembly assembly(options_);
  ASSERT_OK(ReceiveInTurns(Streams(3), &assembly));
  EXPECT_EQ(marked(), assembly.shape().num_pages());
}

TEST_F(KvAssemblyTest, RefusesMarksForOtherPagesThanThoseThatCome) {
  std::vector<uint8_t> arrived;
  options_.on_manifest = [&](const v1::KvManifest&, const KvShape& shape) {
    received_.assign(shape.total_bytes(), std::byte{0});
    arrived.assign(shape.num_pages() - 1, 0);
    absl::StatusOr<KvDestination> destination = ContiguousKv(shape, absl::MakeSpan(received_));
    destination->arrived = absl::MakeSpan(arrived);
    return destination;
  };
  KvAssembly assembly(options_);
  EXPECT_THAT(ReceiveInTurns(Streams(1), &assembly),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("arrived has")));
}

TEST_F(KvAssemblyTest, NamesTheLayersOfAPartAsTheModelDoes) {
  std::vector<int64_t> layers;
  options_.on_layer = [&](int64_t layer) {
    layers.push_back(layer);
    return absl::OkStatus();
  };
  v1::KvPart part;
  part.set_layer_begin(1);
  KvAssembly assembly(options_, part);
  ASSERT_OK(ReceiveInTurns(Streams(2, part), &assembly));
  EXPECT_THAT(layers, ElementsAre(1, 2));
  EXPECT_EQ(received_, PartOf(spec_, kv_, part));
}

TEST_F(KvAssemblyTest, CallsNoCallbackAfterOneFailed) {
  int calls = 0;
  options_.on_layer = [&](int64_t) {
    ++calls;
    return absl::AbortedError("enough");
  };
  KvAssembly assembly(options_);
  EXPECT_THAT(ReceiveInTurns(Streams(2), &assembly),
              StatusIs(absl::StatusCode::kAborted, "enough"));
  EXPECT_THAT(ReceiveInTurns(Streams(2), &assembly),
              StatusIs(absl::StatusCode::kAborted, "enough"));
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(num_manifests_, 1);
}

TEST_F(KvAssemblyTest, RefusesAnotherManifestOnAnotherStream) {
  std::vector<KvStream> streams = Streams(2);
  streams[1][0].mutable_manifest()->set_model_hash("bb");
  KvAssembly assembly(options_);
  EXPECT_THAT(ReceiveInTurns(streams, &assembly),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("another stream")));
}

TEST_F(KvAssemblyTest, RefusesAnotherFirstTokenOnAnotherStream) {
  std::vector<KvStream> streams = Streams(2);
  testing::EditCompleted(&streams[1].back(),
                         [](v1::Completed& c) { c.mutable_first_token()->set_id(43); });
  KvAssembly assembly(options_);
  EXPECT_THAT(ReceiveInTurns(streams, &assembly),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("another stream")));
}

TEST_F(KvAssemblyTest, RefusesOtherDensitiesOnAnotherStream) {
  std::vector<KvStream> streams = Streams(2);
  testing::EditCompleted(&streams[1].back(), [](v1::Completed& c) {
    c.mutable_manifest()->set_layer_density(0, 0.5f);
  });
  KvAssembly assembly(options_);
  EXPECT_THAT(ReceiveInTurns(streams, &assembly),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("another stream")));
}

TEST_F(KvAssemblyTest, TakesTheStatisticsOfTheStreamThatEndedLast) {
  std::vector<KvStream> streams = Streams(3);
  for (const auto& [stream, seconds] : {std::pair(0, 2), std::pair(1, 5), std::pair(2, 3)}) {
    testing::EditCompleted(&streams[stream].back(), [seconds = seconds](v1::Completed& c) {
      c.mutable_statistics()->mutable_total()->set_seconds(seconds);
    });
  }
  KvAssembly assembly(options_);
  ASSERT_OK(ReceiveInTurns(streams, &assembly));
  EXPECT_EQ(assembly.completed().statistics().total().seconds(), 5);
}

TEST_F(KvAssemblyTest, RefusesTheSameStripeTwice) {
  std::vector<KvStream> streams = Streams(2);
  streams[1] = streams[0];
  KvAssembly assembly(options_);
  EXPECT_THAT(ReceiveInTurns(streams, &assembly),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("came before")));
}

TEST_F(KvAssemblyTest, MissesAStripeThatNobodyFetched) {
  std::vector<KvStream> streams = Streams(3);
  streams.pop_back();
  KvAssembly assembly(options_);
  EXPECT_THAT(ReceiveInTurns(streams, &assembly),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("completed after")));
}

TEST_F(KvAssemblyTest, RefusesHeadsAndLayersOfAnotherPart) {
  v1::KvPart heads, layers;
  heads.set_kv_head_begin(1);
  layers.set_layer_count(1);
  for (const v1::KvPart& part : {heads, layers}) {
    KvAssembly assembly(options_, part);
    EXPECT_THAT(ReceiveInTurns(Streams(1), &assembly),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr("on")));
  }
}

TEST_F(KvAssemblyTest, RefusesAPartThatTheModelDoesNotHave) {
  using Edit = void (v1::KvPart::*)(uint32_t);
  for (const auto& [edit, value] : {std::pair<Edit, uint32_t>(&v1::KvPart::set_layer_begin, 3),
                                    {&v1::KvPart::set_layer_count, 4},
                                    {&v1::KvPart::set_layer_count, 0xffffffff},
                                    {&v1::KvPart::set_kv_head_begin, 2},
                                    {&v1::KvPart::set_kv_head_count, 3}}) {
    v1::KvPart part;
    (part.*edit)(value);
    KvAssembly assembly(options_, part);
    EXPECT_THAT(ReceiveInTurns(Streams(1), &assembly),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("part: ")));
  }
  EXPECT_EQ(num_manifests_, 0);
}

TEST_F(KvAssemblyTest, CountsOnlyThePartAgainstTheLimitOfTheCaller) {
  v1::KvPart part;
  part.set_kv_head_count(1);
  options_.max_kv_bytes = static_cast<int64_t>(kv_.size()) / 2;
  KvAssembly half(options_, part);
  EXPECT_OK(ReceiveInTurns(Streams(1, part), &half));
  KvAssembly all(options_);
  EXPECT_THAT(ReceiveInTurns(Streams(1), &all), StatusIs(absl::StatusCode::kResourceExhausted));
}

TEST_F(KvAssemblyTest, KnowsWhatTheRequestSkipped) {
  spec_.skip_tokens = 13;
  options_.expected.skip_tokens = 13;
  KvAssembly assembly(options_);
  ASSERT_OK(ReceiveInTurns(Streams(2), &assembly));
  EXPECT_EQ(received_, PartOf(spec_, kv_));
  for (const int64_t other : {12, 14}) {
    options_.expected.skip_tokens = other;
    KvAssembly wrong(options_);
    EXPECT_THAT(ReceiveInTurns(Streams(2), &wrong),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr("manifest: skip_tokens=13")));
  }
}

}  // namespace
}  // namespace headstart
