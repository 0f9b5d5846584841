// KV that is shipped as fp8: whatever way it comes, its bytes are those that the reference makes of
// the KV that the server computes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/reference_ops.h"
#include "tests/server/fetching.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

constexpr int64_t kTokens = 700;
constexpr int64_t kPages = 6;  // the last one not full

v1::PrefillRequest Fp8Prompt(uint32_t skip_tokens) {
  v1::PrefillRequest request = Prompt(kTokens);
  request.set_kv_dtype(v1::KV_DTYPE_FP8_E4M3);
  request.set_skip_tokens(skip_tokens);
  return request;
}

class Fp8Test : public ServerTest {
 protected:
  Fp8Test() {
    model_.num_kv_heads = 4;
    options_.piece_tokens = 256;
  }
  void SetUp() override {
    Start();
    v1::PrefillRequest request = Prompt(kTokens);
    request.set_prefix_reuse(v1::PREFIX_REUSE_NONE);
    computed_ = ImageOf(Run(request)).bytes();
    for (int64_t layer = 0; layer < model_.num_layers; ++layer) {
      for (int64_t page = 0; page < kPages; ++page) {
        reference_.push_back(ReferencePage(layer, page));
      }
    }
  }

  HeadShape heads() const { return {model_.num_heads, model_.num_kv_heads, model_.head_dim}; }

  // A page of what the server computes, as it makes fp8 of it.
  std::vector<uint8_t> ReferencePage(int64_t layer, int64_t page) const {
    const int64_t begin = page * kBlockTokens;
    const int64_t count = std::min(kBlockTokens, kTokens - begin);
    const int64_t planes = int64_t{2} * model_.num_kv_heads;
    std::vector<float> f32(planes * kBlockTokens * model_.head_dim);
    const auto row_bytes = model_.head_dim * sizeof(float);
    for (int64_t head = 0; head < planes; ++head) {  // of K, then of V
      const int64_t from = (layer * planes + head) * kTokens + begin;
      std::memcpy(f32.data() + head * kBlockTokens * model_.head_dim,
                  computed_.data() + from * row_bytes, count * row_bytes);
    }
    return reference::QuantizePage({f32.data(), DType::kF32, heads()}, 0, count);
  }

  // The image is the prompt's KV from `skip` on, byte for byte.
  void ExpectReference(const KvImage& image, int64_t skip) const {
    EXPECT_TRUE(image.complete());
    const int64_t first_page = skip / kBlockTokens;
    const int64_t planes = int64_t{2} * model_.num_kv_heads;
    const int64_t dim = model_.head_dim;
    std::vector<float> scales;
    std::string bytes(static_cast<size_t>(model_.num_layers * planes * (kTokens - skip) * dim), 0);
    for (int64_t layer = 0; layer < model_.num_layers; ++layer) {
      for (int64_t page = first_page; page < kPages; ++page) {
        const std::vector<uint8_t>& expected = reference_[layer * kPages + page];
        const auto* of_page = reinterpret_cast<const float*>(expected.data());
        scales.insert(scales.end(), of_page, of_page + planes);
        const int64_t begin = std::max(skip, page * kBlockTokens);
        const int64_t end = std::min(kTokens, (page + 1) * kBlockTokens);
        for (int64_t head = 0; head < planes; ++head) {
          const int64_t to = (layer * planes + head) * (kTokens - skip) + begin - skip;
          const int64_t from = head * kBlockTokens + begin % kBlockTokens;
          std::memcpy(bytes.data() + to * dim,
                      expected.data() + Fp8ScaleBytes(heads()) + from * dim, (end - begin) * dim);
        }
      }
    }
    EXPECT_EQ(image.scales(), scales);
    EXPECT_TRUE(image.bytes() == bytes);
  }

  // All parts together, each on a connection of its own and all at the same time.
  void ExpectPartsAreReference(const std::vector<v1::KvPart>& parts, uint32_t skip,
                               bool announced) {
    v1::PrefillRequest request = Fp8Prompt(skip);
    request.mutable_detached();
    if (announced) request.mutable_detached()->mutable_readers()->Add(parts.begin(), parts.end());
    const auto stub = NewStub();
    OpenCall prefill(stub.get(), request);
    const std::string fetch_id = prefill.Read().accepted().fetch_id();
    std::vector<CallResult> fetched(parts.size());
    std::vector<std::thread> readers;
    for (size_t i = 0; i < parts.size(); ++i) {
      readers.emplace_back([&, i] {
        const auto own = NewStub();
        fetched[i] = OpenFetch(own.get(), fetch_id, parts[i]).Finish();
      });
    }
    for (std::thread& reader : readers) reader.join();
    EXPECT_TRUE(prefill.Finish().status.ok());
    CallResult all;
    for (const CallResult& part : fetched) {
      EXPECT_TRUE(part.status.ok()) << part.status.error_message();
      all.responses.insert(all.responses.end(), part.responses.begin(), part.responses.end());
    }
    ExpectReference(ImageOf(all), skip);
    grpc::ClientContext context;
    v1::ReleaseKvRequest release;
    release.set_fetch_id(fetch_id);
    v1::ReleaseKvResponse released;
    EXPECT_TRUE(stub->ReleaseKv(&context, release, &released).ok());
  }

  std::string computed_;                         // f32: [layer][K, V][head][token][dim]
  std::vector<std::vector<uint8_t>> reference_;  // fp8: [layer][page]
};

TEST_F(Fp8Test, OneStreamHasWhatTheReferenceMakes) {
  for (const uint32_t skip : {0, 1, 128, 200, 699}) {
    SCOPED_TRACE(skip);
    ExpectReference(ImageOf(Run(Fp8Prompt(skip))), skip);
  }
}

TEST_F(Fp8Test, StripesAndHeadsTogetherDo) {
  std::vector<v1::KvPart> ranks;  // heads 0; 1 and 2; 3: each in two stripes
  for (const uint32_t head : {0, 1, 3}) {
    for (v1::KvPart part : Stripes(2)) {
      part.set_kv_head_begin(head);
      part.set_kv_head_count(head == 1 ? 2 : 1);
      ranks.push_back(part);
    }
  }
  for (const uint32_t skip : {0, 200}) {
    SCOPED_TRACE(skip);
    ExpectPartsAreReference(Stripes(3), skip, /*announced=*/false);
    ExpectPartsAreReference(ranks, skip, /*announced=*/false);
    ExpectPartsAreReference(ranks, skip, /*announced=*/true);
  }
}

// Pages are kept as they were computed: what they are shipped as is for each request to say.
TEST_F(Fp8Test, PagesOfTheCacheAreShippedAsTheyAreAskedFor) {
  v1::PrefillRequest request = Prompt(kTokens);
  ASSERT_TRUE(ImageOf(Run(request)).bytes() == computed_);
  const CallResult hit = Run(Fp8Prompt(0));
  EXPECT_GT(CompletedOf(hit.responses.back()).manifest().cached_tokens(), 0u);
  ExpectReference(ImageOf(hit), 0);

  v1::PrefillRequest held = Fp8Prompt(0);
  held.set_held_pages(CompletedOf(hit.responses.back()).manifest().page_hashes().substr(0, 48));
  const CallResult rest = Run(held);
  EXPECT_EQ(rest.responses[1].manifest().skip_tokens(), 384u);
  ExpectReference(ImageOf(rest), 384);

  const CallResult full = Run(request);
  EXPECT_GT(CompletedOf(full.responses.back()).manifest().cached_tokens(), 0u);
  EXPECT_TRUE(ImageOf(full).bytes() == computed_);
}

}  // namespace
}  // namespace headstart::testing
