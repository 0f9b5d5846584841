#include "engine/ship/host_pages.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <set>
#include <thread>
#include <utility>
#include <vector>

namespace headstart {
namespace {

using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr int64_t kBytes = 64;

HostBuffer NewHostBuffer(int64_t bytes) {
  return HostBuffer(new std::byte[bytes],
                    {[](void* data) { delete[] static_cast<std::byte*>(data); }});
}

TEST(HostPagesTest, TakesAllOrNone) {
  HostPages pages(nullptr, kBytes, 4);
  const std::vector<HostChunk> three = pages.Take(3, 1);
  EXPECT_THAT(three, SizeIs(3));
  EXPECT_THAT(pages.Take(2, 2), IsEmpty());
  EXPECT_EQ(pages.free_chunks(), 1);
  EXPECT_EQ(pages.held(2), 0);
  EXPECT_THAT(pages.Take(1, 2), SizeIs(1));
}

TEST(HostPagesTest, NothingIsTakenWhereNothingIsAskedFor) {
  HostPages pages(nullptr, kBytes, 4);
  EXPECT_THAT(pages.Take(0, 1), IsEmpty());
  EXPECT_EQ(pages.held(1), 0);
}

TEST(HostPagesTest, KnowsWhoHoldsHowMuch) {
  HostPages pages(nullptr, kBytes, 8);
  std::vector<HostChunk> a = pages.Take(3, 1);
  const std::vector<HostChunk> b = pages.Take(2, 2);
  const std::vector<HostChunk> more = pages.Take(1, 1);
  EXPECT_EQ(pages.held(1), 4);
  EXPECT_EQ(pages.held(2), 2);
  EXPECT_EQ(pages.held(3), 0);
  a.pop_back();
  EXPECT_EQ(pages.held(1), 3);
  a.clear();
  EXPECT_EQ(pages.held(1), 1);
  EXPECT_EQ(pages.free_chunks(), 5);
}

TEST(HostPagesTest, BuffersDoNotOverlap) {
  HostPages pages(NewHostBuffer(4 * kBytes), kBytes, 4);
  const std::vector<HostChunk> all = pages.Take(4, 1);
  std::set<const std::byte*> begins;
  for (const HostChunk& chunk : all) begins.insert(chunk.data());
  ASSERT_THAT(begins, SizeIs(4));
  EXPECT_EQ(*begins.rbegin() - *begins.begin(), 3 * kBytes);
}

TEST(HostPagesTest, GivesFirstWhatWasUsedLast) {
  HostPages pages(NewHostBuffer(4 * kBytes), kBytes, 4);
  std::vector<HostChunk> taken = pages.Take(3, 1);
  const std::byte* second = taken[1].data();
  { const HostChunk gone = std::move(taken[1]); }
  EXPECT_EQ(pages.Take(1, 2)[0].data(), second);
}

TEST(HostPagesTest, MovedChunksGoBackOnce) {
  HostPages pages(nullptr, kBytes, 2);
  std::vector<HostChunk> taken = pages.Take(2, 1);
  HostChunk moved = std::move(taken[0]);
  taken.clear();
  EXPECT_EQ(pages.free_chunks(), 1);
  moved = HostChunk();
  EXPECT_EQ(pages.free_chunks(), 2);
  EXPECT_EQ(pages.held(1), 0);
}

TEST(HostPagesTest, TellsOfRoomWithoutItsLock) {
  HostPages pages(nullptr, kBytes, 2);
  std::vector<int64_t> free;
  pages.NotifyRoom([&] { free.push_back(pages.free_chunks()); });  // with the lock held: a deadlock
  pages.Take(2, 1).clear();
  EXPECT_THAT(free, ::testing::ElementsAre(1, 2));
}

TEST(HostPagesTest, WaitsUntilTheLastIsBackAndWasTold) {
  HostPages pages(nullptr, kBytes, 2);
  std::atomic<int> told{0};
  pages.NotifyRoom([&] { ++told; });
  pages.WaitUntilAllBack();  // all are
  std::vector<HostChunk> taken = pages.Take(2, 1);
  std::thread network([&] { taken.clear(); });
  pages.WaitUntilAllBack();
  EXPECT_EQ(pages.free_chunks(), 2);
  EXPECT_EQ(told, 2);
  network.join();
}

}  // namespace
}  // namespace headstart
