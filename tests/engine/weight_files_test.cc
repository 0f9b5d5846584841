#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <string>

#include "engine/model/safetensors.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::StatusIs;
using testing::TempDir;
using testing::TensorMap;
using testing::TestTensor;
using testing::WriteWeights;

TestTensor Tensor(DType dtype, std::vector<int64_t> shape, const std::string& content) {
  TestTensor tensor{dtype, std::move(shape), std::vector<std::byte>(content.size())};
  std::memcpy(tensor.bytes.data(), content.data(), content.size());
  return tensor;
}

std::string Content(const StoredTensor& tensor) {
  std::string bytes(static_cast<size_t>(tensor.bytes), '?');
  EXPECT_OK(
      tensor.file->Read(tensor.offset, {reinterpret_cast<std::byte*>(bytes.data()), bytes.size()}));
  return bytes;
}

const TensorMap kTensors = {{"a", Tensor(DType::kBF16, {3}, "a1a2a3")},
                            {"b", Tensor(DType::kF32, {1, 2}, "b1b2b3b4")},
                            {"c", Tensor(DType::kF16, {}, "c1")}};

class WeightFilesTest : public ::testing::Test {
 protected:
  TempDir dir_;
};

TEST_F(WeightFilesTest, FindsTensorsInOneFile) {
  ASSERT_OK(WriteWeights(dir_.path(), kTensors, 1));
  ASSERT_OK_AND_ASSIGN(const auto files, WeightFiles::Open(dir_.path()));
  EXPECT_THAT(files->Names(), ElementsAre("a", "b", "c"));
  EXPECT_EQ(files->total_bytes(), 16);
  ASSERT_OK_AND_ASSIGN(const StoredTensor b, files->Find("b"));
  EXPECT_EQ(b.dtype, DType::kF32);
  EXPECT_THAT(b.shape, ElementsAre(1, 2));
  EXPECT_EQ(Content(b), "b1b2b3b4");
  ASSERT_OK_AND_ASSIGN(const StoredTensor scalar, files->Find("c"));
  EXPECT_EQ(Content(scalar), "c1");
  EXPECT_EQ(files->FileOf("a"), dir_ / "model.safetensors");
}

TEST_F(WeightFilesTest, FindsTensorsInShards) {
  ASSERT_OK(WriteWeights(dir_.path(), kTensors, 3));
  ASSERT_OK_AND_ASSIGN(const auto files, WeightFiles::Open(dir_.path()));
  EXPECT_THAT(files->Names(), ElementsAre("a", "b", "c"));
  for (const auto& [name, tensor] : kTensors) {
    ASSERT_OK_AND_ASSIGN(const StoredTensor found, files->Find(name));
    EXPECT_EQ(Content(found),
              std::string(reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size()));
  }
  EXPECT_EQ(files->FileOf("b"), dir_ / "model-00002-of-00003.safetensors");
}

TEST_F(WeightFilesTest, NamesTheTensorThatIsMissing) {
  ASSERT_OK(WriteWeights(dir_.path(), kTensors, 1));
  ASSERT_OK_AND_ASSIGN(const auto files, WeightFiles::Open(dir_.path()));
  EXPECT_THAT(files->Find("d"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("tensor \"d\" is missing")));
  EXPECT_EQ(files->FileOf("d"), "");
}

TEST_F(WeightFilesTest, ReadsMetadataAndPadding) {
  const std::string header =
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}   )";
  ASSERT_OK(
      testing::WriteFile(dir_ / "model.safetensors", testing::SafetensorsFile(header, "1234")));
  ASSERT_OK_AND_ASSIGN(const auto files, WeightFiles::Open(dir_.path()));
  EXPECT_THAT(files->Names(), ElementsAre("a"));
}

TEST_F(WeightFilesTest, RefusesOtherDTypesOnlyWhenAskedForThem) {
  const std::string header = R"({"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
                             R"("b":{"dtype":"F4","shape":[6],"data_offsets":[8,11]}})";
  ASSERT_OK(testing::WriteFile(dir_ / "model.safetensors",
                               testing::SafetensorsFile(header, "12345678abc")));
  ASSERT_OK_AND_ASSIGN(const auto files, WeightFiles::Open(dir_.path()));
  EXPECT_THAT(files->Find("a"), StatusIs(absl::StatusCode::kInvalidArgument,
                                         HasSubstr("dtype I64 is not supported")));
}

// models--org--name/snapshots/<commit>/model.safetensors -> ../../blobs/<digest>
TEST_F(WeightFilesTest, FollowsLinksInsideAHuggingFaceCacheEntry) {
  const std::string entry = dir_ / "models--org--name";
  const std::string snapshot = entry + "/snapshots/0123abcd";
  fs::create_directories(entry + "/blobs");
  fs::create_directories(snapshot);
  ASSERT_OK(WriteWeights(entry + "/blobs", kTensors, 1));
  fs::create_symlink("../../blobs/model.safetensors", snapshot + "/model.safetensors");
  EXPECT_OK(WeightFiles::Open(snapshot));
  // Through a link to the snapshot, too.
  fs::create_directory_symlink(snapshot, dir_ / "current");
  EXPECT_OK(WeightFiles::Open(dir_ / "current"));
}

TEST_F(WeightFilesTest, DoesNotFollowLinksOutOfTheCacheEntry) {
  const std::string snapshot = dir_ / "models--org--name/snapshots/0123abcd";
  fs::create_directories(snapshot);
  ASSERT_OK(WriteWeights(dir_.path(), kTensors, 1));
  fs::create_symlink("../../../model.safetensors", snapshot + "/model.safetensors");
  EXPECT_THAT(WeightFiles::Open(snapshot),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("outside of")));
  EXPECT_OK(WeightFiles::Open(snapshot, Links::kAnywhere));
  // A folder that only begins like the allowed one.
  const std::string sibling = dir_ / "models--org--name2";
  fs::create_directories(sibling);
  ASSERT_OK(WriteWeights(sibling, kTensors, 1));
  fs::remove(snapshot + "/model.safetensors");
  fs::create_symlink("../../../models--org--name2/model.safetensors",
                     snapshot + "/model.safetensors");
  EXPECT_THAT(WeightFiles::Open(snapshot),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("outside of")));
}

TEST_F(WeightFilesTest, SaysWhenAFileIsShorterThanItWas) {
  ASSERT_OK(WriteWeights(dir_.path(), kTensors, 1));
  ASSERT_OK_AND_ASSIGN(const auto files, WeightFiles::Open(dir_.path()));
  ASSERT_OK_AND_ASSIGN(const StoredTensor b, files->Find("b"));
  fs::resize_file(dir_ / "model.safetensors", static_cast<uintmax_t>(b.offset) + 3);
  std::byte bytes[8];
  EXPECT_THAT(b.file->Read(b.offset, bytes), StatusIs(absl::StatusCode::kInvalidArgument,
                                                      HasSubstr("model.safetensors: ends at byte " +
                                                                std::to_string(b.offset + 3))));
}

TEST_F(WeightFilesTest, NamesAnLfsPointer) {
  const std::string pointer =
      "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n";
  ASSERT_OK(testing::WriteFile(dir_ / "model.safetensors", pointer));
  EXPECT_THAT(WeightFiles::Open(dir_.path()),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("model.safetensors: a Git LFS pointer of 69 bytes")));
}

TEST_F(WeightFilesTest, FollowsLinksInsideTheFolder) {
  fs::create_directory(dir_ / "data");
  ASSERT_OK(WriteWeights(dir_ / "data", kTensors, 1));
  fs::create_symlink("data/model.safetensors", dir_ / "model.safetensors");
  EXPECT_OK(WeightFiles::Open(dir_.path()));
}

}  // namespace
}  // namespace headstart
