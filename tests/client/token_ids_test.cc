#include "client/commands/token_ids.h"

#include <gtest/gtest.h>

#include <fstream>
#include <string>
#include <vector>

#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"

namespace headstart {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Lt;
using testing::StatusIs;

TEST(TokenIdsTest, ReadsJsonAndWhiteSpace) {
  for (const char* text :
       {"1 2 4294967295", "[1, 2, 4294967295]", " 1\n2\t4294967295\n", "[1,2,\n4294967295]\n"}) {
    ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> ids, ParseTokenIds(text));
    EXPECT_THAT(ids, ElementsAre(1, 2, 4294967295u)) << text;
  }
}

TEST(TokenIdsTest, NamesWhatIsNoId) {
  EXPECT_THAT(ParseTokenIds("1 2 -3"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token_ids[2]=\"-3\"")));
  for (const char* text : {"", "[]", "  \n", "1 4294967296", "[1, 2", "1, 2", "1 2]", "[1, \"a\"]",
                           "1.5", "{\"ids\": [1]}"}) {
    EXPECT_THAT(ParseTokenIds(text), StatusIs(absl::StatusCode::kInvalidArgument)) << text;
  }
}

TEST(TokenIdsTest, ReadsAFile) {
  testing::TempDir dir;
  std::ofstream(dir / "ids.json") << "[5, 6]";
  ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> ids, ReadTokenIds(dir / "ids.json"));
  EXPECT_THAT(ids, ElementsAre(5, 6));
  EXPECT_THAT(ReadTokenIds(dir / "missing"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("missing")));
}

TEST(TokenIdsTest, DrawsTheSameFromEqualSeeds) {
  EXPECT_EQ(RandomTokenIds(100, 50, 7), RandomTokenIds(100, 50, 7));
  EXPECT_NE(RandomTokenIds(100, 50, 7), RandomTokenIds(100, 50, 8));
  EXPECT_THAT(RandomTokenIds(100, 50, 7), Each(Lt(50)));
}

TEST(TokenIdsTest, ParsesARandomPrompt) {
  ASSERT_OK_AND_ASSIGN(RandomPrompt prompt, ParseRandomPrompt("4096:7"));
  EXPECT_EQ(prompt.count, 4096);
  EXPECT_EQ(prompt.seed, 7);
  ASSERT_OK_AND_ASSIGN(prompt, ParseRandomPrompt("12"));
  EXPECT_EQ(prompt.count, 12);
  for (const char* text : {"", ":1", "0:1", "-4", "4:x", "99999999999999"}) {
    EXPECT_THAT(ParseRandomPrompt(text), StatusIs(absl::StatusCode::kInvalidArgument)) << text;
  }
}

}  // namespace
}  // namespace headstart
