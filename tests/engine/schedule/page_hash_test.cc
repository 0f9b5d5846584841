#include "engine/schedule/page_hash.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"

namespace headstart {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::vector<int32_t> CountUp(int64_t count) {
  std::vector<int32_t> ids(static_cast<size_t>(count));
  std::iota(ids.begin(), ids.end(), 0);
  return ids;
}

std::vector<std::string> InHex(const std::vector<PageHash>& names) {
  std::vector<std::string> hex;
  for (const PageHash& name : names) {
    hex.push_back(absl::BytesToHexString(
        absl::string_view(reinterpret_cast<const char*>(name.bytes.data()), name.bytes.size())));
  }
  return hex;
}

// h = sha256(b"headstart.v1.page\0model\0root").digest()
// for i in range(2):
//   h = sha256(h[:16] + struct.pack("<128I", *range(128 * i, 128 * i + 128))).digest()
//   print(h[:16].hex())
TEST(PageHashTest, IsWhatTheFormatSays) {
  EXPECT_THAT(InHex(HashPages("model", "root", CountUp(300), 2)),
              ElementsAre("bca905d0248f248f25a3a7fe23000a97", "97fd038b5cb4a014c9f9cebc36f09552"));
}

TEST(PageHashTest, MoreOfThePromptChangesNoEarlierName) {
  const std::vector<PageHash> all = HashPages("model", "root", CountUp(1000), 7);
  EXPECT_EQ(HashPages("model", "root", CountUp(640), 5),
            std::vector<PageHash>(all.begin(), all.begin() + 5));
  EXPECT_THAT(HashPages("model", "root", {}, 0), IsEmpty());
}

TEST(PageHashTest, OneTokenChangesItsPageAndAllBehind) {
  std::vector<int32_t> ids = CountUp(640);
  const std::vector<PageHash> before = HashPages("model", "root", ids, 5);
  ids[300] += 1;
  const std::vector<PageHash> after = HashPages("model", "root", ids, 5);
  for (size_t page = 0; page < 5; ++page) EXPECT_EQ(before[page] == after[page], page < 2) << page;
}

TEST(PageHashTest, SamePageElsewhereHasAnotherName) {
  const std::vector<int32_t> ids(1280, 7);
  const std::vector<PageHash> names = HashPages("model", "root", ids, 10);
  EXPECT_EQ(absl::flat_hash_set<PageHash>(names.begin(), names.end()).size(), 10);
}

TEST(PageHashTest, ModelAndRootKeepPagesApart) {
  const std::vector<int32_t> ids = CountUp(128);
  absl::flat_hash_set<PageHash> names;
  for (const auto& [model, root] : std::vector<std::pair<std::string, std::string>>{
           {"model", "root"}, {"model", "other"}, {"other", "root"}, {"modelr", "oot"}, {"", ""}}) {
    names.insert(HashPages(model, root, ids, 1).front());
  }
  EXPECT_EQ(names.size(), 5);
}

}  // namespace
}  // namespace headstart
