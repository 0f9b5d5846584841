#include "engine/schedule/page_pool.h"

#include <gtest/gtest.h>

#include <set>
#include <thread>
#include <utility>

#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

PageHash Name(uint8_t number) { return PageHash{.bytes = {number}}; }

// Pages of which page i has the name first_name + i.
PageRefs TakeAndPublish(PagePool& pool, int64_t count, uint8_t first_name) {
  PageRefs refs = *pool.Take(count);
  for (const int32_t page : refs.pages()) pool.Publish(page, Name(first_name++), nullptr);
  return refs;
}

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

TEST(PagePoolTest, APageOfSeveralHoldersStaysUntilTheLastLetsGo) {
  PagePool pool(1);
  PageRefs computes = TakeAndPublish(pool, 1, 7);
  {
    std::optional<CachedPage> shares = pool.Find(Name(7));
    ASSERT_TRUE(shares.has_value());
    EXPECT_EQ(shares->page.pages(), computes.pages());
    computes = PageRefs();
    EXPECT_EQ(pool.free_pages(), 0);
    EXPECT_EQ(pool.cached_pages(), 0);
    EXPECT_THAT(pool.Take(1), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("0 are")));
    EXPECT_TRUE(pool.Has(Name(7)));
  }
  EXPECT_EQ(pool.free_pages(), 1);
  EXPECT_EQ(pool.cached_pages(), 1);
  EXPECT_EQ(pool.acquired(), 2);
  EXPECT_EQ(pool.released(), 2);
}

TEST(PagePoolTest, FindsWhatNobodyHoldsWithItsState) {
  PagePool pool(2);
  const auto state = std::make_shared<const SlotState>(3, std::byte{5});
  {
    ASSERT_OK_AND_ASSIGN(const PageRefs refs, pool.Take(2));
    pool.Publish(refs.pages()[0], Name(1), nullptr);
    pool.Publish(refs.pages()[1], Name(2), state);
  }
  EXPECT_EQ(pool.Find(Name(1))->state, nullptr);
  EXPECT_EQ(pool.Find(Name(2))->state, state);
  EXPECT_EQ(pool.Find(Name(3)), std::nullopt);
}

TEST(PagePoolTest, TakesPagesWithoutNameFirst) {
  PagePool pool(4);
  { const PageRefs refs = TakeAndPublish(pool, 2, 1); }
  { ASSERT_OK_AND_ASSIGN(const PageRefs refs, pool.Take(2)); }
  EXPECT_EQ(pool.cached_pages(), 2);
  ASSERT_OK_AND_ASSIGN(const PageRefs refs, pool.Take(3));
  EXPECT_EQ(pool.evicted(), 1);
  EXPECT_EQ(pool.cached_pages(), 1);
  EXPECT_EQ(pool.free_pages(), 1);
}

TEST(PagePoolTest, EvictsTheDeepestPagesOfAPrefixFirst) {
  PagePool pool(3);
  { const PageRefs refs = TakeAndPublish(pool, 3, 1); }
  std::vector<PageRefs> taken;
  for (int left = 2; left >= 0; --left) {
    taken.push_back(*pool.Take(1));
    for (uint8_t i = 1; i <= 3; ++i) EXPECT_EQ(pool.Has(Name(i)), i <= left) << left;
  }
  EXPECT_EQ(pool.evicted(), 3);
}

TEST(PagePoolTest, EvictsWhatWasLetGoLongestAgo) {
  PagePool pool(3);
  { const PageRefs a = TakeAndPublish(pool, 1, 1); }
  { const PageRefs b = TakeAndPublish(pool, 1, 2); }
  { const PageRefs c = TakeAndPublish(pool, 1, 3); }
  { const auto used_again = pool.Find(Name(1)); }
  EXPECT_TRUE(pool.Has(Name(2)));  // no use
  ASSERT_OK_AND_ASSIGN(const PageRefs first, pool.Take(1));
  EXPECT_FALSE(pool.Has(Name(2)));
  ASSERT_OK_AND_ASSIGN(const PageRefs second, pool.Take(1));
  EXPECT_FALSE(pool.Has(Name(3)));
  EXPECT_TRUE(pool.Has(Name(1)));
}

TEST(PagePoolTest, AHeldPageIsNotEvicted) {
  PagePool pool(3);
  { const PageRefs refs = TakeAndPublish(pool, 3, 1); }
  const auto held = pool.Find(Name(2));
  ASSERT_OK_AND_ASSIGN(const PageRefs others, pool.Take(2));
  EXPECT_THAT(others.pages(), ::testing::Not(::testing::Contains(held->page.pages()[0])));
  EXPECT_TRUE(pool.Has(Name(2)));
  EXPECT_THAT(pool.Take(1), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("0 are")));
}

TEST(PagePoolTest, AnEvictedPageHasNeitherNameNorState) {
  PagePool pool(1);
  const auto state = std::make_shared<const SlotState>(3);
  {
    ASSERT_OK_AND_ASSIGN(const PageRefs refs, pool.Take(1));
    pool.Publish(refs.pages()[0], Name(1), state);
  }
  {
    ASSERT_OK_AND_ASSIGN(const PageRefs refs, pool.Take(1));
    EXPECT_EQ(pool.Find(Name(1)), std::nullopt);
    EXPECT_EQ(state.use_count(), 1);
  }
  EXPECT_EQ(pool.cached_pages(), 0);
  EXPECT_EQ(pool.free_pages(), 1);
}

TEST(PagePoolTest, ANameStaysWithThePageThatHasIt) {
  PagePool pool(2);
  const PageRefs first = TakeAndPublish(pool, 1, 1);
  {
    PageRefs second = TakeAndPublish(pool, 1, 1);
    EXPECT_EQ(pool.Find(Name(1))->page.pages(), first.pages());
  }
  EXPECT_EQ(pool.cached_pages(), 0) << "the second has no name and is simply free";
  pool.Publish(first.pages()[0], Name(1), nullptr);  // again: nothing happens
  EXPECT_EQ(pool.Find(Name(1))->page.pages(), first.pages());
}

TEST(PagePoolTest, RefsGrowAndExchangePages) {
  PagePool pool(4);
  PageRefs refs;
  refs.Append(*pool.Take(1));
  refs.Append(*pool.Take(2));
  refs.Append(PageRefs());
  EXPECT_THAT(refs.pages(), ElementsAre(0, 1, 2));
  refs.Replace(1, *pool.Take(1));
  EXPECT_THAT(refs.pages(), ElementsAre(0, 3, 2));
  EXPECT_EQ(pool.free_pages(), 1);
  refs = PageRefs();
  EXPECT_EQ(pool.free_pages(), 4);
  EXPECT_EQ(pool.acquired(), 4);
  EXPECT_EQ(pool.released(), 4);
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

// Each thread takes the prefix that all share as far as it is there, and computes the rest.
TEST(PagePoolTest, SharesAPrefixAmongThreads) {
  static constexpr uint8_t kPrefix = 6;
  PagePool pool(int64_t{4} * kPrefix);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&pool] {
      for (int i = 0; i < 500; ++i) {
        PageRefs refs;
        while (refs.size() < kPrefix) {
          const PageHash name = Name(static_cast<uint8_t>(refs.size()));
          std::optional<CachedPage> found = pool.Find(name);
          if (found.has_value()) {
            refs.Append(std::move(found->page));
            continue;
          }
          refs.Append(*pool.Take(1));
          pool.Publish(refs.pages().back(), name, nullptr);
        }
        const std::set<int32_t> distinct(refs.pages().begin(), refs.pages().end());
        ASSERT_EQ(distinct.size(), kPrefix);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pool.free_pages(), pool.num_pages());
  EXPECT_EQ(pool.cached_pages(), kPrefix);
  EXPECT_EQ(pool.acquired(), 4 * 500 * kPrefix);
  EXPECT_EQ(pool.acquired(), pool.released());
}

}  // namespace
}  // namespace headstart
