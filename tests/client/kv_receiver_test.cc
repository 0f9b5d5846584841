#include "client/kv_receiver.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "client/checksum.h"
#include "tests/client/kv_stream.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::KvStream;
using testing::KvStreamSpec;
using testing::Seal;
using testing::StatusIs;

// A stream that is right until a test damages it. Indices into stream_: 0 accepted, 1 manifest, 2
// first chunk, last completed.
class KvReceiverTest : public ::testing::Test {
 protected:
  KvReceiverTest() { Rebuild(); }

  void Rebuild() {
    kv_ = MakeKv(spec_);
    stream_ = MakeStream(spec_, kv_);
    options_.expected.num_tokens = spec_.num_tokens;
    options_.on_manifest = [this](const v1::KvManifest&, const KvShape& shape) {
      ++num_allocations_;
      received_.assign(shape.total_bytes(), std::byte{0});
      return ContiguousKv(shape, absl::MakeSpan(received_));
    };
  }

  absl::Status Receive(size_t slice_bytes = 37) {
    KvAssembly assembly(options_);
    KvReceiver receiver(StreamKind::kPrefill, &assembly);
    for (const v1::PrefillResponse& response : stream_) {
      grpc::ByteBuffer message = testing::ToByteBuffer(response.SerializeAsString(), slice_bytes);
      if (absl::Status status = receiver.OnMessage(message); !status.ok()) return status;
    }
    if (absl::Status status = receiver.OnEnd(); !status.ok()) return status;
    return assembly.CheckWhole();
  }

  void ExpectDataLoss(const std::string& what) {
    EXPECT_THAT(Receive(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(what)));
  }

  v1::KvChunk* Chunk(int i) { return stream_[2 + i].mutable_chunk(); }
  v1::KvManifest* Manifest() { return stream_[1].mutable_manifest(); }
  void EditCompletion(const std::function<void(v1::Completed&)>& edit) {
    testing::EditCompleted(&stream_.back(), edit);
  }
  int NumChunks() const { return static_cast<int>(stream_.size()) - 3; }
  // Makes the indices count again, and the totals fit, after chunks were moved about.
  void Renumber() {
    uint64_t bytes = 0;
    for (int i = 0; i < NumChunks(); ++i) {
      Chunk(i)->set_index(i);
      Seal(Chunk(i));
      bytes += Chunk(i)->data().size();
    }
    EditCompletion([&](v1::Completed& completed) {
      completed.set_num_chunks(NumChunks());
      completed.set_kv_bytes(bytes);
    });
  }

  KvStreamSpec spec_;
  KvReceiverOptions options_;
  std::vector<std::byte> kv_;
  KvStream stream_;
  std::vector<std::byte> received_;
  int num_allocations_ = 0;
};

TEST_F(KvReceiverTest, AssemblesWhatWasSent) {
  for (const size_t slice : {1, 5, 64, 100000}) {
    ASSERT_OK(Receive(slice));
    EXPECT_EQ(received_, kv_);
  }
}

TEST_F(KvReceiverTest, AssemblesOddShapes) {
  const KvStreamSpec specs[] = {
      {.num_layers = 1, .num_kv_heads = 1, .head_dim = 1, .num_tokens = 1},
      {.num_layers = 2, .num_kv_heads = 3, .num_tokens = 16, .dtype = v1::KV_DTYPE_F32},
      {.num_kv_heads = 3, .num_tokens = 33, .chunk_tokens = 4, .pass_tokens = 8},
      {.num_tokens = 64, .chunk_tokens = 64, .pass_tokens = 64, .dtype = v1::KV_DTYPE_F16}};
  for (const KvStreamSpec& spec : specs) {
    spec_ = spec;
    Rebuild();
    ASSERT_OK(Receive());
    EXPECT_EQ(received_, kv_);
  }
}

TEST_F(KvReceiverTest, ChecksAndDropsWithoutDestination) {
  options_.on_manifest = nullptr;
  EXPECT_OK(Receive());
  Chunk(1)->mutable_data()->at(3) ^= 1;
  ExpectDataLoss("crc32c");
}

TEST_F(KvReceiverTest, TellsLayersAsTheyComplete) {
  std::vector<int64_t> layers;
  std::vector<std::vector<std::byte>> at_callback;
  options_.on_layer = [&](int64_t layer) {
    layers.push_back(layer);
    at_callback.push_back(received_);
    return absl::OkStatus();
  };
  ASSERT_OK(Receive());
  EXPECT_THAT(layers, ElementsAre(0, 1, 2));
  const size_t layer_bytes = kv_.size() / 3;
  for (size_t l = 0; l < 3; ++l) {
    EXPECT_TRUE(
        std::equal(kv_.begin(), kv_.begin() + (l + 1) * layer_bytes, at_callback[l].begin()))
        << l;
  }
}

TEST_F(KvReceiverTest, ReportsProgressUpToTheTotal) {
  int64_t last = 0;
  options_.on_progress = [&](int64_t done, int64_t total) {
    EXPECT_GT(done, last);
    EXPECT_EQ(total, static_cast<int64_t>(kv_.size()));
    last = done;
  };
  ASSERT_OK(Receive());
  EXPECT_EQ(last, static_cast<int64_t>(kv_.size()));
}

TEST_F(KvReceiverTest, EndsWithTheErrorOfACallback) {
  options_.on_layer = [](int64_t) { return absl::AbortedError("enough"); };
  EXPECT_THAT(Receive(), StatusIs(absl::StatusCode::kAborted, "enough"));
}

// ---- order

TEST_F(KvReceiverTest, RefusesAnEmptyStream) {
  stream_.clear();
  ExpectDataLoss("without `completed`");
}

TEST_F(KvReceiverTest, RefusesEveryTruncation) {
  const KvStream whole = stream_;
  for (size_t size = 0; size < whole.size(); ++size) {
    stream_.assign(whole.begin(), whole.begin() + size);
    ExpectDataLoss("without `completed`");
  }
}

TEST_F(KvReceiverTest, RefusesEveryMissingMessage) {
  const KvStream whole = stream_;
  for (size_t drop = 0; drop < whole.size(); ++drop) {
    stream_ = whole;
    stream_.erase(stream_.begin() + drop);
    ExpectDataLoss("");
  }
}

TEST_F(KvReceiverTest, RefusesEveryDuplicate) {
  const KvStream whole = stream_;
  for (size_t twice = 0; twice < whole.size(); ++twice) {
    stream_ = whole;
    stream_.insert(stream_.begin() + twice, whole[twice]);
    ExpectDataLoss("");
  }
}

TEST_F(KvReceiverTest, RefusesEverySwapOfNeighbours) {
  const KvStream whole = stream_;
  for (size_t i = 0; i + 1 < whole.size(); ++i) {
    stream_ = whole;
    std::swap(stream_[i], stream_[i + 1]);
    ExpectDataLoss("");
  }
}

// ---- coverage, with indices, checksums and totals that fit

TEST_F(KvReceiverTest, RefusesAGapInALayer) {
  const KvStream whole = stream_;
  for (int chunk = 0; chunk < NumChunks(); ++chunk) {
    stream_ = whole;
    stream_.erase(stream_.begin() + 2 + chunk);
    Renumber();
    ExpectDataLoss("completed after");
  }
}

TEST_F(KvReceiverTest, RefusesTokensTwice) {
  stream_.insert(stream_.begin() + 2, stream_[2]);
  Renumber();
  ExpectDataLoss("goes back behind token 8");
}

TEST_F(KvReceiverTest, RefusesTokensOutOfOrder) {
  std::swap(stream_[2], stream_[3]);
  Renumber();
  ExpectDataLoss("goes back behind token 16");
}

TEST_F(KvReceiverTest, RefusesAMissingHead) {
  Chunk(1)->set_kv_head_count(1);
  Chunk(1)->mutable_data()->resize(Chunk(1)->data().size() / 2);
  Seal(Chunk(1));
  ExpectDataLoss("1 heads from 0 on, not 2 from 0 on");
}

// ---- lies of a chunk

TEST_F(KvReceiverTest, RefusesEveryFlippedBitOfAChunkMessage) {
  const std::string good = stream_[3].SerializeAsString();
  for (size_t bit = 0; bit < good.size() * 8; ++bit) {
    std::string bad = good;
    bad[bit / 8] = static_cast<char>(bad[bit / 8] ^ (1 << bit % 8));
    KvAssembly assembly(options_);
    KvReceiver receiver(StreamKind::kPrefill, &assembly);
    for (int i = 0; i < 3; ++i) {
      grpc::ByteBuffer message = testing::ToByteBuffer(stream_[i].SerializeAsString(), 37);
      ASSERT_OK(receiver.OnMessage(message));
    }
    grpc::ByteBuffer message = testing::ToByteBuffer(bad, 37);
    EXPECT_THAT(receiver.OnMessage(message), StatusIs(absl::StatusCode::kDataLoss))
        << "bit " << bit;
  }
}

TEST_F(KvReceiverTest, NamesBothChecksums) {
  Chunk(0)->set_crc32c(0x01020304);
  ExpectDataLoss("the sender's was 01020304");
}

TEST_F(KvReceiverTest, RefusesALayerThatIsNotThere) {
  Chunk(0)->set_layer(3);
  Seal(Chunk(0));
  ExpectDataLoss("only 3 layers");
}

TEST_F(KvReceiverTest, RefusesTokensBeyondThePrompt) {
  const int last = NumChunks() - 1;
  Chunk(last)->set_token_count(Chunk(last)->token_count() + 1);
  Seal(Chunk(last));
  ExpectDataLoss("ends at token 22; tokens 0 to 21 come");
}

TEST_F(KvReceiverTest, RefusesNumbersThatOverflow) {
  for (const uint32_t huge : {0x7fffffffu, 0xffffffffu, 0x80000000u}) {
    Rebuild();
    Chunk(0)->set_token_count(huge);
    Seal(Chunk(0));
    ExpectDataLoss("");
    Rebuild();
    Chunk(0)->set_kv_head_count(huge);
    Seal(Chunk(0));
    ExpectDataLoss("");
    Rebuild();
    Chunk(0)->set_kv_head_begin(huge);
    Seal(Chunk(0));
    ExpectDataLoss("");
    Rebuild();
    Chunk(0)->set_token_begin(huge);
    Seal(Chunk(0));
    ExpectDataLoss("");
  }
}

TEST_F(KvReceiverTest, RefusesAnEmptyChunk) {
  Chunk(0)->set_token_count(0);
  Chunk(0)->clear_data();
  Seal(Chunk(0));
  ExpectDataLoss("");
}

TEST_F(KvReceiverTest, RefusesPartsOfABlock) {
  Chunk(0)->set_token_count(6);
  Chunk(0)->mutable_data()->resize(Chunk(0)->data().size() / 8 * 6);
  Seal(Chunk(0));
  ExpectDataLoss("blocks of 4");
}

TEST_F(KvReceiverTest, RefusesDataOfAnotherSize) {
  Chunk(0)->mutable_data()->push_back('x');
  Seal(Chunk(0));
  ExpectDataLoss("data has 257 bytes, not 256");
  Chunk(0)->mutable_data()->resize(255);
  Seal(Chunk(0));
  ExpectDataLoss("data has 255 bytes, not 256");
}

// ---- lies of the manifest

TEST_F(KvReceiverTest, RefusesImpossibleShapes) {
  using Edit = void (*)(v1::KvManifest*);
  const Edit edits[] = {
      [](v1::KvManifest* m) { m->clear_layout(); },
      [](v1::KvManifest* m) { m->set_num_tokens(0); },
      [](v1::KvManifest* m) { m->mutable_layout()->set_num_layers(0); },
      [](v1::KvManifest* m) { m->mutable_layout()->set_num_layers(0xffffffff); },
      [](v1::KvManifest* m) { m->mutable_layout()->set_num_kv_heads(0xffffffff); },
      [](v1::KvManifest* m) { m->mutable_layout()->set_head_dim(0xffffffff); },
      [](v1::KvManifest* m) { m->mutable_layout()->set_block_tokens(0); },
      [](v1::KvManifest* m) { m->mutable_layout()->set_dtype(v1::KV_DTYPE_UNSPECIFIED); },
      [](v1::KvManifest* m) { m->mutable_layout()->set_dtype(static_cast<v1::KvDtype>(77)); }};
  for (const Edit edit : edits) {
    Rebuild();
    edit(Manifest());
    ExpectDataLoss("manifest:");
  }
  EXPECT_EQ(num_allocations_, 0);
}

TEST_F(KvReceiverTest, RefusesMoreThanTheCallerAllowsBeforeAskingForMemory) {
  options_.max_kv_bytes = static_cast<int64_t>(kv_.size()) - 1;
  EXPECT_THAT(Receive(), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("max_kv_bytes")));
  EXPECT_EQ(num_allocations_, 0);
  options_.max_kv_bytes = static_cast<int64_t>(kv_.size());
  EXPECT_OK(Receive());
}

TEST_F(KvReceiverTest, RefusesTheLargestShapeThatPassesTheFieldLimits) {
  options_.expected = {};
  Manifest()->set_num_tokens(INT32_MAX);
  v1::KvLayout* layout = Manifest()->mutable_layout();
  layout->set_num_layers(1024);
  layout->set_num_kv_heads(1024);
  layout->set_head_dim(1 << 16);
  layout->set_dtype(v1::KV_DTYPE_F32);
  options_.max_kv_bytes = std::numeric_limits<int64_t>::max();
  EXPECT_THAT(Receive(), StatusIs(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(num_allocations_, 0);
}

TEST_F(KvReceiverTest, RefusesWhatTheCallerDidNotExpect) {
  using Edit = void (*)(KvExpectation*);
  const Edit edits[] = {[](KvExpectation* e) { e->request_id = "r-2"; },
                        [](KvExpectation* e) { e->model = "other"; },
                        [](KvExpectation* e) { e->model_hash = "bb"; },
                        [](KvExpectation* e) { e->token_hash = TokenHash({}); },
                        [](KvExpectation* e) { e->num_tokens = 22; },
                        [](KvExpectation* e) { e->num_layers = 4; },
                        [](KvExpectation* e) { e->num_kv_heads = 1; },
                        [](KvExpectation* e) { e->head_dim = 8; },
                        [](KvExpectation* e) { e->dtype = v1::KV_DTYPE_F32; }};
  for (const Edit edit : edits) {
    options_.expected = {};
    edit(&options_.expected);
    ExpectDataLoss("expected");
  }
  EXPECT_EQ(num_allocations_, 0);
}

TEST_F(KvReceiverTest, AcceptsWhatTheCallerExpected) {
  options_.expected = {.request_id = "r-1",
                       .model = "tiny",
                       .model_hash = "aa",
                       .token_hash = Manifest()->token_hash(),
                       .num_tokens = 21,
                       .num_layers = 3,
                       .num_kv_heads = 2,
                       .head_dim = 4,
                       .dtype = v1::KV_DTYPE_BF16,
                       .dense = true};
  EXPECT_OK(Receive());
}

TEST_F(KvReceiverTest, RefusesSparseKvWhereDenseWasAskedFor) {
  options_.expected.dense = true;
  Manifest()->mutable_attention()->set_algorithm(v1::AttentionProvenance::ALGORITHM_PROXY_ATTN);
  ExpectDataLoss("dense");
}

TEST_F(KvReceiverTest, RefusesADestinationThatIsTooSmall) {
  options_.on_manifest = [this](const v1::KvManifest&, const KvShape& shape) {
    received_.assign(shape.total_bytes(), std::byte{0});
    auto destination = ContiguousKv(shape, absl::MakeSpan(received_));
    --destination->plane_bytes;
    return destination;
  };
  EXPECT_THAT(Receive(), StatusIs(absl::StatusCode::kInvalidArgument));
}

// ---- lies of the completion

TEST_F(KvReceiverTest, RefusesWrongTotals) {
  EditCompletion([&](v1::Completed& c) { c.set_num_chunks(NumChunks() + 1); });
  ExpectDataLoss("completed:");
  Rebuild();
  EditCompletion([&](v1::Completed& c) { c.set_kv_bytes(kv_.size() - 1); });
  ExpectDataLoss("completed:");
}

TEST_F(KvReceiverTest, RefusesEveryFlippedBitOfTheCompletion) {
  const std::string bytes = stream_.back().SerializeAsString();
  for (size_t bit = 0; bit < 8 * bytes.size(); ++bit) {
    std::string damaged = bytes;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ 1 << bit % 8);
    KvAssembly assembly(options_);
    KvReceiver receiver(StreamKind::kPrefill, &assembly);
    absl::Status status;
    for (size_t i = 0; i < stream_.size() && status.ok(); ++i) {
      grpc::ByteBuffer message = testing::ToByteBuffer(
          i + 1 < stream_.size() ? stream_[i].SerializeAsString() : damaged, 1000);
      status = receiver.OnMessage(message);
    }
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kDataLoss)) << "bit " << bit;
  }
}

TEST_F(KvReceiverTest, RefusesACompletionThatIsNone) {
  v1::CheckedCompletion& completion = *stream_.back().mutable_completed();
  completion.set_completed("\xff\xff");
  Seal(&completion);
  ExpectDataLoss("no `Completed`");
}

TEST_F(KvReceiverTest, RefusesACompletionWithoutFirstToken) {
  EditCompletion([](v1::Completed& c) { c.clear_first_token(); });
  ExpectDataLoss("first_token");
}

TEST_F(KvReceiverTest, RefusesAnotherFinalManifest) {
  EditCompletion([](v1::Completed& c) { c.mutable_manifest()->set_model_hash("bb"); });
  ExpectDataLoss("not the one");
}

TEST_F(KvReceiverTest, RefusesDensitiesThatCanNotBe) {
  for (const float density : {0.0f, -1.0f, 1.5f, std::numeric_limits<float>::quiet_NaN()}) {
    Rebuild();
    EditCompletion([&](v1::Completed& c) { c.mutable_manifest()->set_layer_density(1, density); });
    ExpectDataLoss("layer_density");
  }
  Rebuild();
  EditCompletion(
      [](v1::Completed& c) { c.mutable_manifest()->mutable_layer_density()->RemoveLast(); });
  ExpectDataLoss("layer_density has 2");
}

// ---- detached KV

TEST_F(KvReceiverTest, DetachedKvDoesNotComeOnTheStreamOfPrefill) {
  KvAssembly assembly(options_);
  KvReceiver receiver(StreamKind::kDetached, &assembly);
  stream_[0].mutable_accepted()->set_fetch_id(testing::FetchId());
  for (int i = 0; i < 2; ++i) {
    grpc::ByteBuffer message = testing::ToByteBuffer(stream_[i].SerializeAsString(), 37);
    ASSERT_OK(receiver.OnMessage(message));
  }
  grpc::ByteBuffer message = testing::ToByteBuffer(stream_[2].SerializeAsString(), 37);
  EXPECT_THAT(receiver.OnMessage(message),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("out of order")));
}

TEST_F(KvReceiverTest, DetachedKvNeedsAnIdToFetch) {
  KvAssembly assembly(options_);
  KvReceiver receiver(StreamKind::kDetached, &assembly);
  grpc::ByteBuffer message = testing::ToByteBuffer(stream_[0].SerializeAsString(), 37);
  EXPECT_THAT(receiver.OnMessage(message),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("fetch_id has 0 bytes, not 16")));
}

}  // namespace
}  // namespace headstart
