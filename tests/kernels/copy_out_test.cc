// CopyOut of every backend: what arrives is what the operations before it left.
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "tests/kernels/backend_test.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

using ::testing::HasSubstr;

class CopyOutTest : public BackendTest, public ::testing::WithParamInterface<BackendCase> {
 protected:
  void SetUp() override { Open(GetParam()); }

  Buffer Put(const std::vector<uint8_t>& bytes) {
    auto buffer = backend_->Allocate(static_cast<int64_t>(bytes.size()));
    EXPECT_OK(buffer);
    EXPECT_OK(backend_->Upload(bytes.data(), buffer->bytes(), buffer->data()));
    return *std::move(buffer);
  }
  // Zeroed.
  HostBuffer NewHost(int64_t bytes) {
    auto host = backend_->AllocateHost(bytes);
    EXPECT_OK(host);
    std::memset(host->get(), 0, static_cast<size_t>(bytes));
    return *std::move(host);
  }
  static std::vector<uint8_t> Counting(int64_t count) {
    std::vector<uint8_t> bytes(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(i % 251 + 1);
    return bytes;
  }
};

INSTANTIATE_TEST_SUITE_P(All, CopyOutTest, ::testing::ValuesIn(BackendsUnderTest()),
                         [](const auto& info) { return NameOf(info.param); });

// Ranges of every kind: neighbours on both sides, on one side only, in falling order, not aligned,
// empty, and one that is taken twice.
TEST_P(CopyOutTest, CopiesTheRangesAndNothingElse) {
  constexpr int64_t kBytes = 1 << 20;
  const std::vector<uint8_t> source = Counting(kBytes);
  const Buffer device = Put(source);
  const HostBuffer host = NewHost(kBytes);
  struct Range {
    int64_t from, to, bytes;
  };
  const std::vector<Range> ranges = {
      {0, 0, 4096},           {4096, 4096, 4096},        {8192, 8192, 1},         // one piece
      {100'000, 8193, 777},   {100'777, 20'000, 3},                               // sources touch
      {200'000, 20'003, 500}, {300'001, 30'001, 65'537}, {299'900, 29'901, 100},  // targets touch
      {400'000, 400'000, 0},  {0, 500'000, 4096},        {900'000, 900'000, kBytes - 900'000},
  };
  std::vector<uint8_t> expected(kBytes);
  std::vector<HostCopy> copies;
  for (const Range& range : ranges) {
    std::memcpy(expected.data() + range.to, source.data() + range.from,
                static_cast<size_t>(range.bytes));
    copies.push_back({static_cast<const std::byte*>(device.data()) + range.from,
                      host.get() + range.to, range.bytes});
  }
  auto pending = backend_->CopyOut(copies);
  ASSERT_OK(pending);
  ASSERT_OK((*pending)->Wait());
  EXPECT_EQ(std::memcmp(host.get(), expected.data(), kBytes), 0);
}

// A copy takes what the operation before it writes; each is waited for on a thread of its own.
TEST_P(CopyOutTest, SeesWhatWasEnqueuedBefore) {
  constexpr int64_t kRows = 2048, kCols = 512;
  constexpr int kCopies = 20;
  const DeviceMatrix gate_up =
      BackendTest::Put(RandomMatrix(kRows, 2 * kCols, 1, dtype()), dtype());
  std::vector<DeviceMatrix> outs;
  std::vector<HostBuffer> hosts;
  for (int i = 0; i < kCopies; ++i) {
    outs.push_back(NewMatrix(kRows, kCols, dtype()));  // NaN
    hosts.push_back(NewHost(outs[i].memory.bytes()));
  }
  const int64_t bytes = outs[0].memory.bytes();
  std::vector<std::unique_ptr<PendingCopy>> pending;
  for (int i = 0; i < kCopies; ++i) {
    ASSERT_OK(backend_->SwiGlu(gate_up.view, outs[i].view));
    const HostCopy copy{outs[i].memory.data(), hosts[i].get(), bytes};
    auto started = backend_->CopyOut({&copy, 1});
    ASSERT_OK(started);
    // Some are never waited for; the last one is, so all have arrived then.
    if (i % 3 != 0) pending.push_back(*std::move(started));
  }
  std::vector<absl::Status> statuses(pending.size());
  std::vector<std::thread> waiting;
  for (size_t i = 0; i < pending.size(); ++i) {
    waiting.emplace_back([&, i] {
      statuses[i] = pending[i]->Wait();
      pending[i].reset();
    });
  }
  for (std::thread& thread : waiting) thread.join();
  for (const absl::Status& status : statuses) EXPECT_OK(status);
  std::vector<std::byte> expected(static_cast<size_t>(bytes));
  ASSERT_OK(backend_->Download(outs[0].memory.data(), bytes, expected.data()));
  EXPECT_NE(expected[0], std::byte{0xff}) << "nothing was computed";
  for (int i = 0; i < kCopies; ++i) {
    EXPECT_EQ(std::memcmp(hosts[i].get(), expected.data(), expected.size()), 0) << i;
  }
}

TEST_P(CopyOutTest, NothingToCopyArrivesToo) {
  auto pending = backend_->CopyOut({});
  ASSERT_OK(pending);
  EXPECT_OK((*pending)->Wait());
}

TEST_P(CopyOutTest, HostMemoryOutlivesTheBackend) {
  const HostBuffer host = NewHost(1000);
  backend_.reset();
  std::memset(host.get(), 1, 1000);
  EXPECT_EQ(host[999], std::byte{1});
}

TEST_P(CopyOutTest, SaysHowMuchHostMemoryIsMissing) {
  constexpr int64_t kTooMuch = int64_t{1} << 50;
  EXPECT_THAT(backend_->AllocateHost(kTooMuch),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr(std::to_string(kTooMuch))));
  // And goes on.
  const HostBuffer host = NewHost(64);
  const Buffer device = Put(Counting(64));
  const HostCopy copy{device.data(), host.get(), 64};
  auto pending = backend_->CopyOut({&copy, 1});
  ASSERT_OK(pending);
  ASSERT_OK((*pending)->Wait());
  EXPECT_EQ(host[63], std::byte{64});
}

}  // namespace
}  // namespace headstart::testing
