// What is the CUDA backend's own: the search for algorithms, errors that leave the device whole,
// what it refuses.
#include "kernels/cuda/cuda_resources.h"
#include "kernels/cuda/event_timer.h"
#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/tensor_compare.h"

namespace headstart::testing {
namespace {

class CudaBackendTest : public BackendTest {
 protected:
  void SetUp() override { Open({"Cuda", {.device = "cuda"}, ""}); }
};

// Products of so many rows choose their algorithm by trial runs, which must leave no trace.
TEST_F(CudaBackendTest, TrialRunsChangeNothing) {
  constexpr int64_t kRows = 1100, kIn = 128, kOut = 264;
  const HostMatrix x = RandomMatrix(kRows, kIn, 1, DType::kBF16);
  const HostMatrix w = RandomMatrix(kOut, kIn, 2, DType::kBF16, 0.1f);
  const HostMatrix before = RandomMatrix(kRows, kOut, 3, DType::kBF16);
  auto weight = backend_->PrepareLinear({{w.values.data(), DType::kF32, kOut, kIn}}, {});
  ASSERT_OK(weight);
  HostMatrix expected = reference::Linear(x, w, {});
  const DeviceMatrix in = Put(x, DType::kBF16);
  const DeviceMatrix stored = NewMatrix(kRows, kOut, DType::kBF16);
  ASSERT_OK(backend_->Linear(**weight, in.view, stored.view, LinearOutput::kStore));
  EXPECT_TRUE(TensorsMatch(Get(stored.view).values, expected.values, {.abs = 1e-4, .rel = 0x1p-8}));
  ExpectPaddingUntouched(stored);
  // Twice: the first call searches, the second takes what was found. Each product is rounded, then
  // each sum, of up to 16.
  for (const DeviceMatrix& out : {Put(before, DType::kBF16), Put(before, DType::kBF16)}) {
    HostMatrix sum = expected;
    for (size_t i = 0; i < sum.values.size(); ++i) sum.values[i] += before.values[i];
    ASSERT_OK(backend_->Linear(**weight, in.view, out.view, LinearOutput::kAdd));
    EXPECT_TRUE(TensorsMatch(Get(out.view).values, sum.values, {.abs = 0x1p-6, .rel = 0x1p-8}));
    ExpectPaddingUntouched(out);
  }
}

TEST_F(CudaBackendTest, StaysWholeWhenMemoryRunsOut) {
  const auto refused = backend_->Allocate(int64_t{1} << 45);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted) << refused.status();
  const DeviceMatrix matrix = Put(RandomMatrix(3, 64, 1, DType::kBF16), DType::kBF16);
  EXPECT_EQ(Get(matrix.view).values, RandomMatrix(3, 64, 1, DType::kBF16).values);
}

TEST_F(CudaBackendTest, NamesWhatItCannotRun) {
  const HeadShape heads{4, 2, 96};
  const DeviceKv kv =
      PutKv({RandomMatrix(128, 192, 1, DType::kBF16), RandomMatrix(128, 192, 2, DType::kBF16)},
            heads, 128);
  const DeviceMatrix q = Put(RandomMatrix(128, 384, 3, DType::kBF16), DType::kBF16);
  AttentionSequence sequence;
  sequence.rows = {0, 128, 0, kv.table()};
  const absl::Status status = backend_->Attention({q.view, q.view, kv.view, {&sequence, 1}});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("head_dim 96"), absl::string_view::npos) << status;
}

// A decode runs for thousands of steps that nobody asks the time of.
TEST_F(CudaBackendTest, TimerUsesItsEventsAgain) {
  absl::StatusOr<cuda::Stream> stream = cuda::MakeStream(/*urgent=*/false);
  ASSERT_OK(stream);
  absl::StatusOr<cuda::Event> passed = cuda::MakeEvent(cuda::kOrderEvent);
  ASSERT_OK(passed);
  constexpr int kSteps = 1000, kLayers = 3;
  cuda::EventTimer timer;
  for (int step = 0; step < kSteps; ++step) {
    for (int layer = 0; layer < kLayers; ++layer) {
      ASSERT_OK(timer.Begin(stream->get()));
      ASSERT_OK(timer.End(stream->get()));
    }
    ASSERT_OK(cuda::ToStatus(cudaEventRecord(passed->get(), stream->get()), "test"));
    ASSERT_OK(cuda::WaitFor(*passed, "test"));
  }
  EXPECT_LE(timer.num_pairs(), kLayers);
  ASSERT_OK_AND_ASSIGN(const double seconds, timer.TakeSeconds());
  EXPECT_GT(seconds, 0);
  ASSERT_OK_AND_ASSIGN(const double later, timer.TakeSeconds());
  EXPECT_EQ(later, 0);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST(CudaDeviceTest, SaysWhatItLookedForWithoutADevice) {
  const auto backend = MakeBackend({.device = "cuda"});
  if (backend.ok()) GTEST_SKIP() << "this machine has " << (*backend)->device();
  EXPECT_EQ(backend.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(backend.status().message().find("9.0"), absl::string_view::npos) << backend.status();
}

}  // namespace
}  // namespace headstart::testing
