// QuantizeKv of every backend: the bits of the reference, and the bound of its error.
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <vector>

#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

using ::testing::HasSubstr;

std::string NameOf(const HeadShape& s) {
  return std::to_string(s.num_kv_heads) + "kv" + std::to_string(s.head_dim) + "d";
}

class QuantizeKvTest : public BackendTest,
                       public ::testing::WithParamInterface<std::tuple<BackendCase, HeadShape>> {
 protected:
  void SetUp() override {
    Open(std::get<0>(GetParam()));
    if (IsSkipped()) return;
    if (backend_->name() == "cuda" && shape().head_dim != 64 && shape().head_dim != 128) {
      GTEST_SKIP() << "the CUDA kernels take head_dim 64 and 128";
    }
  }
  const HeadShape& shape() const { return std::get<1>(GetParam()); }

  // Pages of these values, which the backend's type must be able to hold.
  KvPages PutPages(const HostMatrix& pages) {
    host_.resize(pages.values.size() * DTypeBytes(dtype()));
    reference::Store(pages, {host_.data(), dtype(), pages.rows, pages.cols, pages.cols});
    auto memory = backend_->Allocate(static_cast<int64_t>(host_.size()));
    EXPECT_OK(memory);
    EXPECT_OK(backend_->Upload(host_.data(), memory->bytes(), memory->data()));
    memory_ = *std::move(memory);
    return {memory_.data(), dtype(), shape()};
  }

  // What the backend makes of them, in memory that is 0 at first.
  std::vector<uint8_t> Quantize(const KvPages& kv, const std::vector<KvPageTokens>& pages) {
    std::vector<uint8_t> bytes(pages.size() * Fp8PageBytes(shape()));
    auto out = backend_->Allocate(static_cast<int64_t>(bytes.size()));
    EXPECT_OK(out);
    EXPECT_OK(backend_->Upload(bytes.data(), out->bytes(), out->data()));
    EXPECT_OK(backend_->QuantizeKv({kv, pages, out->data()}));
    EXPECT_OK(backend_->Download(out->data(), out->bytes(), bytes.data()));
    return bytes;
  }

  std::vector<uint8_t> Expected(const std::vector<KvPageTokens>& pages) {
    const KvPages kv{host_.data(), dtype(), shape()};
    std::vector<uint8_t> bytes;
    for (const KvPageTokens& page : pages) {
      const std::vector<uint8_t> one = reference::QuantizePage(kv, page.page, page.num_tokens);
      bytes.insert(bytes.end(), one.begin(), one.end());
    }
    return bytes;
  }

  int64_t page_elements() const { return KvPages{nullptr, dtype(), shape()}.page_elements(); }
  int64_t head_elements() const { return kBlockTokens * shape().head_dim; }

  std::vector<std::byte> host_;
  Buffer memory_;
};

INSTANTIATE_TEST_SUITE_P(All, QuantizeKvTest,
                         ::testing::Combine(::testing::ValuesIn(BackendsUnderTest()),
                                            ::testing::Values(HeadShape{4, 2, 64},
                                                              HeadShape{3, 1, 128},
                                                              HeadShape{9, 3, 16})),
                         [](const auto& info) {
                           return NameOf(std::get<0>(info.param)) + "_" +
                                  NameOf(std::get<1>(info.param));
                         });

// Pages in any order, one twice, whole and ragged; what lies behind the tokens is NaN.
TEST_P(QuantizeKvTest, GivesTheBitsOfTheReference) {
  HostMatrix values = RandomMatrix(5, page_elements(), 1, dtype(), 3);
  const std::vector<KvPageTokens> pages = {{3, 128}, {0, 1}, {4, 77}, {3, 128}, {1, 127}};
  for (const KvPageTokens& page : pages) {
    for (int64_t plane = 0; plane < 2 * shape().num_kv_heads; ++plane) {
      float* head = values.Row(page.page) + plane * head_elements();
      std::fill(head + page.num_tokens * shape().head_dim, head + head_elements(), NAN);
    }
  }
  const KvPages kv = PutPages(values);
  EXPECT_EQ(Quantize(kv, pages), Expected(pages));
}

// More pages than go into one launch.
TEST_P(QuantizeKvTest, TakesAnyNumberOfPages) {
  const KvPages kv = PutPages(RandomMatrix(3, page_elements(), 2, dtype()));
  std::vector<KvPageTokens> pages;
  for (int32_t i = 0; i < 300; ++i) pages.push_back({i % 3, 1 + i % 2});
  EXPECT_EQ(Quantize(kv, pages), Expected(pages));
  EXPECT_TRUE(Quantize(kv, {}).empty());
}

// Every number and every border between two of them, and a unit of the type to its sides.
TEST_P(QuantizeKvTest, RoundsEveryBorderAsTheReference) {
  HostMatrix values(1, page_elements());
  int64_t at = 0;
  const auto add = [&](float value) {
    for (const float sign : {1.0f, -1.0f}) values.values[at++] = sign * value;
  };
  values.values[at++] = kMaxFloat8E4M3;  // so that the scale is 1
  const float step = dtype() == DType::kBF16 ? 0x1p-7f : 0x1p-23f;
  for (uint8_t number = 0; number < 0x7e; ++number) {
    const float low = Float8E4M3ToFloat(number), high = Float8E4M3ToFloat(number + 1);
    const float border = (low + high) / 2;
    for (const float value : {low, border, border * (1 + step), border * (1 - step)}) add(value);
  }
  for (const float tiny : {0x1p-9f, 0x1p-10f, 0x1.02p-10f, 0x1p-40f, 0x1p-126f}) add(tiny);
  ASSERT_LE(at, head_elements());
  for (float& value : values.values) value = reference::RoundTo(value, dtype());
  const KvPages kv = PutPages(values);
  const std::vector<uint8_t> bytes = Quantize(kv, {{0, 128}});
  float scale;
  std::memcpy(&scale, bytes.data(), sizeof(scale));
  EXPECT_EQ(scale, 1.0f);
  EXPECT_EQ(bytes, Expected({{0, 128}}));
}

// Scales of every size: none at all, subnormal ones, and those of the greatest floats.
TEST_P(QuantizeKvTest, TakesMagnitudesOfEverySize) {
  const std::vector<float> sizes = {0.0f,   0x1p-149f, 0x1p-141f, 0x1p-133f, 0x1p-126f,
                                    1e-30f, 1.0f,      1e30f,     0x1p127f,  0x1.fep127f};
  HostMatrix values = RandomMatrix(static_cast<int64_t>(sizes.size()), page_elements(), 3, dtype());
  std::vector<KvPageTokens> pages;
  for (size_t i = 0; i < sizes.size(); ++i) {
    for (int64_t e = 0; e < values.cols; ++e) {
      float& value = values.Row(static_cast<int64_t>(i))[e];
      value = reference::RoundTo(std::clamp(value / 8, -1.0f, 1.0f) * sizes[i], dtype());
    }
    pages.push_back({static_cast<int32_t>(i), 128});
  }
  const KvPages kv = PutPages(values);
  EXPECT_EQ(Quantize(kv, pages), Expected(pages));
}

// |scale * number - x| is at most 2^-4 |x| where the number is normal, and 2^-10 scale where it is
// not; a little more for the roundings of the two divisions.
TEST_P(QuantizeKvTest, KeepsTheBoundOfItsError) {
  const HostMatrix values = RandomMatrix(4, page_elements(), 4, dtype(), 0.7f);
  const KvPages kv = PutPages(values);
  const std::vector<uint8_t> bytes = Quantize(kv, {{0, 128}, {1, 128}, {2, 128}, {3, 128}});
  constexpr double kSlack = 1 + 0x1p-20;
  double worst_normal = 0, worst_subnormal = 0;
  for (int64_t page = 0; page < values.rows; ++page) {
    const uint8_t* fp8 = bytes.data() + page * Fp8PageBytes(shape());
    for (int64_t e = 0; e < values.cols; ++e) {
      float scale;
      std::memcpy(&scale, fp8 + e / head_elements() * sizeof(float), sizeof(scale));
      const uint8_t number = fp8[Fp8ScaleBytes(shape()) + e];
      const double x = values.Row(page)[e];
      const double error = std::abs(double{scale} * Float8E4M3ToFloat(number) - x);
      if ((number & 0x78) != 0) {
        worst_normal = std::max(worst_normal, error / std::abs(x));
      } else {
        worst_subnormal = std::max(worst_subnormal, error / scale);
      }
    }
  }
  EXPECT_LE(worst_normal, 0x1p-4 * kSlack);
  EXPECT_GT(worst_normal, 0x1p-5) << "nothing was rounded";
  EXPECT_LE(worst_subnormal, 0x1p-10 * kSlack);
  EXPECT_GT(worst_subnormal, 0) << "nothing was rounded";
}

// What a head with a value that is not finite becomes does not matter; its neighbours stay.
TEST_P(QuantizeKvTest, NotFiniteValuesSpoilTheirHeadOnly) {
  for (const float bad : {INFINITY, -INFINITY, static_cast<float>(NAN)}) {
    HostMatrix values = RandomMatrix(1, page_elements(), 5, dtype());
    const KvPages clean = PutPages(values);
    const std::vector<uint8_t> expected = Quantize(clean, {{0, 128}});
    values.values[3] = bad;
    const std::vector<uint8_t> bytes = Quantize(PutPages(values), {{0, 128}});
    const int64_t scales = Fp8ScaleBytes(shape());
    for (int64_t i = 0; i < static_cast<int64_t>(bytes.size()); ++i) {
      const bool of_first_head = i < 4 || (i >= scales && i < scales + head_elements());
      ASSERT_TRUE(of_first_head || bytes[i] == expected[i]) << i;
    }
  }
}

TEST_P(QuantizeKvTest, RefusesWhatIsNoPage) {
  const KvPages kv = PutPages(RandomMatrix(1, page_elements(), 6, dtype()));
  for (const KvPageTokens page : {KvPageTokens{-1, 128}, {0, 0}, {0, 129}}) {
    EXPECT_THAT(backend_->QuantizeKv({kv, {&page, 1}, nullptr}),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("tokens")));
  }
  KvPages other = kv;
  other.dtype = DType::kF16;
  EXPECT_THAT(backend_->QuantizeKv({other, {}, nullptr}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("f16")));
}

}  // namespace
}  // namespace headstart::testing
