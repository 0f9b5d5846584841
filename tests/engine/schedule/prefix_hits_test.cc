#include "engine/schedule/prefix_hits.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace headstart {
namespace {

constexpr int64_t kRunTokens = 4 * kBlockTokens;

class PrefixHitsTest : public ::testing::Test {
 protected:
  // A sparse prompt, whose pages are found in whole runs only.
  PrefixHitsTest() {
    request_.request.token_ids.assign(3 * kRunTokens, 7);
    request_.request.prefix.cache_root = "root";
    request_.request.page_names =
        HashPages("model", "root", request_.request.token_ids,
                  NamedTokens(request_.request, kRunTokens) / kBlockTokens);
  }
  // Pages [0, count) of the prompt lie in the pool, held by nobody.
  void Leave(int64_t count) {
    const PageRefs refs = *pool_.Take(count);
    for (int64_t i = 0; i < count; ++i) {
      pool_.Publish(refs.pages()[i], request_.request.page_names[i],
                    std::make_shared<const SlotState>(1, std::byte{static_cast<uint8_t>(i)}));
    }
  }

  PagePool pool_{8};
  PrefixHits prefixes_{&pool_, kRunTokens};
  ActiveRequest request_;
};

TEST_F(PrefixHitsTest, TakesWholeRunsAndTheStateBehindThem) {
  Leave(7);
  EXPECT_EQ(prefixes_.Count(request_.request, 0), kRunTokens);
  prefixes_.Extend(request_, /*begins=*/true);
  EXPECT_EQ(request_.ready, kRunTokens);
  EXPECT_EQ(request_.result.cached_tokens, kRunTokens);
  EXPECT_EQ(request_.pages.size(), 4);
  EXPECT_EQ(*request_.state, SlotState(1, std::byte{3}));
  EXPECT_TRUE(request_.slot_is_stale);
}

TEST_F(PrefixHitsTest, ARunThatIsNotWholeGetsNoYounger) {
  Leave(3);
  const PageHash other{.bytes = {1}};
  {
    const PageRefs refs = *pool_.Take(1);
    pool_.Publish(refs.pages()[0], other, nullptr);
  }
  prefixes_.Extend(request_, /*begins=*/true);
  EXPECT_EQ(request_.ready, 0);
  const PageRefs taken = *pool_.Take(pool_.num_pages() - 1);
  EXPECT_TRUE(pool_.Has(other));
  EXPECT_FALSE(pool_.Has(request_.request.page_names[0]));
}

}  // namespace
}  // namespace headstart
