// Requests whose KV is shipped as fp8: exactly what the reference makes of the KV that is computed.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "engine/error.h"
#include "kernels/cpu/reference_ops.h"
#include "tests/engine/engine_fixture.h"

namespace headstart {
namespace {

using testing::BackendCall;
using ::testing::HasSubstr;
using testing::StatusIs;

class EngineFp8Test : public EngineTest {
 protected:
  static constexpr int64_t kTokens = 700;  // five pages and a bit

  void SetUp() override {
    ASSERT_OK_AND_ASSIGN(test_, MakeEngine({}, /*piece_tokens=*/384));
    test_.engine->Open();
  }

  PrefillRequest Request(std::optional<DType> dtype, int64_t skip_tokens = 0) const {
    PrefillRequest request;
    request.token_ids = RandomTokens(kTokens);
    request.skip_tokens = skip_tokens;
    request.kv_dtype = dtype;
    return request;
  }

  // Pages as they lie in host memory, by layer and number.
  using Pages = std::map<std::pair<int32_t, int64_t>, std::vector<std::byte>>;

  // Runs the request; a page comes once.
  absl::StatusOr<Pages> Run(PrefillRequest request, int64_t* kv_bytes = nullptr) {
    HEADSTART_RETURN_IF_ERROR(test_.engine->Validate(request));
    HEADSTART_ASSIGN_OR_RETURN(Submission submission, test_.engine->Submit(std::move(request)));
    Pages pages;
    const absl::Status status =
        testing::Drain(*submission.reader, [&](const ShipmentReader::Chunk& chunk) {
          const int64_t bytes = submission.reader->geometry().page_bytes();
          const TokenRange& tokens = chunk.chunk.tokens;
          for (int64_t p = 0; p < tokens.num_pages(); ++p) {
            const std::byte* page = chunk.chunk.memory->data() + p * bytes;
            const bool is_new = pages
                                    .emplace(std::pair(chunk.chunk.layer, tokens.first_page() + p),
                                             std::vector(page, page + bytes))
                                    .second;
            EXPECT_TRUE(is_new);
          }
        }).status();
    if (kv_bytes != nullptr) *kv_bytes = submission.reader->kv_bytes();
    submission.reader.reset();
    test_.engine->End(submission.key, absl::CancelledError("drained"));
    if (!status.ok()) return status;
    return pages;
  }

  // Fails the test where `fp8` is not what the reference makes of a page's tokens.
  void ExpectQuantised(std::vector<std::byte> page, int64_t num_tokens,
                       const std::vector<std::byte>& fp8) {
    const HeadShape& heads = test_.engine->config().heads;
    const KvPages kv{page.data(), test_.engine->geometry().dtype, heads};
    const std::vector<uint8_t> expected = reference::QuantizePage(kv, 0, num_tokens);
    ASSERT_EQ(fp8.size(), expected.size());
    EXPECT_EQ(std::memcmp(fp8.data(), expected.data(), Fp8ScaleBytes(heads)), 0);
    const int64_t head_bytes = kBlockTokens * heads.head_dim;
    for (auto at = Fp8ScaleBytes(heads); at < Fp8PageBytes(heads); at += head_bytes) {
      EXPECT_EQ(std::memcmp(fp8.data() + at, expected.data() + at, num_tokens * heads.head_dim), 0);
    }
  }

  TestEngine test_;
};

TEST_F(EngineFp8Test, ShipsWhatTheReferenceMakesOfEveryPage) {
  int64_t whole_bytes = 0, fp8_bytes = 0;
  ASSERT_OK_AND_ASSIGN(const Pages whole, Run(Request(std::nullopt), &whole_bytes));
  ASSERT_OK_AND_ASSIGN(const Pages fp8, Run(Request(DType::kF8E4M3), &fp8_bytes));
  ASSERT_EQ(fp8.size(), whole.size());
  for (const auto& [place, page] : whole) {
    SCOPED_TRACE("page " + std::to_string(place.second));
    const int64_t tokens = std::min(kBlockTokens, kTokens - place.second * kBlockTokens);
    ExpectQuantised(page, tokens, fp8.at(place));
  }
  const KvGeometry& geometry = test_.engine->geometry();  // f32
  const int64_t pages = NumBlocks(kTokens) * geometry.num_layers;
  EXPECT_EQ(fp8_bytes, whole_bytes / 4 + pages * Fp8ScaleBytes(geometry.heads));
}

// A page of which a part is skipped has the bytes of the whole one.
TEST_F(EngineFp8Test, APartOfAPageHasTheBytesOfTheWholeOne) {
  ASSERT_OK_AND_ASSIGN(const Pages all, Run(Request(DType::kF8E4M3)));
  for (const int64_t skip : {1, 127, 200, 640, 699}) {
    ASSERT_OK_AND_ASSIGN(const Pages some, Run(Request(DType::kF8E4M3, skip)));
    EXPECT_EQ(some.size(), (NumBlocks(kTokens) - skip / kBlockTokens) * 2);
    for (const auto& [place, page] : some) {
      const int64_t tokens = std::min(kBlockTokens, kTokens - place.second * kBlockTokens);
      if (tokens == kBlockTokens) EXPECT_EQ(page, all.at(place)) << skip;
    }
  }
}

TEST_F(EngineFp8Test, OffersWhatItComputesAndFp8) {
  EXPECT_EQ(test_.engine->kv_dtypes(), (std::vector<DType>{DType::kF32, DType::kF8E4M3}));
  EXPECT_OK(test_.engine->Validate(Request(DType::kF32)));
  const absl::Status refused = test_.engine->Validate(Request(DType::kBF16));
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kFailedPrecondition,
                                HasSubstr("kv_dtype=bf16 is not offered; this server ships f32 "
                                          "and fp8_e4m3")));
  EXPECT_EQ(ReasonOf(refused), ErrorReason::kKvDtypeUnavailable);
}

TEST_F(EngineFp8Test, FailuresEndTheRequestOnly) {
  for (const std::string op : {"QuantizeKv", "CopyOut", "Wait"}) {
    test_.backend->SetHook([&op](const BackendCall& call) {
      // Of a copy from staging memory nobody knows the layer.
      const bool fails = call.op == op && (op != "QuantizeKv" || call.layer == 1);
      return fails ? absl::ResourceExhaustedError("no more") : absl::OkStatus();
    });
    for (int i = 0; i < 6; ++i) {  // more often than the staging memory has room
      EXPECT_THAT(Run(Request(DType::kF8E4M3)),
                  StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("no more")));
    }
    test_.backend->SetHook(nullptr);
    EXPECT_OK(Run(Request(DType::kF8E4M3)));
  }
  test_.backend->PoisonOutput("RmsNorm", 1);
  EXPECT_THAT(Run(Request(DType::kF8E4M3)),
              StatusIs(absl::StatusCode::kInternal, HasSubstr("KV of layer 1")));
  test_.backend->PoisonOutput("", -1);
  EXPECT_OK(Run(Request(DType::kF8E4M3)));
}

}  // namespace
}  // namespace headstart
