// The working memory that the CPU backend plans is what it comes to hold.
#include <malloc.h>

#include <string>

#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

constexpr HeadShape kHeads{9, 3, 64};

int64_t BytesInUse() {
  const struct mallinfo2 info = mallinfo2();
  return static_cast<int64_t>(info.uordblks + info.hblkhd);
}

class CpuScratchTest : public BackendTest, public ::testing::WithParamInterface<ComputeDType> {
 protected:
  void SetUp() override {
    if (BytesInUse() == 0) GTEST_SKIP() << "this malloc does not count";
    BackendOptions options;
    options.dtype = GetParam();
    options.num_threads = 2;
    ASSERT_OK_AND_ASSIGN(backend_, MakeBackend(options));
    ratio_ = PutFloats(*backend_, std::vector<float>(kHeads.num_heads));
  }

  // How much memory in use grows when a sequence of `num_tokens` runs: selection and attention of
  // its last `rows` tokens, and attention of its last token.
  int64_t Growth(int64_t num_tokens, int64_t rows) {
    const HostMatrix keys =
        RandomMatrix(num_tokens, kHeads.num_kv_heads * kHeads.head_dim, 2, dtype());
    const int64_t cols = kHeads.num_heads * kHeads.head_dim;
    const DeviceMatrix q = Put(RandomMatrix(rows, cols, 1, dtype()), dtype());
    const DeviceMatrix out = NewMatrix(rows, cols, dtype());
    const DeviceKv kv = PutKv({keys, keys}, kHeads, num_tokens);
    ProxyAttnOptions options;
    options.enabled = true;
    options.num_proxies = kHeads.num_heads;
    options.dense_below_tokens = 0;
    AttentionSequence sparse;
    sparse.rows = {0, rows, num_tokens - rows, kv.table()};
    sparse.proxy_attn = &options;
    sparse.budget_ratio = static_cast<float*>(ratio_.data());
    AttentionSequence last;
    last.rows = {rows - 4, 4, num_tokens - 4, kv.table()};

    const int64_t before = BytesInUse();
    EXPECT_OK(backend_->Attention({q.view, out.view, kv.view, {&sparse, 1}}));
    EXPECT_OK(backend_->Attention({q.view, out.view, kv.view, {&last, 1}}));
    return BytesInUse() - before;
  }

  Buffer ratio_;
};

INSTANTIATE_TEST_SUITE_P(DTypes, CpuScratchTest,
                         ::testing::Values(ComputeDType::kAuto, ComputeDType::kF32));

TEST_P(CpuScratchTest, PlanIsWhatIsHeldInTheEnd) {
  // The first call makes the threads. It is small, and its memory is part of what comes later.
  int64_t held = Growth(128, 128);
  for (const int64_t num_tokens : {1024, 2048}) {
    held += Growth(num_tokens, 512);
    const int64_t plan = backend_->PlanScratchBytes(kHeads, 512, num_tokens);
    EXPECT_NEAR(static_cast<double>(held), static_cast<double>(plan), 0.03 * plan)
        << num_tokens << " tokens";
  }
}

}  // namespace
}  // namespace headstart::testing
