#include "engine/schedule/page_pool.h"

#include <gtest/gtest.h>

#include <set>
#include <thread>
#include <utility>

#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::StatusIs;

TEST(PagePoolTest, HandsOutEveryPageOnce) {
  PagePool pool(4);
  ASSERT_OK_AND_ASSIGN(const PageRefs a, pool.Take(3));
  ASSERT_OK_AND_ASSIGN(const PageRefs b, pool.Take(1));
  std::set<int32_t> pages(a.pages().begin(), a.pages().end());
  pages.insert(b.pages().begin(), b.pages().end());
  EXPECT_THAT(pages, ElementsAre(0, 1, 2, 3));
  EXPECT_EQ(pool.free_pages(), 0);
}

TEST(PagePoolTest, TakesPagesBackWithTheRefs) {
  PagePool pool(4);
  {
    ASSERT_OK_AND_ASSIGN(const PageRefs refs, pool.Take(3));
    EXPECT_EQ(pool.free_pages(), 1);
    EXPECT_EQ(pool.acquired(), 3);
    EXPECT_EQ(pool.released(), 0);
  }
  EXPECT_EQ(pool.free_pages(), 4);
  EXPECT_EQ(pool.released(), 3);
}

TEST(PagePoolTest, GivesTheSamePagesToTheSameSequenceOfRequests) {
  PagePool pool(8);
  std::vector<int32_t> first;
  {
    ASSERT_OK_AND_ASSIGN(const PageRefs refs, pool.Take(5));
    first = refs.pages();
  }
  ASSERT_OK_AND_ASSIGN(const PageRefs again, pool.Take(5));
  EXPECT_EQ(again.pages(), first);
}

TEST(PagePoolTest, MovedRefsOwnTheirPagesOnce) {
  PagePool pool(4);
  ASSERT_OK_AND_ASSIGN(PageRefs a, pool.Take(2));
  PageRefs b = std::move(a);
  EXPECT_EQ(b.pages().size(), 2);
  EXPECT_EQ(pool.released(), 0);
  { const PageRefs c = std::move(b); }
  EXPECT_EQ(pool.released(), 2);
  EXPECT_EQ(pool.free_pages(), 4);
}

TEST(PagePoolTest, TellsFullFromTooSmall) {
  PagePool pool(4);
  EXPECT_THAT(pool.Take(5), StatusIs(absl::StatusCode::kFailedPrecondition,
                                     HasSubstr("needs 5 KV pages, the pool has 4")));
  ASSERT_OK_AND_ASSIGN(const PageRefs refs, pool.Take(3));
  EXPECT_THAT(pool.Take(2), StatusIs(absl::StatusCode::kResourceExhausted,
                                     HasSubstr("needs 2 KV pages, 1 are free")));
  EXPECT_EQ(pool.acquired(), 3);
}

TEST(PagePoolTest, NoPagesCanBeTakenToo) {
  PagePool pool(0);
  ASSERT_OK_AND_ASSIGN(const PageRefs refs, pool.Take(0));
  EXPECT_THAT(refs.pages(), IsEmpty());
}

TEST(PagePoolTest, ServesManyThreads) {
  PagePool pool(16);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&pool, t] {
      for (int i = 0; i < 500; ++i) {
        const absl::StatusOr<PageRefs> refs = pool.Take(t + 1);
        ASSERT_OK(refs);  // 1 + 2 + 3 + 4 <= 16
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool.free_pages(), 16);
  EXPECT_EQ(pool.acquired(), 500 * (1 + 2 + 3 + 4));
  EXPECT_EQ(pool.acquired(), pool.released());
}

}  // namespace
}  // namespace headstart
